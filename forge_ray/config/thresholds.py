"""`eval.thresholds`: what is asked of each label of a classifier, instead of a probability of one half."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config, SettingError

ALL = "all"  # names every label that has no goal of its own


class Goal(Config):
    """What the rows of one label ask for: one of the two."""

    precision: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Least share of the texts that get the label which have it; the threshold is as low as that allows",
    )
    recall: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Least share of the texts with the label that get it; the threshold is as high as that allows",
    )

    @model_validator(mode="after")
    def _asks_for_one(self) -> Self:
        if (self.precision is None) == (self.recall is None):
            raise SettingError(
                f"precision={self.precision} and recall={self.recall}: a threshold follows from exactly one of them",
                "for example {precision: 0.95}",
            )
        return self

    @property
    def text(self) -> str:
        return f"precision {self.precision:g}" if self.precision is not None else f"recall {self.recall:g}"


def by_label(value: Any) -> Any:
    """A goal for all labels, `{precision: 0.9}`, is short for `{all: {precision: 0.9}}`."""
    is_goal = isinstance(value, dict) and bool(value) and value.keys() <= Goal.model_fields.keys()
    return {ALL: value} if is_goal and not any(isinstance(item, dict) for item in value.values()) else value


def goals_of(thresholds: dict[str, Goal], names: tuple[str, ...]) -> dict[str, Goal]:
    """Label → its goal, of the labels that have one. Raises `SettingError` for a name that is not one of `names`."""
    if unknown := [name for name in thresholds if name not in names and name != ALL]:
        raise SettingError(
            f"eval.thresholds names {unknown[0]!r}, which is not one of the labels {list(names[:8])}", "correct the name"
        )
    goals = {name: thresholds.get(name) or thresholds.get(ALL) for name in names}
    return {name: goal for name, goal in goals.items() if goal is not None}
