"""Rate limits of API keys, and admission of requests under them (no ray).

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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from forge_ray.serve.access import check_grant
from forge_ray.serve.context import Admission, Admit, Caller, Chosen, Count, Unmetered, admit_all
from forge_ray.serve.keys import ApiKey
from forge_ray.serve.ledger import Ledger, Used
from forge_ray.serve.metrics import Metrics
from forge_ray.serve.openai import ApiError

WINDOW_S = 60.0
SILENT_S = 30.0  # a replica that has not reported for this long is dead, and the requests that it ran have ended
BUSY_RETRY_S = 1.0  # requests end at any moment; nobody knows when
TAKE_S = 2.0  # the request is admitted uncounted if the counters do not answer within this
LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class AdmittedRequest:
    """One admitted request, and the tokens that it counts for; `left` once it is out of the window."""

    at: float
    tokens: int
    owner: str
    left: bool = False


@dataclass
class Usage:
    """The admitted requests of one key: those in the window, and those that still run."""

    window: deque[AdmittedRequest] = field(default_factory=deque)
    tokens: int = 0
    running: dict[str, AdmittedRequest] = field(default_factory=dict)


@dataclass(frozen=True)
class LimitVerdict:
    """`reason` is "" for an admitted request, else `requests`, `tokens`, `concurrency` or `size` (never admitted)."""

    reason: str
    retry_after_s: float
    headers: dict[str, str]


class Counters:
    """Counts of all keys. No method awaits anything, so each call is atomic on the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, Usage] = {}
        self._heard: dict[str, float] = {}

    async def take(self, key: ApiKey, lease: str, owner: str, tokens: int) -> LimitVerdict:
        """Admit one request of `key` that may need `tokens` (its prompt and the longest answer), or say when to retry.

        `lease` names the request, `owner` the replica that answers it. A refused request does not count. A lease that runs
        already is the same request, of which more is known now: its tokens.
        """
        now = self._clock()
        self._heard[owner] = now
        usage = self._usage.setdefault(key.id, Usage())
        self._drop_dead(now)
        _forget(usage, now)
        if lease in usage.running:
            return self._grow(key, usage, lease, tokens, now)
        reason, wait_s = self._problem(key, usage, tokens, now)
        if not reason:
            request = usage.running[lease] = AdmittedRequest(now, tokens, owner)
            usage.window.append(request)
            usage.tokens += tokens
        return LimitVerdict(reason, wait_s, _headers(key, usage, now))

    def _grow(self, key: ApiKey, usage: Usage, lease: str, tokens: int, now: float) -> LimitVerdict:
        request = usage.running[lease]
        reason, wait_s = self._token_problem(key, usage, tokens - (0 if request.left else request.tokens), tokens, now)
        if reason:
            del usage.running[lease]
            if not request.left:
                usage.window.remove(request)
                usage.tokens -= request.tokens
        elif not request.left:
            usage.tokens += tokens - request.tokens
            request.tokens = tokens
        return LimitVerdict(reason, wait_s, _headers(key, usage, now))

    async def settle(self, key_id: str, lease: str, used: int) -> None:
        """The request ended after `used` tokens; those that were reserved beyond them are released."""
        usage = self._usage.get(key_id, Usage())
        request = usage.running.pop(lease, None)
        if request is not None and not request.left:
            usage.tokens += used - request.tokens
            request.tokens = used

    async def renew(self, owner: str) -> None:
        """A replica is alive. Call it more often than every `SILENT_S`, or the replica's running requests stop counting."""
        self._heard[owner] = self._clock()

    def _drop_dead(self, now: float) -> None:
        dead = {owner for owner, heard in self._heard.items() if heard < now - SILENT_S}
        if dead:
            for usage in self._usage.values():
                usage.running = {lease: request for lease, request in usage.running.items() if request.owner not in dead}
            self._heard = {owner: heard for owner, heard in self._heard.items() if owner not in dead}

    @classmethod
    def _problem(cls, key: ApiKey, usage: Usage, tokens: int, now: float) -> tuple[str, float]:
        if key.tpm and tokens > key.tpm:
            return "size", 0.0
        if key.concurrency and len(usage.running) >= key.concurrency:
            return "concurrency", BUSY_RETRY_S
        if key.rpm and len(usage.window) >= key.rpm:
            return "requests", usage.window[len(usage.window) - key.rpm].at + WINDOW_S - now
        return cls._token_problem(key, usage, tokens, tokens, now)

    @staticmethod
    def _token_problem(key: ApiKey, usage: Usage, more: int, tokens: int, now: float) -> tuple[str, float]:
        """Whether `more` tokens, of a request of `tokens`, exceed the key's limit."""
        if key.tpm and tokens > key.tpm:
            return "size", 0.0
        if key.tpm and (excess := usage.tokens + more - key.tpm) > 0:
            for request in usage.window:
                excess -= request.tokens
                if excess <= 0:
                    return "tokens", request.at + WINDOW_S - now
        return "", 0.0


def _forget(usage: Usage, now: float) -> None:
    """Drop the requests that are out of the window; those that run continue to run."""
    while usage.window and usage.window[0].at <= now - WINDOW_S:
        request = usage.window.popleft()
        usage.tokens -= request.tokens
        request.left = True


def _headers(key: ApiKey, usage: Usage, now: float) -> dict[str, str]:
    """OpenAI's headers: each limit, what remains of it, and when all of it is available again."""
    reset = f"{usage.window[-1].at + WINDOW_S - now if usage.window else 0.0:.3f}s"
    kinds = (("requests", key.rpm, len(usage.window)), ("tokens", key.tpm, usage.tokens))
    return {
        f"x-ratelimit-{what}-{kind}": value
        for kind, limit, used in kinds
        if limit
        for what, value in (("limit", str(limit)), ("remaining", str(max(0, limit - used))), ("reset", reset))
    }


def counting(
    take: Callable[..., Awaitable[LimitVerdict]],
    settle: Callable[..., Awaitable[None]],
    owner: str,
    metrics: Metrics,
) -> Count:
    """A `ServingContext.count`. The first call for a request counts it, later ones only raise its tokens.

    `take` and `settle` are those of `Counters`, or an actor's (`actor.take.remote`). If they fail, the request is admitted:
    an endpoint does not stop because its counting did.
    """

    async def count(caller: Caller, tokens: int) -> None:
        key = caller.key
        if key is None or not _is_limited(key):
            return
        caller.lease = caller.lease or secrets.token_hex(8)  # not the request id, which the client may choose
        caller.settle = lambda used: _report(settle(key.id, caller.lease, used))
        try:
            verdict = await asyncio.wait_for(take(key, caller.lease, owner, tokens), TAKE_S)
        except Exception:
            LOG.exception("requests are not counted: the counters do not answer")
            return
        if verdict.reason:
            caller.settle = None
            metrics.refused(verdict.reason)
            raise _too_much(key, verdict, tokens)
        # what is left of requests is what was left when this one was counted, and not after those counted since
        counted = {name: value for name, value in caller.headers.items() if name.endswith("requests")}
        caller.headers |= verdict.headers | counted

    return count


def end_counting(caller: Caller, used: int) -> None:
    """Report to the counters, once, that the request ended after `used` tokens."""
    settle, caller.settle = caller.settle, None
    if settle is not None:
        settle(used)


def admission(
    take: Callable[..., Awaitable[LimitVerdict]],
    settle: Callable[..., Awaitable[None]],
    owner: str,
    metrics: Metrics,
    ledger: Ledger | None = None,
    then: Admit = admit_all,
) -> Admit:
    """A `ServingContext.admit` that checks grants and limits of the caller's key, then asks `then`; it records the use.

    `take` and `settle`: see `counting`.
    """
    count = counting(take, settle, owner, metrics)

    async def admit(caller: Caller, chosen: Chosen, prompt_tokens: int, max_new_tokens: int) -> Admission:
        metered = Metered(caller, ledger)
        try:
            if caller.key is not None:
                check_grant(caller, chosen.name)
            await count(caller, prompt_tokens + max_new_tokens)
            metered.inner = await then(caller, chosen, prompt_tokens, max_new_tokens)
        except BaseException:  # refused further on, or the client left while the counters were asked
            end_counting(caller, 0)
            raise
        caller.name, caller.version, caller.prompt_tokens = chosen.name, chosen.loaded.version, prompt_tokens
        caller.admission = metered
        return metered

    return admit


class Metered:
    """An admission whose use goes to the access log, the ledger and the counters."""

    def __init__(self, caller: Caller, ledger: Ledger | None) -> None:
        self.inner: Admission = Unmetered()
        self._caller, self._ledger = caller, ledger
        self._started = time.monotonic()

    def close(self, prompt_tokens: int, completion_tokens: int, status: int) -> None:
        """Record what was used; only the first call does anything."""
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
                    ms=round((time.monotonic() - self._started) * 1000),
                )
            )
        end_counting(caller, prompt_tokens + completion_tokens)
        self.inner.close(prompt_tokens, completion_tokens, status)


def _report(settling: Awaitable[None]) -> None:
    task = asyncio.ensure_future(settling)
    SETTLING.add(task)
    task.add_done_callback(_settled)


def _is_limited(key: ApiKey) -> bool:
    return bool(key.rpm or key.tpm or key.concurrency)


SETTLING: set[asyncio.Future[None]] = set()  # a loop keeps no strong reference to its tasks


def _settled(task: asyncio.Future[None]) -> None:
    SETTLING.discard(task)
    if not task.cancelled() and task.exception() is not None:
        LOG.warning("the tokens that a request reserved are not released: %s", task.exception())


def _too_much(key: ApiKey, verdict: LimitVerdict, tokens: int) -> ApiError:
    match verdict.reason:
        case "size":
            # waiting does not help, and OpenAI's clients would retry
            message = (
                f"this request may need {tokens} tokens, the key {key.id} is limited to {key.tpm} a minute; lower max_tokens"
            )
            return ApiError(429, message, code="rate_limit_exceeded", headers=verdict.headers | {"x-should-retry": "false"})
        case "requests":
            limit = f"{key.rpm} requests a minute"
        case "tokens":
            limit = f"{key.tpm} tokens a minute, and this request may need {tokens}"
        case _:
            limit = f"{key.concurrency} requests at once"
    message = f"the API key {key.id} is limited to {limit}; try again in {verdict.retry_after_s:.1f} s"
    return ApiError(429, message, code="rate_limit_exceeded", headers=verdict.headers | retry_after(verdict.retry_after_s))


def retry_after(seconds: float) -> dict[str, str]:
    """HTTP's header, in whole seconds, and the one in milliseconds that OpenAI's clients prefer."""
    return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, math.ceil(seconds * 1000)))}
