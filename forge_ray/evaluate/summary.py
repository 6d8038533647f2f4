"""Scores of a report: of all items, of each class or field, of each slice (pure)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from forge_ray.config.classify import OF_ALL_CLASSES, normalise
from forge_ray.evaluate.class_measures import by_class
from forge_ray.evaluate.measures import class_scores, field_scores, is_general, statistics

OTHER = "(other)"


def summarise(
    items: Sequence[dict[str, Any]], labels: Sequence[str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(metrics, per class; per field where the answers are objects)."""
    metrics = {name: statistic.value for name, statistic in statistics(items, labels).items()}
    chats = [item for item in items if "kind" not in item]
    if chats and all("predicted" in item for item in chats):
        return metrics, by_class(chats)
    per_class = {label: class_scores(chats, label) for label in labels} if chats else {}
    return metrics, per_class or field_scores(chats)


def slice_scores(
    items: Sequence[dict[str, Any]], labels: Sequence[str], slices: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """kind of slice → its value → scores of the items there and their `count`. A reference outside the label set is in the
    slice `(other)`; only chats that end in a text have labels."""
    per_slice: dict[str, dict[str, dict[str, float]]] = {}
    for kind in slices:
        groups: dict[str, list[dict[str, Any]]] = {}
        for item in items:
            if (value := slice_of(item, kind, labels)) is not None:
                groups.setdefault(value, []).append(item)
        per_slice[kind] = {}
        for of, group in sorted(groups.items()):
            scores = {name: score for name, score in summarise(group, labels)[0].items() if name not in OF_ALL_CLASSES}
            per_slice[kind][of] = scores | {"count": float(len(group))}
    return per_slice


def slice_of(item: dict[str, Any], kind: str, labels: Sequence[str]) -> str | None:
    """The slice of a kind that an item is in; None where it is in none, as general rows are."""
    if is_general(item):
        return None
    if kind == "source":
        return str(item["source"])
    if "kind" in item:
        return None
    reference = normalise(item["reference"])
    return reference if reference in labels else OTHER


def only_finite(
    metrics: dict[str, float], per_slice: dict[str, dict[str, dict[str, float]]]
) -> tuple[dict[str, float], dict[str, dict[str, dict[str, float]]], tuple[str, ...]]:
    """(metrics, per slice, names of what was left out): NaN has no JSON, and a model that diverged has a report too."""
    undefined = [name for name, value in metrics.items() if not math.isfinite(value)]
    kept: dict[str, dict[str, dict[str, float]]] = {}
    for kind, values in per_slice.items():
        kept[kind] = {}
        for of, scores in values.items():
            undefined += [f"{kind}:{of}:{name}" for name, value in scores.items() if not math.isfinite(value)]
            kept[kind][of] = {name: value for name, value in scores.items() if math.isfinite(value)}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}, kept, tuple(undefined)
