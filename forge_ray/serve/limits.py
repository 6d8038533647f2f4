"""How much a key may ask for, and how many requests may wait (no ray).

`Counters` counts for all replicas of an endpoint, so its limits hold exactly however many there are: one instance lives in
an actor that they share, or in the process where there is only one. N per minute means: in no 60 seconds more than N.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from forge_ray.inference.engine import EngineHealth
from forge_ray.serve.access import AsgiApp, check_grant, refuse
from forge_ray.serve.keys import ApiKey
from forge_ray.serve.ledger import Ledger, Used
from forge_ray.serve.metrics import Metrics
from forge_ray.serve.openai import ApiError
from forge_ray.serve.served import Admission, Admit, Caller, Chosen, Free, admit_all

WINDOW_S = 60.0
SILENT_S = 30.0  # a replica that was not heard of for so long is dead, and what it ran is over
BUSY_RETRY_S = 1.0  # requests end at any moment; nobody knows when
TAKE_S = 2.0  # counters that do not answer for so long are done without
LOG = logging.getLogger(__name__)


@dataclass
class AdmittedRequest:
    """One request that was let in, and the tokens that it counts for; `left` once it is out of the window."""

    at: float
    tokens: int
    owner: str
    left: bool = False


@dataclass
class Usage:
    """What one key took: in the window, and what still runs."""

    window: deque[AdmittedRequest] = field(default_factory=deque)
    tokens: int = 0
    running: dict[str, AdmittedRequest] = field(default_factory=dict)


@dataclass(frozen=True)
class LimitVerdict:
    """`reason` is "" where the request is let in, else `requests`, `tokens`, `concurrency` or `size` (never possible)."""

    reason: str
    retry_after_s: float
    headers: dict[str, str]


class Counters:
    """Counts of all keys. Its methods do not wait for anything inside, so each is one step for whoever else calls."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, Usage] = {}
        self._heard: dict[str, float] = {}

    async def take(self, key: ApiKey, lease: str, owner: str, tokens: int) -> LimitVerdict:
        """Let in one request of `key` that may need `tokens` (its prompt and the longest answer), or say when to come again.

        `lease` is the request's own name; `owner` the replica that answers it. What is refused counts for nothing.
        """
        now = self._clock()
        self._heard[owner] = now
        usage = self._usage.setdefault(key.id, Usage())
        self._drop_dead(now)
        _forget(usage, now)
        reason, wait_s = self._problem(key, usage, tokens, now)
        if not reason:
            taken = usage.running[lease] = AdmittedRequest(now, tokens, owner)
            usage.window.append(taken)
            usage.tokens += tokens
        return LimitVerdict(reason, wait_s, _headers(key, usage, now))

    async def settle(self, key_id: str, lease: str, used: int) -> None:
        """The request ended, having used so many tokens; what was reserved beyond them is given back."""
        usage = self._usage.get(key_id, Usage())
        taken = usage.running.pop(lease, None)
        if taken is not None and not taken.left:
            usage.tokens += used - taken.tokens
            taken.tokens = used

    async def renew(self, owner: str) -> None:
        """A replica lives; to be called more often than every `SILENT_S`, or its running requests stop counting."""
        self._heard[owner] = self._clock()

    def _drop_dead(self, now: float) -> None:
        dead = {owner for owner, heard in self._heard.items() if heard < now - SILENT_S}
        if dead:
            for usage in self._usage.values():
                usage.running = {lease: taken for lease, taken in usage.running.items() if taken.owner not in dead}
            self._heard = {owner: heard for owner, heard in self._heard.items() if owner not in dead}

    @staticmethod
    def _problem(key: ApiKey, usage: Usage, tokens: int, now: float) -> tuple[str, float]:
        if key.tpm and tokens > key.tpm:
            return "size", 0.0
        if key.concurrency and len(usage.running) >= key.concurrency:
            return "concurrency", BUSY_RETRY_S
        if key.rpm and len(usage.window) >= key.rpm:
            return "requests", usage.window[len(usage.window) - key.rpm].at + WINDOW_S - now
        if key.tpm and (excess := usage.tokens + tokens - key.tpm) > 0:
            for taken in usage.window:
                excess -= taken.tokens
                if excess <= 0:
                    return "tokens", taken.at + WINDOW_S - now
        return "", 0.0


def _forget(usage: Usage, now: float) -> None:
    """Drop what is out of the window; it goes on running."""
    while usage.window and usage.window[0].at <= now - WINDOW_S:
        taken = usage.window.popleft()
        usage.tokens -= taken.tokens
        taken.left = True


def _headers(key: ApiKey, usage: Usage, now: float) -> dict[str, str]:
    """OpenAI's: the limit, what is left of it, and when all of it is there again."""
    reset = f"{usage.window[-1].at + WINDOW_S - now if usage.window else 0.0:.3f}s"
    kinds = (("requests", key.rpm, len(usage.window)), ("tokens", key.tpm, usage.tokens))
    return {
        f"x-ratelimit-{what}-{kind}": value
        for kind, limit, used in kinds
        if limit
        for what, value in (("limit", str(limit)), ("remaining", str(max(0, limit - used))), ("reset", reset))
    }


def admission(
    take: Callable[..., Awaitable[LimitVerdict]],
    settle: Callable[..., Awaitable[None]],
    owner: str,
    metrics: Metrics,
    ledger: Ledger | None = None,
    then: Admit = admit_all,
) -> Admit:
    """`Served.admit`: grants and limits of the caller's key, then whatever else `then` asks; what is used into the ledger.

    `take` and `settle` are those of `Counters`, or an actor's (`actor.take.remote`). Where they fail, the request is let in:
    an endpoint does not stop because its counting did.
    """

    async def admit(caller: Caller | None, chosen: Chosen, prompt_tokens: int, most_new_tokens: int) -> Admission:
        caller = caller or Caller("")
        key, tokens = caller.key, prompt_tokens + most_new_tokens
        admitted = Admitted(caller, settle, ledger)
        try:
            if key is not None:
                check_grant(caller, chosen.name)
            if key is not None and _is_limited(key):
                try:
                    verdict = await asyncio.wait_for(take(key, admitted.lease, owner, tokens), TAKE_S)
                except Exception:
                    LOG.exception("requests are not counted: the counters do not answer")
                else:
                    if verdict.reason:
                        metrics.refused(verdict.reason)
                        raise _too_much(key, verdict, tokens)
                    caller.headers |= verdict.headers
            admitted.inner = await then(caller, chosen, prompt_tokens, most_new_tokens)
        except BaseException:  # refused further on, or the client left while the counters were asked
            admitted.give_back(0)
            raise
        caller.name, caller.version, caller.prompt_tokens = chosen.name, chosen.loaded.version, prompt_tokens
        caller.admission = admitted
        return admitted

    return admit


class Admitted:
    """A request that is being answered."""

    def __init__(self, caller: Caller, settle: Callable[..., Awaitable[None]], ledger: Ledger | None) -> None:
        self.lease = secrets.token_hex(8)  # not the request id, which the client may choose
        self.inner: Admission = Free()
        self._caller, self._settle, self._ledger = caller, settle, ledger
        self._began = time.monotonic()

    def close(self, prompt_tokens: int, completion_tokens: int, status: int) -> None:
        """As `Admission`: tell the access log, the ledger and the counters. A second time does nothing."""
        caller, key = self._caller, self._caller.key
        if caller.admission is not self:
            return
        caller.admission = None
        caller.prompt_tokens, caller.completion_tokens = prompt_tokens, completion_tokens
        if self._ledger is not None:
            self._ledger.add(
                Used(
                    request_id=caller.request_id,
                    key=key.id if key else "",
                    model=caller.name,
                    model_version=caller.version,
                    prompt_tokens=prompt_tokens,
                    completion_tokens=completion_tokens,
                    status=status,
                    ms=round((time.monotonic() - self._began) * 1000),
                )
            )
        self.give_back(prompt_tokens + completion_tokens)
        self.inner.close(prompt_tokens, completion_tokens, status)

    def give_back(self, used: int) -> None:
        """Tell the counters that the request ended after `used` tokens."""
        key = self._caller.key
        if key is not None and _is_limited(key):
            task = asyncio.ensure_future(self._settle(key.id, self.lease, used))
            SETTLING.add(task)
            task.add_done_callback(_settled)


def _is_limited(key: ApiKey) -> bool:
    return bool(key.rpm or key.tpm or key.concurrency)


SETTLING: set[asyncio.Future[None]] = set()  # a loop keeps no strong reference to its tasks


def _settled(task: asyncio.Future[None]) -> None:
    SETTLING.discard(task)
    if not task.cancelled() and task.exception() is not None:
        LOG.warning("what a request used is not given back: %s", task.exception())


def _too_much(key: ApiKey, verdict: LimitVerdict, tokens: int) -> ApiError:
    match verdict.reason:
        case "size":
            # no waiting helps, and OpenAI's clients would try again
            message = f"this request may need {tokens} tokens, the key {key.id} has {key.tpm} a minute; lower max_tokens"
            return ApiError(429, message, code="rate_limit_exceeded", headers=verdict.headers | {"x-should-retry": "false"})
        case "requests":
            limit = f"{key.rpm} requests a minute"
        case "tokens":
            limit = f"{key.tpm} tokens a minute, and this request may need {tokens}"
        case _:
            limit = f"{key.concurrency} requests at once"
    message = f"the API key {key.id} has {limit}; try again in {verdict.retry_after_s:.1f} s"
    return ApiError(429, message, code="rate_limit_exceeded", headers=verdict.headers | retry_after(verdict.retry_after_s))


def retry_after(seconds: float) -> dict[str, str]:
    """In whole seconds as HTTP has it, and in milliseconds as OpenAI's clients read it first."""
    return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, math.ceil(seconds * 1000)))}


def bounded(app: AsgiApp, health: Callable[[], Iterable[EngineHealth]], most: int, metrics: Metrics) -> AsgiApp:
    """`app` with at most `most` requests that wait; one more is answered 429 before its body is read. Inside `guarded`.

    What waits is what the engines have queued, and what is on its way to them (tokenised, asking for leave).
    """
    callers: dict[int, Caller] = {}

    async def asgi(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        caller: Caller = scope["state"]["caller"]
        waiting = sum(load.num_waiting for load in health()) + sum(not other.version for other in callers.values())
        if waiting >= most:
            metrics.refused("queue")
            metrics.request("refused", 429)
            error = ApiError(
                429, f"{waiting} requests wait already; try again", code="overloaded", headers=retry_after(BUSY_RETRY_S)
            )
            await refuse(error, send, {"x-request-id": caller.request_id})
            return
        callers[id(caller)] = caller
        try:
            await app(scope, receive, send)
        finally:
            del callers[id(caller)]

    return asgi
