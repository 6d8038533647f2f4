"""`forge serve` on an address that is not the loopback one: the gateway listens there, Serve's own proxy on 127.0.0.1."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from forge_ray.serve import keys
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from tests.certificates import write_certificate

pytestmark = pytest.mark.e2e
PUBLIC = "127.0.0.2"  # on this machine too, and not what a deployment takes for loopback
WAIT_S = 240


@dataclass(frozen=True)
class Served:
    """A running `forge serve`: its port on PUBLIC, a key, the certificate, and the folder that its processes are told."""

    port: int
    key: str
    cert: str
    tmp: str


@pytest.fixture(scope="module")
def served(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("front")
    with Catalog.open(store) as catalog:
        _, text = keys.create(catalog, "front", models=("*",))
    with socket.socket() as probe:
        probe.bind((PUBLIC, 0))
        port = int(probe.getsockname()[1])
    cert, key = write_certificate(folder)
    deploy = folder / "deploy.yaml"
    deploy.write_text(
        f"{{name: front, models: [tiny], host: {PUBLIC}, port: {port},"
        " engine: {precision: fp32, page_size: 16, num_blocks: 64, max_batch_tokens: 128}}"
    )
    tmp = tempfile.mkdtemp(prefix="fr-", dir="/tmp")  # short: Ray's socket paths have a limit
    command = [sys.executable, "-m", "forge_ray.cli", "serve", str(deploy), "--store", store.uri]
    log = folder / "log"
    with log.open("w") as stream:
        running = subprocess.Popen(
            [*command, "--tls-cert", cert, "--tls-key", key],
            stdout=stream,
            stderr=stream,
            env=os.environ | {"RAY_TMPDIR": tmp},
        )
    try:
        deadline = time.monotonic() + WAIT_S
        while "until Ctrl-C" not in log.read_text():
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield Served(port, text, cert, tmp)
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0, log.read_text()
    finally:
        running.kill()
        running.wait()
        shutil.rmtree(tmp, ignore_errors=True)


def test_the_gateway_answers_with_keys_and_tls(served: Served) -> None:
    url, context = f"https://{PUBLIC}:{served.port}", ssl.create_default_context(cafile=served.cert)
    with httpx.Client(base_url=url, verify=context, trust_env=False, timeout=60) as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/-/gateway/health").json()["status"] == "ok"
        client.headers["authorization"] = f"Bearer {served.key}"
        answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "one two", "max_tokens": 2})
        assert answer.status_code == 200, answer.text
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{PUBLIC}:{served.port}/v1/models", trust_env=False, timeout=10)


def test_nothing_of_ray_listens_beyond_loopback(served: Served) -> None:
    """Serve's own proxy and the replicas' port for other deployments too; the gateway alone has the public address."""
    listening = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_TMPDIR") == served.tmp:
                sockets = process.net_connections(kind="inet")
                listening |= {socket.laddr for socket in sockets if socket.status == psutil.CONN_LISTEN}
    assert len(listening) > 5
    assert {address.ip.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1", PUBLIC}
    assert {address.port for address in listening if address.ip == PUBLIC} == {served.port}
    assert served.port not in {address.port for address in listening if address.ip != PUBLIC}


def test_sessions_of_ray_are_closed_to_other_users(served: Served) -> None:
    (parent,) = Path(served.tmp).iterdir()
    assert parent.name == f"forge-{os.getuid()}"
    assert parent.stat().st_mode & 0o777 == 0o700
    assert list((parent / "ray").glob("session_*/logs"))


def test_the_record_names_where_clients_ask(served: Served, store: Store) -> None:
    configs = [store.read_json(path)["config"] for path in store.list("records/deployments")]
    assert (PUBLIC, served.port) in [(config.get("host"), config.get("port")) for config in configs]
