"""Ray Serve's own proxy is never on the network: the gateway is, or the deployment is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from ray.exceptions import GetTimeoutError

from forge_ray import pipeline
from forge_ray.cli import gateway as cli_gateway
from forge_ray.cli.main import cli
from forge_ray.config.base import parse
from forge_ray.config.release import DeployConfig
from forge_ray.config.run import RunConfig
from forge_ray.errors import ConfigError, EngineError
from forge_ray.serve.deploy import _start_proxy
from forge_ray.serve.front import gateway_of, proxy_address, refuse_public
from forge_ray.serve.gateway_config import GatewayConfig
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit
PUBLIC = ("0.0.0.0", "::", "10.0.0.1", "models.example.com", "127.0.0.2")
REFUSED = "would put Ray Serve's own proxy on the network"


def config(host: str, **more: Any) -> DeployConfig:
    return parse(DeployConfig, {"name": "bot", "models": ["prod"], "host": host, **more})


@pytest.fixture(autouse=True)
def no_haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)


@pytest.mark.parametrize("host", PUBLIC)
def test_serves_own_proxy_listens_on_loopback_alone(host: str) -> None:
    gateway = gateway_of(config(host, port=8123))
    assert gateway is not None
    assert (gateway.host, gateway.port) == (host, 8123)
    address, port = proxy_address(config(host), gateway)
    assert address == "127.0.0.1"
    assert gateway.to == (f"http://127.0.0.1:{port}",)
    with pytest.raises(ConfigError, match=f"host={host} {REFUSED}") as caught:
        proxy_address(config(host), None)
    assert f"forge gateway --to http://127.0.0.1:8000 --host {host}" in caught.value.hint
    assert "auth=keys" in caught.value.hint


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_an_endpoint_of_this_machine_alone_needs_no_gateway(host: str) -> None:
    assert gateway_of(config(host)) is None
    assert proxy_address(config(host, port=9000), None) == (host, 9000)
    with pytest.raises(ConfigError, match="nothing speaks TLS"):
        gateway_of(config(host), "cert.pem", "key.pem")


def test_haproxy_takes_the_place_of_serves_own_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    refuse_public(config("0.0.0.0"))


def test_a_certificate_that_cannot_be_used_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        gateway_of(config("0.0.0.0"), str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    with pytest.raises(ConfigError, match="both a certificate and its key"):
        gateway_of(config("0.0.0.0"), "cert.pem")


def test_the_gateway_passes_the_largest_body_of_the_deployment() -> None:
    gateway = gateway_of(config("0.0.0.0", limits={"max_body_bytes": 1 << 30}))
    assert gateway is not None
    assert gateway.max_body_bytes == 1 << 30
    assert gateway.max_held_bytes == 4 << 30


def test_a_run_file_with_a_public_endpoint_is_refused_before_its_first_stage(tmp_path: Path) -> None:
    values = {"name": "a", "base_model": "b", "data": {"sources": [{"path": "c.jsonl"}]}, "release": {"alias": "a"}}
    run = parse(RunConfig, values | {"deploy": {"name": "bot", "models": ["a"], "host": "0.0.0.0"}})
    with pytest.raises(ConfigError, match=REFUSED):
        pipeline.run(run, Store(str(tmp_path / "store")))


def test_deploy_and_its_file_for_serve_refuse_a_public_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "connect", lambda *_, **__: pytest.fail("it connects to the cluster"))
    path = tmp_path / "deploy.yaml"
    path.write_text("{name: bot, models: [prod], host: 10.0.0.1}")
    with pytest.raises(ConfigError, match=REFUSED):
        pipeline.deploy(config("10.0.0.1"), Store(str(tmp_path / "store")))
    done = CliRunner().invoke(cli, ["deploy", str(path), "--serve-yaml", "--store", str(tmp_path / "store")])
    assert isinstance(done.exception, ConfigError | SystemExit)
    assert REFUSED in done.output + str(done.exception)


def test_serve_starts_the_gateway_on_the_public_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    path = tmp_path / "deploy.yaml"
    path.write_text("{name: bot, models: [prod], host: 127.0.0.2, port: 8123}")

    def deploy(values: DeployConfig, store: Store, gateway: GatewayConfig | None) -> Any:
        started.append(gateway)
        return SimpleNamespace(name="bot")

    monkeypatch.setattr(pipeline, "deploy", deploy)
    monkeypatch.setattr(cli_gateway, "run_gateway", started.append)
    done = CliRunner().invoke(cli, ["serve", str(path), "--store", str(tmp_path / "store")])
    assert done.exit_code == 0, done.output
    assert started[0] is started[1]
    assert (started[0].host, started[0].port) == ("127.0.0.2", 8123)


def test_a_proxy_that_does_not_start_is_an_error_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: object) -> None:
        raise GetTimeoutError("it was killed")

    monkeypatch.setattr("forge_ray.serve.deploy.serve.start", start)
    with pytest.raises(EngineError, match=r"proxy did not start on 127\.0\.0\.1:8000: .*killed") as raised:
        _start_proxy("127.0.0.1", 8000)
    assert "load" in (raised.value.hint or "")
