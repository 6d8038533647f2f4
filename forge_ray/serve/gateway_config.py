"""Settings of the gateway (no torch, no ray)."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from yarl import URL

from forge_ray.errors import ConfigError

COUNTS = ("tries", "max_body_bytes", "max_held_bytes", "max_connections", "max_connections_per_address")


@dataclass(frozen=True)
class GatewayConfig:
    """`to`: base URLs, tried in this order. `retry_s` counts from a request's first failure."""

    to: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8080
    tls_cert: str = ""
    tls_key: str = ""
    tries: int = 20
    retry_s: float = 30.0
    max_body_bytes: int = 16 << 20
    max_held_bytes: int = 512 << 20
    max_connections: int = 2048
    max_connections_per_address: int = 512
    drain_s: float = 300.0

    def __post_init__(self) -> None:
        for address in self.to:
            url = URL(address)
            if url.scheme not in ("http", "https") or not url.host or url.query_string or url.fragment:
                raise ConfigError(f"{address!r} is not a base URL", hint="--to http://127.0.0.1:8000")
        if not self.to:
            raise ConfigError("no endpoint given", hint="--to http://127.0.0.1:8000")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("TLS needs both a certificate and its key", hint="--tls-cert FILE --tls-key FILE")
        for name in (*COUNTS, "retry_s", "drain_s"):
            if getattr(self, name) < (1 if name in COUNTS else 0):
                raise ConfigError(f"{name}={getattr(self, name)} is too small", hint="see `forge gateway --help`")
        if self.max_held_bytes < 4 * self.max_body_bytes:
            raise ConfigError(
                f"max_held_bytes={self.max_held_bytes} is less than four bodies of max_body_bytes={self.max_body_bytes}: one"
                " caller may hold a quarter",
                hint="raise --max-held-bytes, or lower --max-body-bytes",
            )


def tls_context(config: GatewayConfig) -> ssl.SSLContext | None:
    """What the gateway ends TLS with; None where it speaks plain HTTP."""
    if not config.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{config.tls_cert} and {config.tls_key} cannot be used: {error}",
            hint="PEM files: the certificate with its chain, and its key without a passphrase",
        ) from None
    return context
