"""The metrics file of a run that was killed, resumed, and is being written; and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge_ray.config.method import loss_name
from forge_ray.train import metrics

pytestmark = pytest.mark.unit


def write(folder: Path, *steps: int) -> Path:
    for number, step in enumerate(steps):
        metrics.append(folder, {"step": step, "loss": 1 / step, "written": number})
    return folder / metrics.METRICS


def test_one_line_per_step_in_order(tmp_path: Path) -> None:
    assert [line["step"] for line in metrics.read(write(tmp_path, 1, 2, 3))] == [1, 2, 3]


def test_missing_file_reads_as_empty(tmp_path: Path) -> None:
    assert metrics.read(tmp_path / metrics.METRICS) == []


def test_resume_drops_abandoned_steps(tmp_path: Path) -> None:
    """Killed in step 6 and resumed from 3, then again from 2: each step once, the last attempt's."""
    lines = metrics.read(write(tmp_path, 1, 2, 3, 4, 5, 4, 5, 6, 3, 4))
    assert [(line["step"], line["written"]) for line in lines] == [(1, 0), (2, 1), (3, 8), (4, 9)]


def test_repeated_step_is_read_once(tmp_path: Path) -> None:
    """Checkpoint at 2, killed after the line of step 3, resumed: step 3 comes again at once."""
    lines = metrics.read(write(tmp_path, 1, 2, 3, 3, 4))
    assert [(line["step"], line["written"]) for line in lines] == [(1, 0), (2, 1), (3, 3), (4, 4)]


def test_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path, 1, 2)
    with path.open("a") as stream:
        stream.write('{"step": 3, "lo')
    assert [line["step"] for line in metrics.read(path)] == [1, 2]


def test_lines_after_truncated_line_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, 1, 2)
    with path.open("a") as stream:
        stream.write('{"step": 3, "lo')
    metrics.append(tmp_path, {"step": 3, "loss": 0.5})
    metrics.append(tmp_path, {"step": 4, "loss": 0.4})
    assert [line["step"] for line in metrics.read(path)] == [1, 2, 3, 4]


def test_step_clock_accumulates_and_resets(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 1.0, 3.5, 4.0, 4.25])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    clock = metrics.StepClock()
    for part in ("wait", "compute", "wait"):
        with clock.measure(part):
            pass
    assert clock.take() == {"wait": 1.25, "compute": 2.5}
    assert clock.take() == {}


def test_plot_writes_png(tmp_path: Path) -> None:
    lines = [json.loads(f'{{"step": {step}, "loss": {3 / step}}}') for step in range(1, 9)]
    lines[3]["validation_loss"] = 1.0
    for number, chosen in enumerate((lines, lines[:1])):
        path = tmp_path / f"{number}.png"
        metrics.plot(chosen, path, "a run", loss_name("dpo"))
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert path.stat().st_size > 4000
