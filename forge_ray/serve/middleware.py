"""The ASGI layers around a replica's endpoints (no ray): authentication, admission control, request metrics.

From outside in: `AuthMiddleware`, `bodies.BodyMiddleware`, `AdmissionMiddleware`, `RequestMetricsMiddleware`. Each wraps
`app`, its first argument. They are plain ASGI, so a stream passes through untouched. The outermost creates the request's
`Caller`, which the inner ones and the endpoints read from `scope["state"]["caller"]`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forge_ray.inference.engine import EngineHealth
from forge_ray.serve.access import Site, authenticated, check_scope, check_single_key, check_site
from forge_ray.serve.access_log import LOG, access_line
from forge_ray.serve.bodies import closing, count_refusal, sender_of_post
from forge_ray.serve.context import Caller
from forge_ray.serve.keys import ApiKey
from forge_ray.serve.limits import BUSY_RETRY_S, end_counting, retry_after
from forge_ray.serve.metrics import Metrics
from forge_ray.serve.openai import ApiError
from forge_ray.serve.request_ids import request_id_of
from forge_ray.serve.statuses import CLIENT_CLOSED

CLOSED_S = 2.0
log = logging.getLogger(__name__)


class AuthMiddleware:
    """Requires an API key: 401 on every route without a valid one, whether the route exists or not, and 403 without the
    route's scope. Writes the access log.

    `keys` returns sha256 → key as of now; None requires no key. `headers` are added to the refusals. `site`: what requests
    without a key must name; None where any name will do.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Callable[[], Mapping[str, ApiKey]] | None,
        metrics: Metrics,
        headers: Mapping[str, str] | None = None,
        site: Site | None = None,
    ) -> None:
        self.app = app
        self.keys = keys
        self.metrics = metrics
        self.headers = dict(headers or {})
        self.site = site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # no route has one, and one that is added some day must not be open
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        address = str((scope.get("client") or ("",))[0])
        caller = Caller(request_id_of(headers.get("x-request-id", "")), address=address)
        scope.setdefault("state", {})["caller"] = caller
        response = _Response(send, caller)
        try:
            await self._check(scope, headers, caller)
            await self.app(scope, receive, response.send)
        except ApiError as error:
            names = {"x-request-id": caller.request_id, **closing(scope, error.status), **self.headers}
            await send_error(error, response.send, names)
        finally:
            if caller.admission is not None:
                await _close_admission(caller)
            end_counting(caller, 0)
            if LOG.isEnabledFor(logging.INFO):
                LOG.info(access_line(scope, caller, response.status, response.client_gone, time.monotonic() - started))

    async def _check(self, scope: Scope, headers: Mapping[str, str], caller: Caller) -> None:
        try:
            if self.keys is not None:
                check_single_key(scope)
                caller.key = authenticated(headers, self.keys(), datetime.now(UTC))
                check_scope(caller.key, scope)
            elif self.site is not None:
                check_site(scope, self.site)
        except ApiError as error:
            self.metrics.refused({403: "scope", 401: "key"}.get(error.status, "site"))
            self.metrics.request("refused", error.status)
            raise


class _Response:
    """Sends a response with the caller's headers, and remembers its status and whether all of it was sent."""

    def __init__(self, send: Send, caller: Caller) -> None:
        self._send, self._caller = send, caller
        self.status, self.complete = CLIENT_CLOSED, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(name.encode(), value.encode()) for name, value in self._caller.headers.items()]
            message["headers"] = [*message["headers"], *own]
        await self._send(message)
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)

    @property
    def client_gone(self) -> bool:
        return not self.complete or self.status == CLIENT_CLOSED


class AdmissionMiddleware:
    """Allows `max_waiting` requests to wait; one more is answered 429, by `check` before its body is read.

    The requests that wait are those that the engines have queued and those on their way to an engine (being tokenised, or
    asking for admission). Those on their way fill the queue for their own caller first: one who has less than an equal
    share of them still gets in, up to twice the number in all.
    """

    def __init__(
        self, app: ASGIApp, health: Callable[[], Iterable[EngineHealth]], max_waiting: int, metrics: Metrics
    ) -> None:
        self.app = app
        self.health = health
        self.max_waiting = max_waiting
        self.metrics = metrics
        self._callers: dict[int, Caller] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (caller := await sender_of_post(self.app, scope, receive, send)) is None:
            return
        try:
            self.check(caller)
        except ApiError as error:
            count_refusal(self.metrics, error)
            await send_error(error, send, {"x-request-id": caller.request_id})
            return
        self._callers[id(caller)] = caller
        try:
            await self.app(scope, receive, send)
        finally:
            del self._callers[id(caller)]

    def check(self, caller: Caller) -> None:
        """`ApiError` 429 where a request of `caller` cannot wait."""
        num_queued = sum(engine.num_waiting for engine in self.health())
        on_the_way = Counter(other.holder for other in self._callers.values() if not other.version)
        num_waiting = num_queued + on_the_way.total()
        if num_waiting < self.max_waiting:
            return
        own, others = on_the_way[caller.holder], on_the_way.keys() - {caller.holder}
        has_share = bool(others) and own < self.max_waiting // (len(others) + 1)
        if has_share and num_queued < self.max_waiting and num_waiting < 2 * self.max_waiting:
            return
        raise ApiError(
            429,
            f"{num_waiting} requests are waiting already; try again",
            code="overloaded",
            headers=retry_after(BUSY_RETRY_S),
        )


class RequestMetricsMiddleware:
    """Names the request and the deployment on every response, and counts requests by route and status. One that has ended
    has no seats."""

    def __init__(self, app: ASGIApp, metrics: Metrics, deployment: str) -> None:
        self.app = app
        self.metrics = metrics
        self.deployment = deployment

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_CLOSED
        state = scope.setdefault("state", {})
        if "caller" not in state:  # without `AuthMiddleware` around it
            state["caller"] = Caller(request_id_of(Headers(scope=scope).get("x-request-id", "")))
        request_id = state["caller"].request_id
        names = [(b"x-request-id", request_id.encode()), (b"x-forge-deployment", self.deployment.encode())]

        async def send_with_names(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *names]
            await send(message)

        try:
            await self.app(scope, receive, send_with_names)
        except Exception:  # it was answered inside; passed on, it would make the server close the connection
            log.exception("request %s failed", request_id)
        finally:
            if (seats := state["caller"].seats) is not None:  # those of an answer that never began are still taken
                seats.leave()
            route = getattr(scope.get("route"), "path", "unknown")  # never the path sent: labels must be few
            self.metrics.request(route, status)


async def send_error(error: ApiError, send: Send, headers: Mapping[str, str]) -> None:
    """Answer with the error, for a layer outside the application."""
    body = json.dumps(error.body()).encode()
    all_headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **headers,
        **error.headers,
    }
    encoded = [(name.encode(), value.encode()) for name, value in all_headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


async def _close_admission(caller: Caller) -> None:
    """Wait until the admission is closed, or close it.

    A stream that never began is closed by nobody, or by the event loop, some moments after its response has ended.
    """
    deadline = time.monotonic() + CLOSED_S
    while caller.admission is not None and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    if caller.admission is not None:
        caller.admission.close(0, 0, CLIENT_CLOSED)
