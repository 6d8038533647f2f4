"""Items of a classifier → scores (pure): labels by class, and whether its probabilities can be believed.

An item has, besides `reference` and `prediction`, `true` and `predicted` (names of classes), `probabilities` by class, and
`targets`: for each target null where the row has no label of it, else `reference`, `prediction`, `confidence` (the
probability of the prediction after temperature scaling; of a `multi` target that of each of its labels, on the side
predicted) and `raw_confidence` (before it), and whether each of these is `right`.

    ece                 sum over 15 bins of equal width of |confidence - share that is right|, weighted by rows
                        (M. P. Naeini et al., AAAI 2015); `ece_uncalibrated`: the same before temperature scaling
    average_precision   area under precision by recall, mean over the classes that occur
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.evaluate.chance import Floats, Statistic, share

Items = Sequence[dict[str, Any]]
BINS = 15


def class_statistics(items: Items) -> dict[str, Statistic]:
    """Metric → its statistic, of items of a classifier; several targets have one of each by their names."""
    names = list(dict.fromkeys(name for item in items for name in item["targets"]))
    by_metric = {"macro_f1": macro_f1(*matrices(items)), "average_precision": _average_precision(items)}
    for name in names:
        prefix = f"{name}_" if len(names) > 1 else ""
        answers = _of_target(items, name)
        if not answers:  # of these rows, as of a slice
            continue
        if prefix:
            by_metric[f"{prefix}accuracy"] = share([one["prediction"] == one["reference"] for one in answers])
        by_metric[f"{prefix}ece"] = _calibration(answers, "confidence")
        by_metric[f"{prefix}ece_uncalibrated"] = _calibration(answers, "raw_confidence")
    return by_metric


def matrices(items: Items) -> tuple[Floats, Floats]:
    """(actual, predicted) of classes: fp64 [n, C] of 0 and 1."""
    names = classes_of(items)
    actual, predicted = (
        np.array([[name in item[side] for name in names] for item in items], np.float64) for side in ("true", "predicted")
    )
    return actual, predicted


def classes_of(items: Items) -> list[str]:
    return list(dict.fromkeys(name for item in items for name in (*item["probabilities"], *item["true"])))


def macro_f1(actual: Floats, predicted: Floats) -> Statistic:
    """Mean of F1 over the classes that occur; [n, C] each."""

    def of(counts: Floats) -> Floats:
        support = counts @ actual
        total = support + counts @ predicted
        f1 = np.divide(2 * (counts @ (actual * predicted)), total, out=np.zeros_like(total), where=total > 0)
        mean: Floats = (f1 * (support > 0)).sum(axis=1) / np.maximum(1, (support > 0).sum(axis=1))
        return mean

    return Statistic(float(of(np.ones((1, len(actual))))[0]), len(actual), of)


def by_class(items: Items) -> dict[str, dict[str, float]]:
    """Class → precision, recall, F1 and support."""
    scores = {}
    for name in classes_of(items):
        predicted, actual = ([name in item[side] for item in items] for side in ("predicted", "true"))
        both = sum(p and a for p, a in zip(predicted, actual, strict=True))
        precision, recall = (both / sum(side) if any(side) else 0.0 for side in (predicted, actual))
        f1 = 2 * both / (sum(predicted) + sum(actual)) if both else 0.0
        scores[name] = {"precision": precision, "recall": recall, "f1": f1, "support": float(sum(actual))}
    return scores


def reliability(items: Items, name: str) -> list[tuple[float, float, int]]:
    """(mean confidence, share that is right, number) of each bin that is not empty, of a target."""
    confidence, right, _ = _answers(_of_target(items, name), "confidence")
    bins = _bins(confidence)
    return [
        (float(confidence[bins == number].mean()), float(right[bins == number].mean()), int((bins == number).sum()))
        for number in np.unique(bins).tolist()
    ]


def _of_target(items: Items, name: str) -> list[dict[str, Any]]:
    """What the items that have a label of a target say of it."""
    return [answer for item in items if (answer := item["targets"].get(name)) is not None]


def _answers(answers: Items, column: str) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """(confidence, whether right, which answer it is of): one of a single target, one a label of others."""
    rows = [(p, bool(ok), at) for at, one in enumerate(answers) for p, ok in zip(one[column], one["right"], strict=True)]
    confidence, right, owner = (np.array([row[place] for row in rows]) for place in range(3))
    return confidence.astype(np.float64), right.astype(np.float64), owner.astype(np.int64)


def _bins(confidence: Floats) -> npt.NDArray[np.int64]:
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def _calibration(answers: Items, column: str) -> Statistic:
    confidence, right, owner = _answers(answers, column)
    gaps = np.zeros((len(answers), BINS))  # of an answer, what it adds to the gap of each bin
    np.add.at(gaps, (owner, _bins(confidence)), confidence - right)
    sizes = np.bincount(owner, minlength=len(answers)).astype(np.float64)

    def of(counts: Floats) -> Floats:
        error: Floats = np.abs(counts @ gaps).sum(axis=1) / (counts @ sizes)
        return error

    return Statistic(float(of(np.ones((1, len(answers))))[0]), len(answers), of)


def _average_precision(items: Items) -> Statistic:
    """Of a class, over the rows that have a label of its target. Ties of probabilities count in the order of the items."""
    names = classes_of(items)
    targets = list(dict.fromkeys(target for item in items for target in item["targets"]))
    of_target = {name: name.partition("/")[0] if len(targets) > 1 else targets[0] for name in names}
    asked = np.array([[item["targets"].get(of_target[name]) is not None for name in names] for item in items], np.float64)
    actual, _ = matrices(items)
    scores = np.array([[item["probabilities"].get(name, 0.0) for name in names] for item in items])
    orders = np.argsort(-scores, axis=0, kind="stable")

    def of(counts: Floats) -> Floats:
        total, present = np.zeros(len(counts)), np.zeros(len(counts))
        for column in range(len(names)):
            ranked = counts[:, orders[:, column]] * asked[orders[:, column], column]
            hits = np.cumsum(ranked * actual[orders[:, column], column], axis=1)
            seen = np.cumsum(ranked, axis=1)
            precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
            positives = hits[:, -1]
            area = (precision * ranked * actual[orders[:, column], column]).sum(axis=1)
            total += np.divide(area, positives, out=np.zeros_like(area), where=positives > 0)
            present += positives > 0
        mean: Floats = total / np.maximum(present, 1)
        return mean

    return Statistic(float(of(np.ones((1, len(items))))[0]), len(items), of)
