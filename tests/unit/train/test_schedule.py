"""Learning rate and number of steps: pure functions of the step."""

from __future__ import annotations

from typing import Any

import pytest

from forge_ray.config.base import parse
from forge_ray.config.optimizer import Schedule
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError
from forge_ray.train.schedule import learning_rate, num_steps

pytestmark = pytest.mark.unit


def rates(total: int, peak: float = 1.0, **settings: Any) -> list[float]:
    schedule = parse(Schedule, settings)
    return [learning_rate(step, total, peak, schedule) for step in range(total)]


def test_linear_warmup_reaches_peak_and_starts_above_zero() -> None:
    curve = rates(100, peak=2.0, warmup_ratio=0.1)
    assert curve[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(curve) == curve[9] == curve[10] == 2.0


def test_cosine_is_halfway_at_midpoint_and_ends_at_floor() -> None:
    curve = rates(101, warmup_ratio=0, min_lr_ratio=0.1)
    assert (curve[0], curve[-1]) == (1.0, pytest.approx(0.1))
    assert curve[50] == pytest.approx(0.55)
    assert curve == sorted(curve, reverse=True)


def test_linear_schedule_decays_by_constant_amount() -> None:
    curve = rates(11, name="linear", warmup_ratio=0, min_lr_ratio=0.0)
    assert curve == pytest.approx([1 - step / 10 for step in range(11)])


def test_constant_schedule_keeps_peak() -> None:
    assert set(rates(20, name="constant", warmup_ratio=0)) == {1.0}


def test_wsd_is_stable_between_warmup_and_linear_decay() -> None:
    curve = rates(100, name="wsd", warmup_ratio=0.1, decay_ratio=0.2, min_lr_ratio=0.0)
    assert curve[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert set(curve[9:80]) == {1.0}
    assert curve[80:] == pytest.approx([1 - (step + 1) / 20 for step in range(20)])
    assert rates(100, name="wsd", min_lr_ratio=0.1)[-1] == pytest.approx(0.1)
    assert rates(10, name="wsd", warmup_ratio=0, decay_ratio=1) == rates(10, name="linear", warmup_ratio=0)
    assert rates(10, name="wsd", warmup_ratio=0.5, decay_ratio=0.5)[4:6] == [1.0, pytest.approx(0.82)]


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"decay_ratio": 0.2}, "decay_ratio=0.2 has no effect with name=cosine", "set train.schedule.name=wsd"),
        ({"name": "wsd", "warmup_ratio": 0.6, "decay_ratio": 0.5}, "warmup_ratio=0.6 .* are more than all steps", "at 1"),
    ],
)
def test_decay_ratio_that_cannot_be_honoured_is_refused(settings: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse(Schedule, settings)
    assert hint in error.value.hint


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_learning_rate_is_positive_in_short_runs(name: str, total: int) -> None:
    for ratio in (0.0, 0.03, 0.5, 0.9 if name == "wsd" else 1.0):
        assert all(0 < rate <= 1 for rate in rates(total, name=name, warmup_ratio=ratio))


def test_learning_rate_stays_at_floor_after_last_step() -> None:
    assert learning_rate(500, 100, 1.0, Schedule()) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [
        ({"epochs": 1}, 80, 10),
        ({"epochs": 1}, 81, 11),  # nothing is dropped: the last batch runs into the next epoch
        ({"epochs": 0.5}, 80, 5),
        ({"epochs": 2.5}, 80, 25),
        ({"epochs": 0.001}, 80, 1),
        ({"epochs": 3, "max_steps": 4}, 80, 4),
        ({"epochs": 1, "max_steps": 400}, 80, 10),
    ],
)
def test_number_of_steps(settings: dict[str, Any], rows: int, steps: int) -> None:
    assert num_steps(parse(TrainConfig, {"global_batch": 8} | settings), rows) == steps
