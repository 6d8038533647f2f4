"""What follows from validations: the best, when to stop, what stays on disk, what a task is asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forge_ray.config.base import parse
from forge_ray.config.train import EarlyStopping, TrainConfig
from forge_ray.errors import ConfigError
from forge_ray.store.files import Store
from forge_ray.train import validation
from forge_ray.train.validation import Result, Validations, best, open_validations, why_stop

pytestmark = pytest.mark.unit
RUN = "run_1"


def scores(*losses: float) -> list[Result]:
    return [Result(10 * number, loss=loss) for number, loss in enumerate(losses, 1)]


def test_best_is_first_lowest_finite_loss() -> None:
    lowest = best([*scores(3.0, 2.0, float("nan"), 2.0), Result(50, problem="killed"), Result(60)])
    assert lowest is not None
    assert lowest.step == 20
    assert best([Result(10), Result(20, loss=float("inf"))]) is None


@pytest.mark.parametrize(
    ("losses", "rule", "words"),
    [
        ((3.0, 2.0, 2.0), {"patience": 2}, ""),
        ((3.0, 2.0, 2.0, 2.1), {"patience": 2}, "2.1 at step 40"),
        ((3.0, 2.95, 2.91, 2.85), {"patience": 2, "min_delta": 0.1}, "2.91 at step 30"),  # a slow fall adds up to nothing
        ((3.0, 2.95, 2.85, 2.8), {"patience": 2, "min_delta": 0.1}, ""),
        ((3.0, float("nan"), float("nan")), {"patience": 2}, "nan at step 30"),
        ((3.0, 4.0, 5.0), None, ""),
    ],
)
def test_early_stopping_rule(losses: tuple[float, ...], rule: dict[str, Any] | None, words: str) -> None:
    why = why_stop(scores(*losses), EarlyStopping(**rule) if rule else None)
    assert words in why
    assert bool(words) == bool(why)


def attempt(store: Store, monkeypatch: pytest.MonkeyPatch, first_step: int = 0, **settings: Any) -> Validations:
    monkeypatch.setattr(validation, "agree", lambda value, context: value)
    config = parse(
        TrainConfig,
        {
            "validation": {"every_steps": 10, "background": True, **settings},
            "checkpoint": {"every_steps": 10},
        },
    )
    job: Any = SimpleNamespace(store=store, run=RUN, config=config)
    context: Any = SimpleNamespace(is_first=True, under_ray=True)
    return open_validations(job, context, first_step, 60, lambda step: "")


def test_one_background_validation_at_a_time_protects_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    validations = attempt(store, monkeypatch)
    assert [validations.ask(step) for step in (5, 10, 10, 20)] == [False, True, False, False]
    assert validation.protected(store, RUN, keep_best=False) == {10}
    validation.write(store, RUN, Result(10, loss=float("inf"), background=True))
    assert validation.protected(store, RUN, keep_best=True) == set()
    assert [validations.ask(step) for step in (30, 60)] == [True, True]  # the last one is never left out
    validation.write(store, RUN, Result(30, loss=2.0, background=True))
    assert validation.protected(store, RUN, keep_best=True) == {30, 60}
    again = attempt(store, monkeypatch, first_step=20)  # what lies behind it is done again
    assert [result.step for result in validation.read(store, RUN)] == [10]
    assert again.ask(20)


def test_background_validation_triggers_early_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "LOOK_EVERY_S", 0.0)
    store = Store(str(tmp_path))
    validations = attempt(store, monkeypatch, early_stopping={"patience": 1})
    validation.write(store, RUN, Result(10, loss=2.0, background=True))
    assert not validations.wants_stop()
    validation.write(store, RUN, Result(20, loss=2.5, background=True))
    assert validations.wants_stop()
    validations.stop()
    assert "2.5 at step 20" in validations.why
    resumed = attempt(store, monkeypatch, first_step=27, early_stopping={"patience": 1})
    assert (resumed.last_step, bool(resumed.why)) == (27, True)
    assert resumed.due(27)
    assert attempt(store, monkeypatch, first_step=10, early_stopping={"patience": 1}).last_step == 60


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"validation": {"background": True, "every_steps": 10}}, "must be a multiple of checkpoint.every_steps=0"),
        (
            {"validation": {"keep_best": True, "every_steps": 15}, "checkpoint": {"every_steps": 10}},
            "every_steps=15 must be",
        ),
        ({"export_step": "best"}, "train.export_step=best needs a checkpoint at every validation"),
        ({"validation": {"early_stopping": {}}}, "early_stopping needs periodic validation"),
        ({"validation": {"early_stopping": {}, "every_steps": 5, "max_rows": 0}}, "validation.max_rows is 0"),
        (
            {
                "validation": {"background": True, "every_steps": 10},
                "checkpoint": {"every_steps": 10},
                "scaling": {"num_workers": 0},
            },
            "needs Ray",
        ),
    ],
)
def test_contradictory_validation_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse(TrainConfig, settings)
    assert caught.value.hint


def test_validation_changes_run_id_only_when_it_affects_weights() -> None:
    def identity(**settings: Any) -> dict[str, Any]:
        return parse(TrainConfig, settings | {"checkpoint": {"every_steps": 5}}).identity()

    looked = {"every_steps": 5, "keep_best": True}
    assert identity(validation=looked, sinks=["tensorboard"]) == identity()
    assert identity(validation=looked | {"early_stopping": {}}) != identity(validation=looked)
    assert identity(validation=looked, export_step="best") != identity(
        validation=looked | {"every_steps": 10}, export_step="best"
    )
