"""Admission by expected wait against an engine of known speed, on a clock that the test moves."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from forge_ray.serve.seating import EngineSeats, ExpectedWait, Seat, late_by

pytestmark = pytest.mark.unit

STEP_S, PROMPT_TOKEN_S = 0.04, 0.002


@dataclass
class SimulatedEngine:
    """Slots that make a token each `step_s`, first come first served; prompts are read one after the other. `cache`: the
    most sequences that fit at once, which the seats are not told."""

    num_slots: int
    cache: int = 1 << 10
    now: float = 0.0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    queue: list[tuple[Seat, int, Callable[[], None]]] = field(default_factory=list)
    begun: list[Seat] = field(default_factory=list)
    num_running: int = 0
    is_reading: bool = False
    number: int = 0

    def __post_init__(self) -> None:
        self.seats = EngineSeats(self.num_slots, lambda: self.now)

    def at(self, when: float, what: Callable[[], None]) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, what))

    def run_until(self, end: float) -> None:
        while self.events and self.events[0][0] <= end:
            self.now, _, what = heapq.heappop(self.events)
            what()
        self.now = end

    def submit(self, seat: Seat, num_tokens: int, done: Callable[[], None] = lambda: None) -> None:
        self.seats.send(seat)
        self.queue.append((seat, num_tokens, done))
        self._begin()

    def _begin(self) -> None:
        if not self.queue or self.is_reading or self.num_running >= min(self.num_slots, self.cache):
            return
        seat, num_tokens, done = self.queue.pop(0)
        self.begun.append(seat)
        self.num_running += 1
        self.is_reading = True
        self.at(self.now + PROMPT_TOKEN_S * seat.num_prompt, lambda: self._first(seat, num_tokens, done))

    def _first(self, seat: Seat, num_tokens: int, done: Callable[[], None]) -> None:
        self.is_reading = False
        self._token(seat, num_tokens, done)
        self._begin()

    def _token(self, seat: Seat, left: int, done: Callable[[], None]) -> None:
        self.seats.made(seat, 1)
        if left > 1:
            self.at(self.now + STEP_S, lambda: self._token(seat, left - 1, done))
            return
        self.num_running -= 1
        self.seats.leave(seat)
        done()
        self._begin()


def seat_of(holder: str = "a", num_prompt: int = 50, max_new: int = 64) -> Seat:
    return Seat(holder, num_prompt, max_new)


def warmed(num_slots: int, cache: int = 1 << 10) -> SimulatedEngine:
    """An engine that has answered a few requests alone, so that its speed was measured."""
    engine = SimulatedEngine(num_slots, cache)
    for _ in range(8):
        engine.submit(seat_of(), 64)
        engine.run_until(engine.now + 10)
    return engine


@dataclass
class Pressed:
    own_s: list[float] = field(default_factory=list)
    num_refused: int = 0


def pressed(engine: SimulatedEngine, clients: int, seconds: float, share: float, least_s: float = 0.0) -> Pressed:
    """So many clients, each with one request after the other, which try a refused one again after half a second."""
    randomly, result, end = random.Random(0), Pressed(), engine.now + seconds

    def client(number: int) -> None:
        if engine.now >= end:
            return
        seat, started = seat_of(), engine.now
        expected = engine.seats.expected([seat])
        if late_by(expected, "a", engine.seats.waiting_by_holder(), share, least_s):
            result.num_refused += 1
            engine.at(engine.now + 0.5, lambda: client(number))
            return

        def done() -> None:
            result.own_s.append(engine.now - started)
            engine.at(engine.now + 0.001, lambda: client(number))

        engine.submit(seat, randomly.randint(48, 64), done)

    for number in range(clients):
        engine.at(engine.now + randomly.random() / 10, lambda number=number: client(number))  # type: ignore[misc]
    engine.run_until(end)
    return result


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def test_rates_are_measured_and_the_wait_is_when_the_engine_begins() -> None:
    engine = warmed(4)
    alone = engine.seats.expected([seat_of()])
    assert alone.wait_s == 0.0
    assert alone.own_s == pytest.approx(50 * PROMPT_TOKEN_S + 64 * STEP_S, rel=0.03)
    for number in range(9):
        engine.submit(seat_of(str(number)), 64)
        engine.run_until(engine.now + 0.3)
    asked = seat_of("asked")
    wait_s, came = engine.seats.expected([asked]).wait_s, engine.now
    begun = []
    engine.submit(asked, 64)
    while asked not in engine.begun:
        engine.run_until(engine.now + 0.01)
    begun = [seat.holder for seat in engine.begun[-10:]]
    assert begun == [*map(str, range(9)), "asked"]  # in the order in which they came
    assert wait_s == pytest.approx(engine.now - came, rel=0.1)


def test_request_is_always_admitted_where_nothing_runs_and_where_the_batch_has_a_slot() -> None:
    engine = warmed(4)
    longest = [seat_of(max_new=100_000, num_prompt=10_000) for _ in range(9)]
    assert engine.seats.expected(longest).wait_s == 0.0  # more choices than slots: it waits for itself alone
    for _ in range(3):
        engine.submit(seat_of(), 64)
        engine.run_until(engine.now + 0.3)
    assert engine.seats.expected([seat_of(max_new=1)]).wait_s == 0.0
    assert engine.seats.expected([seat_of()] * 2).wait_s > 0.5  # the second choice has none


def test_answers_shorter_than_they_may_be_are_expected_to_be_so_again() -> None:
    engine = warmed(1)
    for _ in range(200):
        engine.submit(seat_of(max_new=1024), 32)
        engine.run_until(engine.now + 3)
    own_s = engine.seats.expected([seat_of(max_new=1024)]).own_s
    assert own_s == pytest.approx(32 * STEP_S + 50 * PROMPT_TOKEN_S, rel=0.1)


def test_four_times_the_load_leaves_the_p99_below_twice_and_the_slots_full() -> None:
    calm = pressed(warmed(8), 8, 120, share=0.5)
    loaded = pressed(warmed(8), 64, 120, share=0.5)
    unbounded = pressed(warmed(8), 16, 120, share=1e9)
    assert not calm.num_refused
    assert loaded.num_refused > 1000
    assert p99(loaded.own_s) < 1.7 * p99(calm.own_s)
    assert p99(unbounded.own_s) > 1.9 * p99(calm.own_s)  # what a bound of 8 on their number gives
    assert len(loaded.own_s) > 0.97 * len(unbounded.own_s)


def test_cache_that_holds_fewer_than_the_slots_is_noticed() -> None:
    engine = warmed(64, cache=4)
    calm = pressed(engine, 4, 60, share=0.5)
    pressed(engine, 32, 20, share=0.5)  # the first of them come before anything shows
    loaded = pressed(engine, 32, 120, share=0.5)
    assert p99(loaded.own_s) < 2.0 * p99(calm.own_s)
    assert loaded.num_refused > 500


def test_machine_that_is_held_up_for_a_moment_is_not_taken_for_a_full_cache() -> None:
    """A small model makes a token in some milliseconds; ten steps are no sign there."""
    now = 0.0
    seats = EngineSeats(64, lambda: now)
    first, second = seat_of(num_prompt=10), seat_of(num_prompt=10)
    seats.send(first)
    for _ in range(200):
        now += 0.005
        seats.made(first, 1)
    seats.send(second)
    now += 0.8  # another process takes the cores; 160 steps
    assert seats.expected([seat_of()]).wait_s == 0.0
    now += 0.8
    assert seats.expected([seat_of()]).wait_s > 0.0


def test_long_prompt_makes_no_short_one_expected_to_be_slow() -> None:
    now = 0.0
    seats = EngineSeats(8, lambda: now)

    def read(num_prompt: int, seconds: float) -> None:
        nonlocal now
        seat = seat_of(num_prompt=num_prompt)
        seats.send(seat)
        now += seconds
        seats.made(seat, 1)
        seats.leave(seat)

    for _ in range(50):
        read(32, 0.032)
    expected_s = seats.expected([seat_of(num_prompt=32)]).own_s
    read(4000, 16.0)
    assert seats.expected([seat_of(num_prompt=32)]).own_s == pytest.approx(expected_s, rel=0.01)
    assert seats.expected([seat_of(num_prompt=4000)]).own_s > 15.0


def test_retry_after_is_when_the_same_request_is_admitted() -> None:
    engine = warmed(2)
    for _ in range(3):
        engine.submit(seat_of(), 64)
    late_s = late_by(engine.seats.expected([seat_of()]), "a", Counter(), 0.5, 0.0)
    assert 1 < late_s < 4
    engine.run_until(engine.now + 0.9 * late_s)
    assert late_by(engine.seats.expected([seat_of()]), "a", Counter(), 0.5, 0.0)
    engine.run_until(engine.now + 0.2 * late_s)
    assert not late_by(engine.seats.expected([seat_of()]), "a", Counter(), 0.5, 0.0)


def test_clients_that_leave_free_their_seats_and_a_slow_reader_holds_none() -> None:
    engine = warmed(1)
    first, second = seat_of(), seat_of()
    engine.submit(first, 64)
    engine.seats.send(second)
    full = engine.seats.expected([seat_of()]).wait_s
    engine.seats.leave(second)
    engine.seats.leave(second)
    assert engine.seats.expected([seat_of()]).wait_s < 0.6 * full
    engine.seats.leave(first)
    assert engine.seats.expected([seat_of()]).wait_s == 0.0


@pytest.mark.parametrize(
    ("waiting", "late_s"),
    [
        ({}, 1.0),
        ({"own": 5}, 1.0),  # nobody else waits
        ({"others": 5}, 0.0),  # who has less than an equal share may wait twice as long
        ({"own": 1, "others": 5}, 0.0),
        ({"own": 3, "others": 3}, 1.0),
        ({"own": 2, "others": 3, "more": 3}, 0.0),
    ],
)
def test_caller_with_less_than_an_equal_share_may_wait_twice_as_long(waiting: dict[str, int], late_s: float) -> None:
    assert late_by(ExpectedWait(3.0, 4.0), "own", Counter(waiting), 0.5, 0.0) == late_s
    assert late_by(ExpectedWait(5.0, 4.0), "own", Counter(waiting), 0.5, 0.0) > 0
    assert late_by(ExpectedWait(0.4, 0.1), "own", Counter(waiting), 0.5, 0.5) == 0  # short in any case
