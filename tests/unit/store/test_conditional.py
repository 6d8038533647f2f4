"""Credentials of an object store: where they may be asked for, and that nothing else is reached."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from forge_ray.errors import ConfigError
from forge_ray.store import conditional

pytestmark = pytest.mark.unit
KEYS = {"AccessKeyId": "of-the-container", "SecretAccessKey": "s", "Token": "t", "Expiration": "2099-01-01T00:00:00Z"}


class Cloud(BaseHTTPRequestHandler):
    """A container's credentials for who has the token; an object store that notes whose requests come."""

    requests: list[tuple[str, str]]

    def do_GET(self) -> None:
        self._answer(json.dumps(KEYS).encode() if self.headers["authorization"] == "a token" else b"{}")

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(b"")

    def _answer(self, body: bytes) -> None:
        self.requests.append((self.command, self.headers.get("authorization", "")))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.send_header("etag", '"1"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    names = (conditional.WEB_IDENTITY, conditional.CONTAINER_PATH, conditional.CONTAINER_URI, conditional.CONTAINER_TOKEN)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_STS", *names):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    conditional._bucket.cache_clear()
    yield
    conditional._bucket.cache_clear()


@pytest.fixture
def servers() -> Iterator[list[ThreadingHTTPServer]]:
    """An object store, and next to it on another host the place of the credentials."""
    Cloud.requests = []
    listed = [ThreadingHTTPServer((host, 0), Cloud) for host in ("127.0.0.1", "127.0.0.2")]
    for server in listed:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield listed
    for server in listed:
        server.shutdown()
        server.server_close()


def test_credentials_of_a_container_are_reached(
    without_credentials: None, servers: list[ThreadingHTTPServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store, credentials = (server.server_port for server in servers)
    uri = f"s3://bucket/forge?endpoint_override=127.0.0.1:{store}&scheme=http&region=us-east-1"
    monkeypatch.setenv(conditional.CONTAINER_URI, f"http://127.0.0.2:{credentials}/v1/credentials")
    with pytest.raises(ConfigError, match=r"FULL_URI is set without AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE") as refused:
        conditional._created(uri, "bucket/one", b"1")
    assert "EKS" in refused.value.hint
    (tmp_path / "token").write_text("a token")
    monkeypatch.setenv(conditional.CONTAINER_TOKEN, str(tmp_path / "token"))
    assert conditional._created(uri, "bucket/one", b"1")
    (_, token), (method, authorisation) = Cloud.requests
    assert (token, method) == ("a token", "PUT")
    assert "Credential=of-the-container/" in authorisation


CREDENTIALS = {
    "none": ({}, []),
    "ECS": ({conditional.CONTAINER_PATH: "/v2/x"}, ["169.254.170.2"]),
    "EKS": ({conditional.CONTAINER_URI: "http://169.254.170.23/v1/credentials"}, ["169.254.170.23"]),
    "EKS on IPv6": ({conditional.CONTAINER_URI: "http://[fd00:ec2::23]/v1/credentials"}, ["fd00:ec2::23"]),
    "web identity": ({conditional.WEB_IDENTITY: "/token"}, [".amazonaws.com"]),
    "web identity of one's own": (
        {conditional.WEB_IDENTITY: "/token", "AWS_ENDPOINT_URL_STS": "https://sts.example:8443"},
        ["sts.example"],
    ),
}


@pytest.mark.parametrize("name", CREDENTIALS)
def test_hosts_that_are_asked_for_credentials(name: str, without_credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, hosts = CREDENTIALS[name]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert conditional._credential_hosts() == hosts
