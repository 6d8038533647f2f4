"""What stands between an endpoint and clients on other machines (no torch, no ray).

Ray Serve's own proxy limits neither the heads nor the connections of its clients, so it listens on loopback alone. Where a
deployment names another `host`, `forge serve` puts the gateway there; `forge deploy`, which ends while the endpoint stays,
refuses it and says what to start.
"""

from __future__ import annotations

from yarl import URL

from forge_ray.config.release import DeployConfig
from forge_ray.errors import ConfigError
from forge_ray.serve.gateway_config import GatewayConfig, tls_context
from forge_ray.serve.haproxy import behind_haproxy, free_port

LOOPBACK = "127.0.0.1"


def refuse_public(config: DeployConfig) -> None:
    """Raise `ConfigError` for a `host` that would put Ray Serve's own proxy on the network."""
    if config.is_loopback or behind_haproxy():
        return
    raise ConfigError(
        f"host={config.host} would put Ray Serve's own proxy on the network, and it limits neither the heads nor the"
        " connections of its clients",
        hint=f"leave host at {LOOPBACK}, set auth=keys, and run on the host that publishes the endpoint: forge gateway --to"
        f" http://{LOOPBACK}:{config.port} --host {config.host} --port 8443 --tls-cert FILE --tls-key FILE"
        " (`forge serve` starts it automatically)",
    )


def gateway_of(config: DeployConfig, tls_cert: str = "", tls_key: str = "") -> GatewayConfig | None:
    """The gateway that `forge serve` starts for a deployment that others reach; None where only this machine does. Its
    certificate is read here, before a model is loaded."""
    if config.is_loopback:
        if tls_cert or tls_key:
            raise ConfigError(
                f"host={config.host} is reachable from this machine alone, where nothing speaks TLS",
                hint="set host to the address that others reach, or leave --tls-cert and --tls-key out",
            )
        return None
    body = max(GatewayConfig.max_body_bytes, config.limits.max_body_bytes)
    gateway = GatewayConfig(
        to=(f"http://{LOOPBACK}:{free_port()}",),
        host=config.host,
        port=config.port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        max_body_bytes=body,
        max_held_bytes=max(GatewayConfig.max_held_bytes, 4 * body),
    )
    tls_context(gateway)
    return gateway


def proxy_address(config: DeployConfig, gateway: GatewayConfig | None) -> tuple[str, int]:
    """Host and port of Ray Serve's own proxy: those of the deployment on loopback, or where its gateway asks. Raises
    `ConfigError` where it would be on the network."""
    if gateway is None:
        refuse_public(config)
        return config.host, config.port
    url = URL(gateway.to[0])
    return str(url.host), int(url.port or 80)
