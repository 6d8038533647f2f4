"""How many tokens of prompts a step reads while answers are streamed: so many that it hardly takes twice as long (no torch).

A step that reads a long prompt holds up every answer. What a step takes that only continues answers, and what a token of a
prompt adds to it, is measured as steps pass: the latter grows with the tokens that were read before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

FIRST_PIECE, LEAST_PIECE = 32, 8
LONG_PROMPT = 256  # tokens; shorter ones are read at once, several in a step: that holds up answers once, for a moment
STEPS_KEPT, PIECES_KEPT = 15, 3
MOST_ADDED = 0.8  # of a step's time, so that with what a machine does besides hardly any step takes twice its time


class Pace:
    """Of one engine. `end` and `begin` are called between two steps, with the requests that are `answering` by then."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._step_s: deque[float] = deque(maxlen=STEPS_KEPT)  # of steps that only continue answers
        self._token_s: deque[float] = deque(maxlen=PIECES_KEPT)  # what a token of a prompt adds
        self._begun_at = 0.0
        self._answering: set[str] = set()
        self._num_read = 0

    @property
    def piece(self) -> int:
        if not self._step_s or not self._token_s:
            return FIRST_PIECE
        return max(LEAST_PIECE, int(MOST_ADDED * median(self._step_s) / max(median(self._token_s), 1e-6)))

    def end(self, answering: set[str]) -> None:
        """A step ended, if one of its answers is `answering` still: else the engine may have been idle since."""
        seconds = self._clock() - self._begun_at
        if not self._answering & answering:
            return
        if not self._num_read:
            self._step_s.append(seconds)
        elif self._step_s:
            self._token_s.append(max(0.0, seconds - median(self._step_s)) / self._num_read)

    def begin(self, answering: set[str], num_read: int) -> None:
        """A step begins that continues these answers and reads so many tokens of prompts."""
        self._begun_at, self._answering, self._num_read = self._clock(), answering, num_read
