"""How much of a prompt a step reads while answers are streamed."""

from __future__ import annotations

import pytest

from forge_ray.inference.pace import FIRST_PIECE, LEAST_PIECE, Pace

pytestmark = pytest.mark.unit
ANSWERS = {"1", "2"}


class Machine:
    """A step takes `step_s`, and `token_s` more for each token of a prompt."""

    def __init__(self, step_s: float, token_s: float) -> None:
        self.now, self.step_s, self.token_s = 0.0, step_s, token_s
        self.pace = Pace(lambda: self.now)

    def steps(self, number: int, reads: bool, answering: set[str] = ANSWERS) -> float:
        """The seconds of the last of so many steps."""
        seconds = 0.0
        for _ in range(number):
            num_read = self.pace.piece if reads else 0
            self.pace.begin(answering, num_read)
            seconds = self.step_s + num_read * self.token_s
            self.now += seconds
            self.pace.end(answering)
        return seconds


def test_a_step_that_reads_takes_hardly_twice_the_time_of_one_that_does_not() -> None:
    machine = Machine(0.05, 0.001)
    assert machine.pace.piece == FIRST_PIECE
    machine.steps(5, reads=False)
    assert machine.pace.piece == FIRST_PIECE  # what a token of a prompt takes is not known yet
    assert machine.steps(4, reads=True) == pytest.approx(0.09, rel=0.03)


def test_pieces_become_smaller_as_tokens_become_dearer_and_larger_again() -> None:
    machine = Machine(0.05, 0.001)
    machine.steps(3, reads=False)
    machine.steps(3, reads=True)
    machine.token_s = 0.004
    assert machine.steps(4, reads=True) == pytest.approx(0.09, rel=0.1)
    machine.token_s = 0.05
    machine.steps(4, reads=True)
    assert machine.pace.piece == LEAST_PIECE  # a prompt is read to its end all the same
    machine.token_s = 0.0005
    machine.steps(4, reads=True)
    assert machine.pace.piece == pytest.approx(80, abs=2)


def test_time_in_which_nothing_was_answered_is_no_step() -> None:
    machine = Machine(0.05, 0.001)
    machine.steps(4, reads=False)
    machine.pace.begin({"3"}, 0)
    machine.now += 60.0  # its answer ended, and for a minute there was none
    machine.pace.end({"4"})
    machine.pace.begin({"4"}, 10)
    machine.now += 60.0
    machine.pace.end(set())
    assert machine.pace.piece == FIRST_PIECE
    machine.steps(3, reads=True)
    assert machine.pace.piece == pytest.approx(40, abs=1)


def test_one_step_that_was_held_up_changes_little() -> None:
    machine = Machine(0.05, 0.001)
    machine.steps(8, reads=False)
    machine.steps(3, reads=True)
    machine.step_s = 5.0
    machine.steps(1, reads=False)
    machine.steps(1, reads=True)
    machine.step_s = 0.05
    assert machine.pace.piece == pytest.approx(40, abs=1)
