"""The piece of a prompt in a step takes about as long as the answers' own part, by what steps took."""

from __future__ import annotations

import pytest

from forge_ray.inference.pacing import LEAST_TOKENS, StepPace

pytestmark = pytest.mark.unit


def stepped(pace: StepPace, clock: list[float], num_answers: int, num_prompt_tokens: int, seconds: float) -> None:
    pace.begin()
    pace.plan(num_answers, num_prompt_tokens)
    clock[0] += seconds
    pace.end()


def test_piece_of_a_prompt_takes_as_long_as_the_answers() -> None:
    clock = [0.0]
    pace = StepPace(lambda: clock[0])
    assert pace.tokens(8, 512) == 512  # nothing is measured yet
    stepped(pace, clock, 8, 0, 0.04)
    stepped(pace, clock, 8, 504, 0.04 + 504 * 0.001)
    assert pace.tokens(8, 512) in (47, 48)
    assert pace.tokens(0, 512) == 512  # nobody waits for the step
    for _ in range(40):  # a machine on which a prompt costs little
        stepped(pace, clock, 8, 504, 0.04 + 504 * 0.00001)
    assert pace.tokens(8, 512) == 512
    for _ in range(40):
        stepped(pace, clock, 8, 504, 0.04 + 504 * 0.1)
    assert pace.tokens(8, 512) == 8 + LEAST_TOKENS  # never none


def test_steps_that_wait_for_work_are_not_measured() -> None:
    clock = [0.0]
    pace = StepPace(lambda: clock[0])
    stepped(pace, clock, 8, 0, 0.04)
    stepped(pace, clock, 8, 504, 0.04 + 504 * 0.001)
    pace.begin()
    clock[0] += 100
    pace.end()
    assert pace.tokens(8, 512) in (47, 48)
