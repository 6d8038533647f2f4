"""When a request would begin, and whether that is soon enough: admission by expected wait (no ray, no torch).

A *seat* is one sequence in an engine or on its way there. An engine begins its sequences in the order in which they come, so
that the work ahead of a new one over the rates just measured is its wait. All of it is counted here, as answers pass: no
engine is asked, so that a refusal waits for none. Two rates hold for every engine: seconds per token of a prompt, which it
reads one after the other (a token of a long one takes longer: it attends to more, and is read in pieces), and seconds per
token of an answer, of which it makes `num_slots` at once.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from forge_ray.inference.pace import LONG_PROMPT

FIRST_STEP_S, FIRST_PROMPT_TOKEN_S, FIRST_TOKENS_PER_CHARACTER = 0.05, 0.001, 0.25  # until the first answer is measured
STEPS_KEPT, PROMPT_TOKENS_KEPT, ANSWER_TOKENS_KEPT = 512, 4096, 8192  # how far back the means go
CHARACTERS_KEPT = 1 << 16
# A sequence that has not begun so many steps, and seconds, after it should have: the engine's cache is full. Steps of small
# models are short, and a busy machine holds up some of them
OVERDUE_STEPS, OVERDUE_S = 10, 1.0


@dataclass
class MovingMean:
    """Mean of an amount per unit over about the last `kept` units; at first `total`, which one unit soon outweighs."""

    kept: float
    total: float
    num_units: float = 1.0

    def add(self, amount: float, num_units: float) -> None:
        self.total += amount
        self.num_units += num_units
        if self.num_units > self.kept:
            self.total, self.num_units = self.total / 2, self.num_units / 2

    @property
    def per_unit(self) -> float:
        return self.total / self.num_units


@dataclass(eq=False)
class Seat:
    """One sequence: `num_prompt` tokens to read, at most `max_new` to make, of which `num_new` are made. `sent_at`: when the
    engine got it; `last_at`: when the newest token came. None before that."""

    holder: str
    num_prompt: int
    max_new: int
    sent_at: float | None = None
    num_new: int = 0
    last_at: float | None = None


@dataclass(frozen=True)
class ExpectedWait:
    """`wait_s`: by how much later the last of a request's sequences begins than if it were alone; `own_s`: what the request
    takes alone, in a batch as full as now."""

    wait_s: float
    own_s: float


class EngineSeats:
    """The seats of one engine, in the order of their arrival, and its rates."""

    def __init__(self, num_slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_slots, self._clock = num_slots, clock
        self._seats: dict[Seat, None] = {}
        self._step_s = MovingMean(STEPS_KEPT, FIRST_STEP_S)
        self._prompt_s = {is_long: MovingMean(PROMPT_TOKENS_KEPT, FIRST_PROMPT_TOKEN_S) for is_long in (False, True)}
        self._share_used = MovingMean(ANSWER_TOKENS_KEPT, 1.0)  # of the longest answer that a request allows
        self._num_in_use = num_slots
        self._open_since = 0.0  # when the engine could begin the first seat that waits

    def expected(self, asked: Sequence[Seat]) -> ExpectedWait:
        """Of a request with these sequences, if it came now."""
        alone_begin_s, alone_end_s = self._last_of([0.0] * self._num_slots, 0.0, asked)
        running, waiting = self._split()
        num_slots = self._slots_in_use(running, waiting)
        if not waiting and len(running) + len(asked) <= num_slots:
            return ExpectedWait(0.0, alone_end_s)
        reading_s = min(self._open_for(waiting[0]), self._reading_s(waiting[0])) if waiting else 0.0
        free_s = [self._rest_s(seat) for seat in running]
        free_s += [-reading_s] * (num_slots - len(running))
        heapq.heapify(free_s)
        begin_s, _ = self._last_of(free_s, -reading_s, [*waiting, *asked])
        return ExpectedWait(max(0.0, begin_s - alone_begin_s), alone_end_s)

    def enter(self, seat: Seat) -> None:
        """It is on its way, before it is tokenised."""
        self._seats[seat] = None

    def send(self, seat: Seat) -> None:
        """It goes to the engine now, behind those that went before."""
        seat.sent_at = self._clock()
        self._seats.pop(seat, None)
        self._seats[seat] = None

    def made(self, seat: Seat, num_tokens: int) -> None:
        """So many more tokens of the sequence arrived."""
        now = self._clock()
        if seat.last_at is None:
            self._prompt_s[seat.num_prompt > LONG_PROMPT].add(self._open_for(seat), seat.num_prompt)
            self._open_since = now
        else:
            self._step_s.add(now - seat.last_at, num_tokens)
        seat.num_new += num_tokens
        seat.last_at = now

    def leave(self, seat: Seat) -> None:
        """The sequence ended, or its client left; a second call does nothing."""
        if seat not in self._seats:
            return
        running, waiting = self._split()
        if waiting and len(running) >= self._slots_in_use(running, waiting):
            self._open_since = self._clock()
        del self._seats[seat]
        if not self._seats:
            self._num_in_use = self._num_slots
        if seat.num_new:
            self._share_used.add(seat.num_new, seat.max_new)

    def waiting_by_holder(self) -> Counter[str]:
        return Counter(seat.holder for seat in self._seats if seat.last_at is None)

    def _split(self) -> tuple[list[Seat], list[Seat]]:
        """Those that make tokens, and those that do not yet: in the order of the engine, then those on their way to it."""
        running = [seat for seat in self._seats if seat.last_at is not None]
        waiting = [seat for seat in self._seats if seat.last_at is None]
        return running, sorted(waiting, key=lambda seat: seat.sent_at is None)

    def _slots_in_use(self, running: Sequence[Seat], waiting: Sequence[Seat]) -> int:
        """How many sequences the engine runs at once: fewer than its slots where its cache is full of long ones. Then the
        first that waits has not begun when it should have; that is remembered until more run at once, or none."""
        if running and waiting:
            late_s = self._open_for(waiting[0]) - 2 * self._reading_s(waiting[0])
            if late_s > max(OVERDUE_STEPS * self._step_s.per_unit, OVERDUE_S):
                self._num_in_use = len(running)
        self._num_in_use = max(self._num_in_use, len(running))
        return self._num_in_use

    def _open_for(self, seat: Seat) -> float:
        """For how long the engine could have read the prompt of this seat, the first that waits."""
        return 0.0 if seat.sent_at is None else self._clock() - max(seat.sent_at, self._open_since)

    def _reading_s(self, seat: Seat) -> float:
        return self._prompt_s[seat.num_prompt > LONG_PROMPT].per_unit * seat.num_prompt

    def _rest_s(self, seat: Seat) -> float:
        return self._share_used.per_unit * max(0, seat.max_new - seat.num_new) * self._step_s.per_unit

    def _last_of(self, free_s: list[float], prompts_read_s: float, seats: Sequence[Seat]) -> tuple[float, float]:
        """Begin and end of the last of `seats`, in seconds from now; `free_s`: a heap of when each slot is free."""
        begin_s = end_s = 0.0
        for seat in seats:
            begin_s = max(free_s[0], prompts_read_s)
            prompts_read_s = begin_s + self._reading_s(seat)
            end_s = max(prompts_read_s, 0.0) + self._rest_s(seat)
            heapq.heapreplace(free_s, end_s)
        return begin_s, end_s


@dataclass(frozen=True)
class RequestSeats:
    """The seats of one request, a sequence each, in the order of its choices."""

    engine: EngineSeats
    seats: tuple[Seat, ...]

    def enter(self) -> RequestSeats:
        for seat in self.seats:
            self.engine.enter(seat)
        return self

    def send(self) -> RequestSeats:
        for seat in self.seats:
            self.engine.send(seat)
        return self

    def leave(self) -> None:
        """All of them; a second call does nothing."""
        for seat in self.seats:
            self.engine.leave(seat)


class Seating:
    """The seats of all engines of a replica, and how many tokens a text has."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._engines: WeakKeyDictionary[object, EngineSeats] = WeakKeyDictionary()
        self._tokens = MovingMean(CHARACTERS_KEPT, FIRST_TOKENS_PER_CHARACTER)

    def of(self, engine: object, num_slots: int) -> EngineSeats:
        """The seats of an engine that runs `num_slots` sequences at once."""
        if (seats := self._engines.get(engine)) is None:
            seats = self._engines[engine] = EngineSeats(num_slots, self._clock)
        return seats

    def tokens_of(self, num_characters: int) -> int:
        """About how many tokens so many characters have, as texts had before."""
        return round(num_characters * self._tokens.per_unit)

    def tokenised(self, num_characters: int, num_tokens: int) -> None:
        self._tokens.add(num_tokens, num_characters)


def late_by(expected: ExpectedWait, holder: str, waiting: Counter[str], share: float, least_s: float) -> float:
    """Seconds by which the request's wait is longer than it may be; 0 for one that is admitted.

    It may wait `share` of its own time, or `least_s`; twice that where its caller has less than an equal share of those that
    wait, so that the others' next requests do not keep it out.
    """
    others = waiting.keys() - {holder}
    has_less = bool(others) and waiting[holder] * (len(others) + 1) < waiting.total()
    may_wait_s = max(share * expected.own_s, least_s) * (2 if has_less else 1)
    return max(0.0, expected.wait_s - may_wait_s)
