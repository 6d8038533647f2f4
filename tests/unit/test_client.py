"""The client of an endpoint, where a proxy or another server answers."""

from __future__ import annotations

import pytest

from forge_ray.client import Client
from forge_ray.errors import EngineError, NotFound
from tests.scripted_http import Reply, as_json, corporate_proxy, scripted

pytestmark = pytest.mark.unit
ASKED = [{"role": "user", "content": "Hello"}]


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"object": "list", "data": [{"id": "bot"}]}
    with scripted(corporate_proxy) as proxy, scripted(lambda *_: as_json(card)) as endpoint:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        with Client(endpoint.url) as client:
            assert client.models() == ["bot"]
        assert not proxy.requests


def portal(method: str, path: str) -> Reply:
    """A page to log in, with status 200."""
    return 200, {"content-type": "text/html"}, b"<html><title>Sign in\n to the network</title></html>"


@pytest.mark.parametrize(("answer", "answered"), [
    (corporate_proxy, "503 by a proxy or another server (server: squid/6.1; via: 1.1 proxy.corp (squid/6.1); ERROR: The"),
    (portal, "200 by a proxy or another server (Sign in to the network), not by forge_ray"),
    (lambda *_: (407, {"via": "1.1 corp"}, b""), "407 by a proxy or another server (via: 1.1 corp), not by forge_ray"),
    (lambda *_: (502, {"content-type": "text/html"}, b"bad"), "502 by a proxy or another server, not by forge_ray"),
])  # fmt: skip
def test_the_answer_of_another_server_is_named_as_such(answer: object, answered: str) -> None:
    with scripted(answer) as server, Client(server.url) as client:  # type: ignore[arg-type]
        for ask in (client.models, lambda: client.chat("bot", ASKED), lambda: list(client.stream_chat("bot", ASKED))):
            with pytest.raises(EngineError) as caught:
                ask()
            assert f"was answered {answered}" in caught.value.message
            assert "uses no proxy of the environment" in caught.value.hint


def test_the_endpoints_own_errors_stay() -> None:
    reply = as_json({"error": {"message": "no model 'x'"}}, 404)
    with scripted(lambda *_: reply) as server, Client(server.url) as client, pytest.raises(NotFound, match="no model 'x'"):
        client.chat("x", ASKED)


@pytest.mark.parametrize("reply", [as_json([1]), (200, {"content-type": "application/json"}, b"{")])
def test_an_answer_that_is_not_an_object_is_an_error(reply: Reply) -> None:
    with scripted(lambda *_: reply) as server, Client(server.url) as client, pytest.raises(EngineError, match="answered"):
        client.models()
