"""The kill matrix: in the quick suite, tests/ray/test_train.py kills a rank and the controller of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.large, pytest.mark.timeout(1800)]

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


def test_run_with_a_killed_driver_and_controller_is_bit_identical() -> None:
    report = killed("--kills", "2", "--kinds", "driver,controller", "--steps", "30", "--seed", "1", *ADAPTER)
    assert sum(kill["pid"] > 0 for kill in report["kills"]) == 2
    assert "restart" in report["incidents"]
    assert len(report["starts_of_workers"]) >= 3


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
