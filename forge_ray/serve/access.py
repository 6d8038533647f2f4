"""In front of every route: who asks, may they, and one line about it (no ray).

Plain ASGI, so a stream passes through untouched; `front` puts it in its place. What it finds out is in `scope["state"]`:
`request_id` and `caller`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from forge_ray.serve.keys import PATTERN, ApiKey, sha256_of
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.metrics import Metrics
from forge_ray.serve.openai import ApiError
from forge_ray.serve.served import Caller, Chosen, Directory, RoutingInputs

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]
CLIENT_CLOSED = 499  # nginx's number for a client that went away before the answer
CLOSED_S = 2.0
REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
LOG = logging.getLogger("forge_ray.access")

# For `Granted`, whose questions come from within the request and do not say whose it is
CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def guarded(
    app: AsgiApp, keys: Callable[[], Mapping[str, ApiKey]] | None, metrics: Metrics, headers: Mapping[str, str] | None = None
) -> AsgiApp:
    """`app` for those who hold a key: 401 on every route without one, known or not, 403 without the route's scope.

    `keys` gives sha256 → key as it is now; None asks for no key. `headers` go onto what is refused here.
    """

    async def asgi(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":  # there are none; an app that has one day would be open
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        began, sent = time.monotonic(), Sent(send)
        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        caller = sent.caller = Caller(request_id_of(given.get("x-request-id", "")))
        scope.setdefault("state", {}).update(request_id=caller.request_id, caller=caller)
        CALLER.set(caller)
        try:
            if keys is not None:
                caller.key = authenticated(given, keys(), datetime.now(UTC))
                _check_scope(caller.key, scope)
            await app(scope, receive, sent)
        except ApiError as error:
            metrics.refused("scope" if error.status == 403 else "key")
            metrics.request("refused", error.status)
            await refuse(error, sent, {"x-request-id": caller.request_id, **(headers or {})})
        finally:
            if caller.admission is not None:
                await _closed(caller)
            if LOG.isEnabledFor(logging.INFO):
                LOG.info(_line(scope, caller, sent, time.monotonic() - began))

    return asgi


class Sent:
    """What was sent of the answer so far: its status, and whether all of it; adds the caller's headers."""

    def __init__(self, send: Any) -> None:
        self.send = send
        self.status, self.whole = CLIENT_CLOSED, False
        self.caller: Caller | None = None

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            more = self.caller.headers if self.caller else {}
            message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in more.items())]
        await self.send(message)
        self.whole = message["type"] == "http.response.body" and not message.get("more_body", False)


def authenticated(headers: Mapping[str, str], keys: Mapping[str, ApiKey], now: datetime) -> ApiKey:
    """The key that a request carries, as `Authorization: Bearer` or `x-api-key`; `ApiError` 401 without a valid one."""
    scheme, _, text = headers.get("authorization", "").partition(" ")
    text = text.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
    if not text:
        raise _unauthorised("no API key was given: send one as `Authorization: Bearer fk_…`", "")
    # Found by a hash of 256 random bits, so how long the look-up takes tells nothing of any secret
    digest = sha256_of(text) if PATTERN.fullmatch(text) else ""
    key = keys.get(digest)
    if key is None or not hmac.compare_digest(key.sha256, digest):
        raise _unauthorised("the API key is not valid here", "invalid_token")
    if problem := key.refusal(now):
        raise _unauthorised(problem, "invalid_token")
    return key


def scope_of(path: str) -> str:
    """What a key must be for; "" for any. A route that is not named here is for administrators."""
    if path == "/health":
        return ""
    if path == "/metrics":
        return "metrics"
    return "chat" if path.startswith("/v1/") or path in ("/tokenize", "/detokenize") else "admin"


async def refuse(error: ApiError, send: Any, headers: Mapping[str, str] | None = None) -> None:
    """The error as an answer, for code that stands before the app."""
    body = json.dumps(error.body()).encode()
    every = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **(headers or {}),
        **(error.headers or {}),
    }
    lines = [(name.encode(), value.encode()) for name, value in every.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


class Granted:
    """A directory as the caller may see it. A name that is not granted does not exist, served or not."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory

    def stable(self, name: str) -> Loaded:
        check_grant(CALLER.get(), name)
        return self.directory.stable(name)

    async def choose(self, name: str, facts: RoutingInputs) -> Chosen:
        check_grant(CALLER.get(), name)
        return await self.directory.choose(name, facts)

    def cards(self) -> list[dict[str, Any]]:
        caller = CALLER.get()
        key = caller.key if caller else None
        return [card for card in self.directory.cards() if key is not None and key.grants(str(card["id"]))]


def check_grant(caller: Caller | None, name: str) -> None:
    """`ApiError` 404 unless the caller's key grants `name`; one answer, whether there is such a model or not."""
    if caller is None or caller.key is None or not caller.key.grants(name):
        raise ApiError(404, f"model {name!r} is not served here", param="model", code="model_not_found")


def write_access_log(stream: TextIO | None = None) -> None:
    """Write the log's lines, and only them, to `stream` (stderr); without this they go where `logging` sends them."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


async def _closed(caller: Caller) -> None:
    """Wait until the admission is closed, or close it.

    A stream that is cut while a piece of it is being sent is closed by the event loop, some moments after its response has
    ended. One that was never begun is closed by nobody.
    """
    deadline = time.monotonic() + CLOSED_S
    while caller.admission is not None and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    if caller.admission is not None:
        caller.admission.close(0, 0, CLIENT_CLOSED)


def request_id_of(given: str) -> str:
    """The client's own id for the request if it can stand in a log line, else a new one."""
    return given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


def _check_scope(key: ApiKey, scope: Mapping[str, Any]) -> None:
    path = str(scope["path"])
    path = path.removeprefix(scope.get("root_path", "")) or "/"
    needed = scope_of(path)
    if needed and needed not in key.scopes:
        raise ApiError(
            403,
            f"the API key {key.id} is for {', '.join(key.scopes)}; this route is for {needed} (OpenAI's begin with /v1/)",
            code="insufficient_scope",
        )


def _unauthorised(message: str, problem: str) -> ApiError:
    challenge = 'Bearer realm="forge_ray"' + (f', error="{problem}"' if problem else "")
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": challenge})


def _line(scope: Mapping[str, Any], caller: Caller, sent: Sent, seconds: float) -> str:
    """One request as JSON: no prompt, no answer, no key, and no path that a client made up."""
    first = caller.first_token_s
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": caller.request_id,
        "key": caller.key.id if caller.key else "",
        "method": scope["method"],
        "route": getattr(scope.get("route"), "path", "unknown"),
        "model": caller.name,
        "model_version": caller.version,
        "status": sent.status,
        "prompt_tokens": caller.prompt_tokens,
        "completion_tokens": caller.completion_tokens,
        "first_token_ms": None if first is None else round(first * 1000, 1),
        "ms": round(seconds * 1000, 1),
        "client_gone": not sent.whole or sent.status == CLIENT_CLOSED,
    }
    if sent.status in (401, 403):  # whom to ask about a wrong key
        line["address"] = (scope.get("client") or ("",))[0]
    return json.dumps(line, ensure_ascii=False)
