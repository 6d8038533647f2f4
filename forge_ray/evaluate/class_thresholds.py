"""Thresholds of a classifier's labels: the probability from which a label holds, for a stated precision or recall (pure).

They are chosen on the validation rows, of probabilities after temperature scaling, and measured on the evaluated ones. A
label's rows are those that have a label of its target; each label is judged by itself, of a `single` target too.

    precision p   the lowest probability t such that, of the rows with at least t, a share of p or more has the label
    recall r      the highest probability t such that, of the rows with the label, a share of r or more has at least t
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from forge_ray.config.thresholds import Goal
from forge_ray.data.dataset.labels import ABSENT
from forge_ray.evaluate.chance import Floats


@dataclass(frozen=True)
class Thresholds:
    """By label: probabilities from which it holds, and what was asked for and is not reached, with the best that is."""

    values: Mapping[str, float] = field(default_factory=dict)
    unreached: Mapping[str, str] = field(default_factory=dict)


def chosen(goals: Mapping[str, Goal], names: tuple[str, ...], shares: Floats, truth: Floats) -> Thresholds:
    """`shares` [n, C] of the validation rows by class `names`, `truth` [n, C] of 1, 0 and `ABSENT`."""
    values, unreached = {}, {}
    for name, goal in goals.items():
        column = names.index(name)
        asked = truth[:, column] != ABSENT
        threshold, why = _threshold(goal, shares[asked, column], truth[asked, column] == 1)
        if threshold is None:
            unreached[name] = f"{goal.text}: {why}"
        else:
            values[name] = threshold
    return Thresholds(values, unreached)


def _threshold(goal: Goal, shares: Floats, holds: np.ndarray) -> tuple[float | None, str]:
    """(threshold, "") or (None, why not)."""
    if not holds.any():
        return None, "no validation row has the label"
    order = np.argsort(-shares, kind="stable")
    ranked, hits = shares[order], np.cumsum(holds[order])
    is_last = np.append(ranked[1:] != ranked[:-1], True)  # of equal probabilities: they hold together or not at all
    thresholds, right, taken = ranked[is_last], hits[is_last], np.flatnonzero(is_last) + 1
    if goal.recall is not None:
        return float(thresholds[right / holds.sum() >= goal.recall][0]), ""
    precision = right / taken
    reached = thresholds[precision >= goal.precision]
    if not len(reached):
        return None, f"the highest on {len(shares)} validation rows is {precision.max():.3g}"
    return float(reached[-1]), ""


def measured(
    thresholds: Mapping[str, float], names: tuple[str, ...], shares: Floats, truth: Floats
) -> dict[str, dict[str, float]]:
    """Label → its threshold, and the precision and recall with it on rows as those of `chosen`; 0 where there are none."""
    scores = {}
    for name, threshold in thresholds.items():
        column = names.index(name)
        asked = truth[:, column] != ABSENT
        gets, holds = shares[asked, column] >= threshold, truth[asked, column] == 1
        both = float((gets & holds).sum())
        scores[name] = {
            "threshold": threshold,
            "precision_at_threshold": both / gets.sum() if gets.any() else 0.0,
            "recall_at_threshold": both / holds.sum() if holds.any() else 0.0,
        }
    return scores
