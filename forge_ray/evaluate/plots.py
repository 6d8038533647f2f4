"""Pictures of a report, as PNG (matplotlib on first use)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forge_ray.config.classify import normalise
from forge_ray.evaluate.class_measures import reliability
from forge_ray.evaluate.summary import OTHER


def _figure(size: float) -> tuple[Any, Any]:
    """(figure, its axes), `size` inches wide and high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size, size), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def plot_reliability(items: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Share that is right by confidence, of each target of a classifier; on the diagonal the two are equal."""
    figure, axes = _figure(4.5)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for name in dict.fromkeys(name for item in items for name in item["targets"]):
        points = reliability(items, name)
        axes.plot([one[0] for one in points], [one[1] for one in points], marker="o", markersize=3, label=name)
    axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.savefig(path)


def plot_confusion(items: Sequence[dict[str, Any]], labels: Sequence[str], path: Path, title: str) -> None:
    """Reference by prediction, as PNG; answers outside the label set are one column."""
    columns = [*labels, OTHER]
    counts = [[0] * len(columns) for _ in labels]
    for item in items:
        reference, prediction = normalise(item["reference"]), normalise(item["prediction"])
        if reference in labels:
            column = columns.index(prediction) if prediction in labels else len(labels)
            counts[list(labels).index(reference)][column] += 1
    size = max(4.0, 0.45 * len(columns) + 2)
    figure, axes = _figure(size)
    axes.imshow(counts, cmap="Blues")
    high = max(map(max, counts), default=0)
    for row, values in enumerate(counts):
        for column, value in enumerate(values):
            if value:
                colour = "white" if value > high / 2 else "black"
                axes.text(column, row, str(value), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(xlabel="prediction", ylabel="reference")
    axes.set_title(title, fontsize=9)
    figure.savefig(path)
