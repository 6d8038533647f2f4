"""What a run says while it goes on: `metrics.jsonl`, one object a step, and the loss curve."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
CURVE = "loss.png"


class StepClock:
    """Splits the wall time of a step: `wait` for data, `compute`, `checkpoint`. Seconds; cleared by `take`."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] = self._spent.get(part, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        spent, self._spent = self._spent, {}
        return spent


def append(folder: Path, values: dict[str, Any]) -> None:
    """One line, one write: a reader never sees half of it. The half line of a killed process is closed first."""
    line = json.dumps(values, separators=(",", ":")) + "\n"
    with (folder / METRICS).open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            line = line if stream.read(1) == b"\n" else "\n" + line
        stream.write(line.encode())


def read(path: Path) -> list[dict[str, Any]]:
    """`parse` of a file; nothing where there is none yet."""
    return parse(path.read_text(encoding="utf-8")) if path.is_file() else []


def parse(written: str) -> list[dict[str, Any]]:
    """One line per step, the last that was written. After a resume from step s, the abandoned steps after s are dropped."""
    lines: list[dict[str, Any]] = []
    for text in written.splitlines(keepends=True):
        if not text.endswith("\n"):
            break  # being written
        try:
            value = json.loads(text)
        except ValueError:
            continue  # its writer was killed
        while lines and value["step"] <= lines[-1]["step"]:
            lines.pop()
        lines.append(value)
    return lines


def plot(lines: list[dict[str, Any]], path: Path, title: str, loss: str) -> None:
    """Training and validation loss over steps, as PNG. `loss`: what it is of (`config.method.loss_name`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    axes.plot(*zip(*train, strict=True), color="#2563eb", linewidth=1.4, label="train")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="#dc2626", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel=loss, title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
