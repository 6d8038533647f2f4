"""The short kill matrix; `python tests/e2e/kill_matrix.py --kills 20` is the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

ADAPTER = ("--set", "train.adapter={dropout: 0.1}")


def killed(*options: str) -> dict[str, Any]:
    script = Path(__file__).with_name("kill_matrix.py")
    done = subprocess.run([sys.executable, str(script), "--json", *options], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr[-4000:]
    assert done.stdout, done.stderr[-4000:]
    assert '{"run"' in done.stdout, done.stderr[-4000:]  # else it ended with a message
    report: dict[str, Any] = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    assert report["same_weights"]
    assert report["same_order"]
    return report


def test_run_with_a_killed_controller_is_bit_identical() -> None:
    """One kill of the controller; tests/ray/test_train.py kills a rank, the long matrix everything."""
    report = killed("--kills", "1", "--kinds", "controller", "--steps", "12", "--seed", "1", *ADAPTER)
    assert report["steps_compared"] == 12
    assert sum(kill["pid"] > 0 for kill in report["kills"]) == 1
    assert len(report["starts_of_workers"]) >= 2
    assert report["starts_of_workers"] == sorted(report["starts_of_workers"])


@pytest.mark.large
def test_run_with_a_killed_driver_and_controller_is_bit_identical() -> None:
    report = killed("--kills", "2", "--kinds", "driver,controller", "--steps", "30", "--seed", "1", *ADAPTER)
    assert sum(kill["pid"] > 0 for kill in report["kills"]) == 2
    assert "restart" in report["incidents"]
    assert len(report["starts_of_workers"]) >= 3


@pytest.mark.large
@pytest.mark.parametrize(
    "options",
    [
        ("train.zero_stage=2", "train.adapter={dropout: 0.1}"),
        ("train.zero_stage=3",),
        ("train.zero_stage=1",),
    ],
    ids=["zero2-lora", "zero3-full", "zero1-full"],
)
def test_long_kill_matrix(options: tuple[str, ...]) -> None:
    report = killed("--kills", "20", "--steps", "200", *(part for option in options for part in ("--set", option)))
    print(json.dumps(report, indent=1))
    assert sum(kill["pid"] > 0 for kill in report["kills"]) >= 18
