"""How much of a prompt one step reads while answers are under way: a share of the step that the answers do not notice.

A step makes a token for every answer and reads a piece of the prompts that wait. A piece as large as the memory allows would
let all answers wait for it; here it takes about as long as the answers' own part, by what the last steps took.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers.generation.continuous_batching.requests import RequestStatus

LEAST_TOKENS = 16  # a prompt is read however slow it is
NEWEST = 0.2  # the weight of the last step in the means


class StepPace:
    """Means of the generation thread's steps: seconds of one without prompts, and those that a token of a prompt adds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._answers_s: float | None = None
        self._prompt_token_s: float | None = None
        self._began = 0.0
        self._num_answers = self._num_prompt_tokens = 0

    def tokens(self, num_answers: int, most: int) -> int:
        """The tokens that the next step may have, with one of each answer that is under way."""
        if not num_answers or self._answers_s is None or self._prompt_token_s is None:
            return most
        piece = int(self._answers_s / self._prompt_token_s)
        return min(most, num_answers + max(LEAST_TOKENS, piece))

    def begin(self) -> None:
        self._num_answers = self._num_prompt_tokens = 0
        self._began = self._clock()

    def plan(self, num_answers: int, num_prompt_tokens: int) -> None:
        """What the step that has begun will do."""
        self._num_answers, self._num_prompt_tokens = num_answers, num_prompt_tokens

    def end(self) -> None:
        """The step ended; one without a plan waited for work, and is not counted."""
        seconds = self._clock() - self._began
        if self._num_answers and not self._num_prompt_tokens:
            self._answers_s = _newer(self._answers_s, seconds)
        elif self._num_prompt_tokens >= LEAST_TOKENS:
            added_s = max(seconds - (self._answers_s or 0.0 if self._num_answers else 0.0), 0.01 * seconds)
            self._prompt_token_s = _newer(self._prompt_token_s, added_s / self._num_prompt_tokens)


def _newer(mean: float | None, value: float) -> float:
    return value if mean is None else mean + NEWEST * (value - mean)


def paced(scheduler: Any, pace: StepPace) -> Callable[[int, int], Any]:
    """The scheduler's `schedule_batch` with a budget of tokens by the pace of the last steps."""
    schedule = scheduler.schedule_batch

    def schedule_batch(token_budget: int, cache_budget: int) -> Any:
        num_answers = sum(state.status == RequestStatus.DECODING for state in scheduler.active_requests.values())
        planned = schedule(pace.tokens(num_answers, token_budget), cache_budget)
        lengths = [request.query_length for request in planned[0] or ()]
        num_prompt_tokens = sum(length for length in lengths if length > 1)
        pace.plan(sum(length == 1 for length in lengths), num_prompt_tokens)
        return planned

    return schedule_batch
