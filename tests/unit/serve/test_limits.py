"""Counting of what keys ask for, against a clock that the test moves; and against brute force."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from forge_ray.inference.engine import EngineHealth
from forge_ray.serve.context import Caller, Chosen, Unmetered
from forge_ray.serve.keys import ApiKey
from forge_ray.serve.limits import SILENT_S, Counters, LimitVerdict, admission, retry_after
from forge_ray.serve.metrics import Metrics
from forge_ray.serve.middleware import AdmissionMiddleware
from forge_ray.serve.openai import ApiError

pytestmark = pytest.mark.unit


def finished(step: Coroutine[Any, Any, Any]) -> Any:
    """What it gives without ever waiting: two callers cannot come between each other."""
    try:
        step.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits for something")


class Counted:
    """Counters with their clock, called as if they were not asynchronous."""

    def __init__(self, **limits: int) -> None:
        self.now, self.number = 1000.0, 0
        self.counters = Counters(lambda: self.now)
        self.key = ApiKey(id="fk_0", name="app", sha256="", models=("*",), **limits)

    def take(self, tokens: int = 1, owner: str = "r0") -> LimitVerdict:
        self.number += 1
        return finished(self.counters.take(self.key, str(self.number), owner, tokens))

    def settle(self, lease: int, used: int) -> None:
        finished(self.counters.settle(self.key.id, str(lease), used))

    def renew(self, owner: str) -> None:
        finished(self.counters.renew(owner))


def test_requests_in_any_sixty_seconds() -> None:
    counted = Counted(rpm=3)
    for second in (0, 10, 20):
        counted.now = 1000.0 + second
        assert counted.take().reason == ""
    counted.now = 1030.0
    refused = counted.take()
    assert (refused.reason, refused.retry_after_s) == ("requests", 30.0)
    counted.now = 1059.9
    assert counted.take().reason == "requests"
    counted.now = 1060.0  # the first is 60 s old; what was refused counts for nothing
    assert counted.take().reason == ""
    assert counted.take().retry_after_s == 10.0


def test_limit_of_zero_is_unlimited() -> None:
    counted = Counted()
    assert {counted.take(10**9).reason for _ in range(1000)} == {""}
    assert counted.take().headers == {}


def test_unused_reserved_tokens_are_released() -> None:
    counted = Counted(tpm=100)
    assert counted.take(60).headers["x-ratelimit-remaining-tokens"] == "40"
    refused = counted.take(50)
    assert (refused.reason, refused.retry_after_s) == ("tokens", 60.0)
    counted.settle(1, 20)
    assert counted.take(80).reason == ""
    assert counted.take(1).reason == "tokens"
    counted.settle(3, 80)
    counted.now += 60
    assert counted.take(100).reason == ""
    # an answer that outlasts the window gives nothing back that is not counted any more
    counted.now += 61
    assert counted.take(100).reason == ""
    counted.settle(5, 0)
    assert counted.take(1).reason == "tokens"


def test_retry_after_waits_until_enough_tokens_are_free() -> None:
    counted = Counted(tpm=100)
    for second, tokens in ((0, 10), (5, 20), (10, 70)):
        counted.now = 1000.0 + second
        assert counted.take(tokens).reason == ""
    counted.now = 1020.0
    assert [counted.take(tokens).retry_after_s for tokens in (10, 11, 30, 31, 100)] == [40.0, 45.0, 45.0, 50.0, 50.0]


def test_request_larger_than_the_limit_is_never_admitted() -> None:
    refused = Counted(tpm=100).take(101)
    assert (refused.reason, refused.retry_after_s) == ("size", 0.0)


def test_requests_at_once_and_replicas_that_die() -> None:
    counted = Counted(concurrency=2)
    assert [counted.take(owner=owner).reason for owner in ("r0", "r1", "r2")] == ["", "", "concurrency"]
    counted.settle(1, 1)
    assert counted.take(owner="r0").reason == ""
    assert counted.take(owner="r0").reason == "concurrency"
    counted.settle(99, 1)  # nobody's
    assert counted.take(owner="r0").reason == "concurrency"
    counted = Counted(concurrency=2)
    assert [counted.take(owner=owner).reason for owner in ("r0", "r1")] == ["", ""]
    counted.now += SILENT_S + 1
    counted.renew("r1")
    assert counted.take(owner="r2").reason == ""  # what r0 ran died with it
    assert counted.take(owner="r2").reason == "concurrency"
    counted.settle(1, 1)  # r0 was only slow: its request is not counted twice
    assert counted.take(owner="r2").reason == "concurrency"


def test_headers_are_openais() -> None:
    counted = Counted(rpm=10, tpm=1000)
    counted.take(100)
    counted.now += 15
    assert counted.take(200).headers == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "8",
        "x-ratelimit-reset-requests": "60.000s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "700",
        "x-ratelimit-reset-tokens": "60.000s",
    }
    assert retry_after(0.25) == {"retry-after": "1", "retry-after-ms": "250"}
    assert retry_after(1.2)["retry-after"] == "2"


def test_no_sixty_second_window_exceeds_the_limit_and_retry_after_suffices() -> None:
    """Random requests against the definition, spelled out."""
    draw = random.Random(7)
    counted = Counted(rpm=7, tpm=300)
    let_in: list[tuple[float, int, int]] = []  # time, tokens, lease
    for _ in range(3000):
        counted.now += draw.expovariate(1 / 4)
        if let_in and draw.random() < 0.3:
            index = draw.randrange(len(let_in))
            at, tokens, lease = let_in[index]
            if lease and at > counted.now - 60:
                counted.settle(lease, tokens // 2)
                let_in[index] = (at, tokens // 2, 0)
        tokens = draw.randint(1, 120)
        recent = [old for old in let_in if old[0] > counted.now - 60]
        fits = len(recent) < 7 and sum(old[1] for old in recent) + tokens <= 300
        verdict = counted.take(tokens)
        assert (verdict.reason == "") == fits
        if verdict.reason:
            counted.now += verdict.retry_after_s + 1e-6
            verdict = counted.take(tokens)
            if verdict.reason:  # one limit was told; the other may be what holds now
                counted.now += verdict.retry_after_s + 1e-6
                assert counted.take(tokens).reason == ""
        let_in.append((counted.now, tokens, counted.number))


# ---------------------------------------------------------------- admission

CHOSEN = Chosen("support@prod", SimpleNamespace(version="mv_1"))  # type: ignore[arg-type]


def caller(counted: Counted | None) -> Caller:
    return Caller("req_1", counted.key if counted else None)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def whole() -> Any:
        result = await coroutine
        await asyncio.sleep(0)  # what closing started
        return result

    return asyncio.run(whole())


def test_admission_reserves_and_releases() -> None:
    counted = Counted(rpm=5, tpm=100, concurrency=1)
    metrics = Metrics("bot", "r0")
    admit = admission(counted.counters.take, counted.counters.settle, "r0", metrics)

    async def use() -> None:
        asked = caller(counted)
        admitted = await admit(asked, CHOSEN, 30, 60)
        assert asked.headers["x-ratelimit-remaining-tokens"] == "10"
        assert (asked.name, asked.version) == ("support@prod", "mv_1")
        with pytest.raises(ApiError) as at_once:
            await admit(caller(counted), CHOSEN, 1, 1)
        assert (at_once.value.status, at_once.value.headers["retry-after"]) == (429, "1")  # type: ignore[index]
        admitted.close(30, 5, 499)
        assert asked.completion_tokens == 5
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="may need 101 tokens") as size:
            await admit(caller(counted), CHOSEN, 41, 60)
        assert size.value.headers["x-should-retry"] == "false"  # type: ignore[index]
        await admit(caller(counted), CHOSEN, 5, 60)  # 35 were used, so 65 are left

    asyncio.run(use())
    assert 'reason="concurrency"} 1.0' in metrics.text()


def test_no_grant_is_the_same_as_no_such_model() -> None:
    counted = Counted(rpm=5)
    other = counted.key.model_copy(update={"models": ("team-*",)})
    admit = admission(counted.counters.take, counted.counters.settle, "r0", Metrics("bot", "r0"))
    with pytest.raises(ApiError, match="not served here") as refused:
        run(admit(Caller("req_1", other), CHOSEN, 1, 1))
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")


def test_requests_are_admitted_when_the_counters_do_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(*_: Any) -> Any:
        raise ConnectionError("the actor is gone")

    async def use() -> None:
        admitted = await admission(broken, broken, "r0", Metrics("bot", "r0"))(caller(Counted(rpm=1)), CHOSEN, 1, 1)
        admitted.close(1, 1, 200)
        await asyncio.sleep(0.01)

    asyncio.run(use())
    assert "requests are not counted" in caplog.text
    assert "the tokens that a request reserved are not released: the actor is gone" in caplog.text


def test_refusal_by_the_next_check_releases_the_reservation() -> None:
    counted = Counted(concurrency=1, tpm=100)

    async def closed(*_: Any) -> Unmetered:
        raise ApiError(503, "closed")

    admit = admission(counted.counters.take, counted.counters.settle, "r0", Metrics("bot", "r0"), then=closed)

    async def use() -> None:
        for _ in range(3):
            with pytest.raises(ApiError, match="closed"):
                await admit(caller(counted), CHOSEN, 10, 90)
            await asyncio.sleep(0)

    asyncio.run(use())


def test_client_that_leaves_during_admission_releases_the_reservation() -> None:
    counted = Counted(concurrency=1)

    async def slow(*arguments: Any) -> LimitVerdict:
        verdict = await counted.counters.take(*arguments)
        await asyncio.sleep(10)
        return verdict

    async def use() -> None:
        metrics = Metrics("bot", "r0")
        asking = asyncio.create_task(admission(slow, counted.counters.settle, "r0", metrics)(caller(counted), CHOSEN, 1, 1))
        await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0)
        await admission(counted.counters.take, counted.counters.settle, "r0", metrics)(caller(counted), CHOSEN, 1, 1)

    asyncio.run(use())


# ---------------------------------------------------------------- the queue


def test_queue_limit_counts_queued_and_incoming_requests() -> None:
    waiting = 0
    answers: list[int] = []
    entered, go_on = 0, asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal entered
        entered += 1
        await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask(guard: Any, method: str = "POST", version: str = "") -> None:
        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answers.append(message["status"])

        scope = {"type": "http", "method": method, "state": {"caller": Caller("r", version=version)}}
        await guard(scope, None, send)

    async def use() -> None:
        nonlocal waiting
        states = lambda: [EngineHealth(True, "", 5, waiting), EngineHealth(True, "", 0, 1)]  # noqa: E731
        guard = AdmissionMiddleware(app, states, 3, metrics)
        first = [asyncio.create_task(ask(guard)) for _ in range(5)]
        await asyncio.sleep(0)
        assert (entered, answers) == (2, [429] * 3)  # 1 waits in an engine, 2 are on their way
        generating = [asyncio.create_task(ask(guard, version="mv_1"))]
        await asyncio.sleep(0)
        assert answers == [429] * 4
        waiting = 2
        looking = asyncio.create_task(ask(guard, "GET"))
        await asyncio.sleep(0)
        assert entered == 3  # only POST is bounded
        go_on.set()
        await asyncio.gather(*first, *generating, looking)
        assert answers.count(200) == 3
        await ask(guard)
        assert answers[-1] == 429
        waiting = 1
        await ask(guard, version="mv_1")
        await ask(guard)  # those that ended, and those that the engine has, are not counted
        assert answers[-2:] == [200, 200]

    metrics = Metrics("bot", "r0")
    asyncio.run(use())
    assert 'reason="queue"} 5.0' in metrics.text()
