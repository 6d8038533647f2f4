"""Who gets through to a replica's routes, what a key sees of its models, and the line that is written about it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray.serve._private.logging_utils import StreamToLogger
from starlette.types import ASGIApp

from forge_ray.config.base import parse
from forge_ray.config.release import DeployConfig
from forge_ray.errors import ConfigError
from forge_ray.serve import middleware
from forge_ray.serve.access import GrantedDirectory, authenticated, scope_of
from forge_ray.serve.access_log import LOG, SERVE_LOG, write_access_log
from forge_ray.serve.context import Caller, Chosen, ServingContext
from forge_ray.serve.http import build_http, replica_app
from forge_ray.serve.keys import ApiKey, sha256_of
from forge_ray.serve.limits import Counters
from forge_ray.serve.metrics import Metrics
from forge_ray.serve.middleware import AuthMiddleware
from forge_ray.serve.openai import ApiError
from forge_ray.serve.routing import RoutingInputs

pytestmark = pytest.mark.unit

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
UNKNOWN = ("/", "/docs", "/redoc", "/openapi.json", "/v1", "/v1/", "/v1/files", "/admin/keys", "//v1/models", "/-/routes")


def text_of(number: int) -> str:
    return f"fk_{number:012x}_" + "x" * 43


def key(number: int, **more: Any) -> ApiKey:
    values: dict[str, Any] = {"name": f"app{number}", "models": ("support@prod", "team-*")}
    return ApiKey(id=f"fk_{number:012x}", sha256=sha256_of(text_of(number)), **(values | more))


KEYS = {
    "chat": key(1),
    "metrics": key(2, scopes=("metrics",), models=()),
    "admin": key(3, scopes=("admin",), models=()),
    "all": key(4, scopes=("chat", "metrics", "admin"), models=("*",)),
    "expired": key(5, expires_at="2020-01-01T00:00:00.000+00:00"),
    "revoked": key(6, revoked_at="2020-01-01T00:00:00.000+00:00"),
}
BEARER = {name: {"authorization": f"Bearer {text_of(number)}"} for number, name in enumerate(KEYS, start=1)}


class Names:
    """A directory of names without models."""

    def stable(self, name: str, caller: Caller) -> Any:
        if name not in ("support@prod", "team-a", "secret"):
            raise ApiError(404, f"model {name!r} is not served here", param="model", code="model_not_found")
        return SimpleNamespace(version="mv_1")

    async def choose(self, name: str, caller: Caller, inputs: RoutingInputs) -> Chosen:
        return Chosen(name, self.stable(name, caller))

    def cards(self, caller: Caller) -> list[dict[str, Any]]:
        return [{"id": name, "object": "model"} for name in ("support@prod", "team-a", "secret")]


@pytest.fixture
def served() -> ServingContext:
    config = parse(DeployConfig, {"name": "bot", "models": ["support@prod"]})
    return ServingContext(config, "dep_0", Names(), Metrics("bot", "r0"))


def app_of(served: ServingContext, **more: Any) -> ASGIApp:
    keys = {key.sha256: key for key in KEYS.values()}
    counters = Counters()
    values: dict[str, Any] = {"keys": lambda: keys, "take": counters.take, "settle": counters.settle}
    return replica_app(served, **values | {"replica": "r0", "health": list, "ledger": None} | more)


def ask(app: ASGIApp, method: str, path: str, headers: Any = None, **more: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, headers=headers, **more)

    return asyncio.run(send())


def routes_of(served: ServingContext) -> list[str]:
    http: Any = build_http(served)
    return [route.path.replace("{model:path}", "support@prod") for route in http.app.routes]


# ---------------------------------------------------------------- 401 and 403


def test_no_route_answers_without_a_key(served: ServingContext) -> None:
    app = app_of(served)
    paths = routes_of(served)
    assert {"/v1/chat/completions", "/v1/models", "/health", "/metrics"} <= set(paths)
    for path in (*paths, *UNKNOWN):
        for method in METHODS:
            for headers in ({}, {"authorization": f"Bearer {text_of(99)}"}, BEARER["expired"], BEARER["revoked"]):
                answer = ask(app, method, path, headers)
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"].startswith('Bearer realm="forge_ray"')
                assert answer.headers["x-forge-deployment"] == "dep_0"
                if method == "HEAD":  # has no body
                    continue
                error = answer.json()["error"]
                assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
    assert 'reason="key"}' in served.metrics.text()


def test_each_route_has_a_scope(served: ServingContext) -> None:
    app = app_of(served)
    needed = {path: scope_of(path) for path in routes_of(served)}
    assert needed["/health"] == ""
    assert needed["/metrics"] == "metrics"
    for path, scope in needed.items():
        for name in ("chat", "metrics", "admin"):
            refused = ask(app, "OPTIONS", path, BEARER[name]).status_code == 403
            assert refused == (scope not in ("", name)), (path, name)
    assert ask(app, "GET", "/health", BEARER["admin"]).status_code == 200
    assert ask(app, "GET", "/metrics", BEARER["metrics"]).status_code == 200
    for path in ("/docs", "/admin/keys", "/", "//v1/models", "/v1"):
        wrong = ask(app, "GET", path, BEARER["chat"])
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (403, "insufficient_scope"), path
        assert ask(app, "GET", path, BEARER["all"]).status_code == 404, path


def test_a_prefix_of_the_server_is_not_part_of_the_route(served: ServingContext) -> None:
    app = app_of(served)

    async def under(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "root_path": "/bot", "path": "/bot" + scope["path"]}, receive, send)

    assert ask(under, "GET", "/metrics", BEARER["chat"]).status_code == 403
    assert ask(under, "GET", "/metrics", BEARER["metrics"]).status_code == 200


def test_headers_that_carry_a_key() -> None:
    now, keys = datetime.now(UTC), {key.sha256: key for key in KEYS.values()}
    text = text_of(1)
    for headers in ({"authorization": f"Bearer {text}"}, {"authorization": f"bearer  {text} "}, {"x-api-key": text}):
        assert authenticated(headers, keys, now) == KEYS["chat"]
    for wrong in ("Basic " + text, text, "Bearer", "Bearer " + text[:-1], "Bearer " + text + "x", "Bearer " + "é" * 59):
        with pytest.raises(ApiError):
            authenticated({"authorization": wrong}, keys, now)
    soon = key(7, expires_at=(now + timedelta(minutes=1)).isoformat())
    later = {soon.sha256: soon}
    assert authenticated({"x-api-key": text_of(7)}, later, now) == soon
    with pytest.raises(ApiError, match="expired"):
        authenticated({"x-api-key": text_of(7)}, later, now + timedelta(minutes=1))


def test_a_websocket_is_closed(served: ServingContext) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(AuthMiddleware(build_http(served), dict, served.metrics)({"type": "websocket", "path": "/"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_keys_that_change_are_seen_at_once(served: ServingContext) -> None:
    keys: dict[str, ApiKey] = {}
    app = app_of(served, keys=lambda: keys)
    assert ask(app, "GET", "/health", BEARER["chat"]).status_code == 401
    keys[KEYS["chat"].sha256] = KEYS["chat"]
    assert ask(app, "GET", "/health", BEARER["chat"]).status_code == 200
    keys.clear()
    assert ask(app, "GET", "/health", BEARER["chat"]).status_code == 401


def test_without_keys_every_route_is_open(served: ServingContext) -> None:
    app = app_of(served, keys=None)
    assert ask(app, "GET", "/metrics").status_code == 200
    assert [card["id"] for card in ask(app, "GET", "/v1/models").json()["data"]] == ["support@prod", "team-a", "secret"]


# ---------------------------------------------------------------- grants


def test_a_key_sees_only_what_it_is_granted(served: ServingContext) -> None:
    app = app_of(served)
    listed = ask(app, "GET", "/v1/models", BEARER["chat"]).json()["data"]
    assert [card["id"] for card in listed] == ["support@prod", "team-a"]
    assert len(ask(app, "GET", "/v1/models", BEARER["all"]).json()["data"]) == 3
    assert ask(app, "GET", "/v1/models/team-a", BEARER["chat"]).status_code == 200
    there, absent = (ask(app, "GET", f"/v1/models/{name}", BEARER["chat"]) for name in ("secret", "absent"))
    assert there.status_code == absent.status_code == 404
    assert there.text.replace("secret", "absent") == absent.text
    body = {"model": "secret", "prompt": "hello"}
    refused = ask(app, "POST", "/v1/completions", BEARER["chat"], json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_a_caller_without_a_key_is_granted_nothing() -> None:
    directory, caller = GrantedDirectory(Names()), Caller("req_1")
    assert directory.cards(caller) == []
    with pytest.raises(ApiError, match="not served here"):
        directory.stable("support@prod", caller)
    with pytest.raises(ApiError, match="not served here"):
        asyncio.run(directory.choose("support@prod", caller, RoutingInputs({}, "", ())))


# ---------------------------------------------------------------- the log


@pytest.fixture
def logger() -> Iterator[None]:
    before = LOG.handlers[:], LOG.level, LOG.propagate, LOG.parent
    yield
    LOG.handlers[:], level, LOG.propagate, LOG.parent = before
    LOG.setLevel(level)


@pytest.fixture
def log(logger: None) -> io.StringIO:
    stream = io.StringIO()
    write_access_log(stream)
    return stream


def test_one_line_per_request_without_keys_prompts_or_paths(served: ServingContext, log: io.StringIO) -> None:
    app = app_of(served)
    ask(app, "GET", "/v1/models", BEARER["chat"] | {"x-request-id": "mine-1"})
    ask(app, "POST", "/v1/completions", BEARER["chat"], json={"model": "secret", "prompt": "the prompt"})
    ask(app, "GET", "/v1/what?key=" + text_of(1), BEARER["all"])
    ask(app, "POST", "/v1/completions", {"authorization": "Bearer wrong-key"})
    written = log.getvalue()
    lines = [json.loads(line) for line in written.splitlines()]
    assert [(line["status"], line["route"]) for line in lines] == [
        (200, "/v1/models"),
        (404, "/v1/completions"),
        (404, "unknown"),
        (401, "unknown"),
    ]
    assert [line["key"] for line in lines] == [KEYS["chat"].id, KEYS["chat"].id, KEYS["all"].id, ""]
    assert lines[0]["request_id"] == "mine-1"
    assert set(lines[0]) == {
        *("time", "request_id", "key", "method", "route", "model", "model_version", "status"),
        *("prompt_tokens", "completion_tokens", "first_token_ms", "ms", "client_gone"),
    }
    assert datetime.fromisoformat(lines[0]["time"]).tzinfo
    assert not any(line["client_gone"] for line in lines)
    assert lines[3]["address"] == "127.0.0.1"
    for never in ("x" * 43, "wrong-key", "the prompt", "secret", "what"):
        assert never not in written


def test_the_lines_are_on_stderr(logger: None, capsys: pytest.CaptureFixture[str]) -> None:
    write_access_log()
    LOG.info('{"status": 200}')
    assert capsys.readouterr().err == '{"status": 200}\n'


def test_where_serve_logs_stderr_the_lines_go_to_its_log_without_the_detour(
    logger: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    detour = StreamToLogger(logging.getLogger("ray.serve"), logging.INFO, sys.stderr)
    monkeypatch.setattr(sys, "stderr", detour)
    monkeypatch.setattr(detour, "write", lambda text: pytest.fail(f"written to stderr: {text}"))
    write_access_log()
    records: list[logging.LogRecord] = []
    handler = logging.Handler()  # set afterwards, as Serve does when it is configured again
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(SERVE_LOG, "handlers", [handler])
    monkeypatch.setattr(SERVE_LOG, "propagate", False)
    monkeypatch.setattr(SERVE_LOG, "level", logging.WARNING)
    LOG.info('{"status": 200}')
    assert [(record.levelname, record.getMessage()) for record in records] == [("INFO", '{"status": 200}')]
    write_access_log(io.StringIO())
    LOG.info('{"status": 201}')
    assert len(records) == 1


def test_usage_of_a_broken_stream_is_recorded_before_its_log_line(
    served: ServingContext, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "CLOSED_S", 0.1)
    closed: list[tuple[int, int, int]] = []

    class Open:
        """An admission as `limits` gives it."""

        def __init__(self, caller: Caller) -> None:
            self.caller = caller

        def close(self, prompt_tokens: int, completion_tokens: int, status: int) -> None:
            self.caller.admission, self.caller.completion_tokens = None, completion_tokens
            closed.append((prompt_tokens, completion_tokens, status))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        caller = scope["state"]["caller"]
        caller.admission = admission = Open(caller)
        if scope["path"] == "/v1/late":
            asyncio.get_running_loop().call_later(0.02, admission.close, 5, 7, 499)
        raise asyncio.CancelledError

    async def use(path: str) -> None:
        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        with pytest.raises(asyncio.CancelledError):
            await AuthMiddleware(app, None, served.metrics)(scope, None, None)

    asyncio.run(use("/v1/late"))
    asyncio.run(use("/v1/never"))
    assert closed == [(5, 7, 499), (0, 0, 499)]
    assert [json.loads(line)["completion_tokens"] for line in log.getvalue().splitlines()] == [7, 0]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("a-b_c.1:2/3=", True),
        ("r" * 128, True),
        ("r" * 129, False),
        ("two words", False),
        ("line\tbreak", False),
        ("", False),
    ],
)
def test_safe_request_ids_of_clients_are_kept(served: ServingContext, sent: str, kept: bool) -> None:
    request_id = ask(app_of(served), "GET", "/health", {"x-request-id": sent}).headers["x-request-id"]
    assert (request_id == sent) == kept
    assert kept or request_id.startswith("req_")


def test_no_log_line_is_built_when_logging_is_off(served: ServingContext, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, LOG.name):
        ask(app_of(served), "GET", "/health", BEARER["chat"])
    assert not caplog.records


# ---------------------------------------------------------------- web pages

PAGE = "https://app.example.com"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-stainless-lang"}


def for_page(served: ServingContext, *origins: str) -> ServingContext:
    config = parse(DeployConfig, {"name": "bot", "models": ["support@prod"], "cors": list(origins)})
    return replace(served, config=config)


def test_pages_of_listed_origins_may_ask_and_read(served: ServingContext) -> None:
    app = app_of(for_page(served, PAGE, "http://localhost:3000"))
    asked = ask(app, "OPTIONS", "/v1/chat/completions", PREFLIGHT | {"origin": PAGE})
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "authorization" in asked.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in asked.headers
    answer = ask(app, "GET", "/v1/models", BEARER["chat"] | {"origin": PAGE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert answer.headers["vary"] == "Origin"
    refused = ask(app, "GET", "/v1/models", {"origin": PAGE})  # a page must be able to read why
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", PAGE + ".evil.example", PAGE + ":8443", PAGE.upper()])
def test_pages_of_other_origins_may_not(served: ServingContext, origin: str) -> None:
    app = app_of(for_page(served, PAGE))
    asked = ask(app, "OPTIONS", "/v1/chat/completions", PREFLIGHT | {"origin": origin})
    assert (asked.status_code, asked.headers.get("access-control-allow-origin")) == (400, None)
    answer = ask(app, "GET", "/v1/models", BEARER["chat"] | {"origin": origin})
    assert "access-control-allow-origin" not in answer.headers


def test_no_page_may_by_default(served: ServingContext) -> None:
    asked = ask(app_of(served), "OPTIONS", "/v1/chat/completions", PREFLIGHT | {"origin": PAGE})
    assert (asked.status_code, asked.headers.get("access-control-allow-origin")) == (401, None)
    assert (
        "access-control-allow-origin"
        not in ask(app_of(served), "GET", "/v1/models", BEARER["chat"] | {"origin": PAGE}).headers
    )


def test_a_listed_page_uses_an_endpoint_without_keys_and_no_other_does(served: ServingContext) -> None:
    app = app_of(for_page(served, PAGE), keys=None)
    assert ask(app, "GET", "/health", {"origin": PAGE}).status_code == 200
    refused = ask(app, "GET", "/health", {"origin": "https://evil.example"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_origin")
    assert "`cors`" in refused.json()["error"]["message"]
    simple = {"origin": PAGE, "content-type": "text/plain"}
    assert ask(app, "POST", "/v1/chat/completions", simple, content="{}").status_code == 415


@pytest.mark.parametrize(
    "origin", ["*", "https://*.example.com", "app.example.com", PAGE + "/", "https://App.example.com", "null"]
)
def test_an_origin_is_written_as_browsers_write_it(origin: str) -> None:
    with pytest.raises(ConfigError, match="is not an origin") as caught:
        parse(DeployConfig, {"name": "bot", "models": ["support@prod"], "cors": [origin]})
    assert "https://app.example.com" in caught.value.hint
