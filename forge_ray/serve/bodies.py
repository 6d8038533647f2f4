"""Request bodies before anything else is done for them: size, time and memory are bounded per caller (no ray).

A request has no place in the queue, and takes nothing of its key's concurrency, until its body is here: a client that sends
one byte and waits holds one of its own places for reading, and nothing of others.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forge_ray.serve.context import Caller
from forge_ray.serve.limits import BUSY_RETRY_S, retry_after
from forge_ray.serve.metrics import Metrics
from forge_ray.serve.openai import ApiError
from forge_ray.serve.statuses import CLIENT_CLOSED

BODY_S = 60.0  # within which a body must have arrived
IDLE_S = 15.0  # within which its next piece must
READ_BY_ONE = 16  # bodies of one caller that may be under way
READ_IN_ALL = 128
PACE = 8 << 20  # bytes a second at which one caller's large bodies are taken: what is refused afterwards was read and parsed
PACED = 64 << 10  # bytes from which a body is large
DISCARDED = 64 << 10  # a body of this declared size is not worth a new connection: the server reads and discards it

Check = Callable[[Caller], None]


class BodyMiddleware:
    """Reads the body of each POST, then calls `app` with it. `check` raises `ApiError` for a request whose body is not worth
    reading. Inside `AuthMiddleware`: no body is read before its key is checked."""

    def __init__(self, app: ASGIApp, max_bytes: int, metrics: Metrics, check: Check) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.metrics = metrics
        self.check = check
        self._reading: Counter[str] = Counter()
        self._next_at: dict[str, float] = {}  # when a caller's next large body is taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (caller := await sender_of_post(self.app, scope, receive, send)) is None:
            return
        try:
            self.check(caller)
            body = await self._body(caller, Headers(scope=scope), receive)
        except ApiError as error:
            count_refusal(self.metrics, error)
            raise
        if body is None:  # the client left
            self.metrics.request("refused", CLIENT_CLOSED)
            return
        await self.app(scope, _replayed(body, receive), send)

    async def _body(self, caller: Caller, headers: Headers, receive: Receive) -> bytes | None:
        too_large = ApiError(413, f"the body exceeds {self.max_bytes} bytes", code="request_too_large")
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self.max_bytes:
            raise too_large
        holder = caller.holder
        if self._reading[holder] >= READ_BY_ONE or self._reading.total() >= READ_IN_ALL:
            raise ApiError(
                429,
                f"{self._reading[holder]} of your requests and {self._reading.total()} in all are still sending their "
                f"bodies; {READ_BY_ONE} and {READ_IN_ALL} may at once: finish those first",
                code="overloaded",
                headers=retry_after(BUSY_RETRY_S),
            )
        self._reading[holder] += 1
        body = bytearray()
        try:
            expected = int(declared[:20]) if declared.isdecimal() else PACED
            await asyncio.sleep(self._pace(holder, expected))
            async with asyncio.timeout(BODY_S):
                while True:
                    async with asyncio.timeout(IDLE_S):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self.max_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        self._pace(holder, len(body) - expected)  # of a body that did not say its size
                        return bytes(body)
        except TimeoutError:
            rule = f"the body did not arrive within {BODY_S:.0f} s, or nothing of it did for {IDLE_S:.0f} s"
            raise ApiError(408, rule, code="request_timeout") from None
        finally:
            self._reading[holder] -= 1
            if not self._reading[holder]:
                del self._reading[holder]

    def _pace(self, holder: str, size: int) -> float:
        """Seconds until a body of this size is taken; those that come after it wait until it had its time."""
        if size < PACED:
            return 0.0
        now = time.monotonic()
        begin = max(now, self._next_at.get(holder, 0.0))
        self._next_at = {name: at for name, at in self._next_at.items() if at > now} | {holder: begin + size / PACE}
        return begin - now


async def sender_of_post(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> Caller | None:
    """Who sent a POST; any other request is passed on to `app`, and None returned."""
    if scope["type"] != "http" or scope["method"] != "POST":
        await app(scope, receive, send)
        return None
    caller: Caller = scope["state"]["caller"]
    return caller


def count_refusal(metrics: Metrics, error: ApiError) -> None:
    """Counts a request that is refused before it reaches a route."""
    metrics.refused({408: "timeout", 413: "size"}.get(error.status, "queue"))
    metrics.request("refused", error.status)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what the server sends (the end of the connection)."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


def closing(scope: Scope, status: int) -> dict[str, str]:
    """Headers of a refusal that is sent before the body was read: a large or late rest is not read, the connection is
    closed."""
    headers: Any = Headers(scope=scope)
    declared = headers.get("content-length", "0")
    is_known = declared.isdecimal() and "transfer-encoding" not in headers
    is_small = is_known and int(declared[:20]) <= DISCARDED and status != 408
    return {} if is_small else {"connection": "close"}
