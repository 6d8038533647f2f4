"""The training step on a machine with torch alone: no Ray, no DeepSpeed"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge_ray.train.job import TrainJob

pytestmark = pytest.mark.numerics

BLOCKED = """
import importlib.metadata, json, sys
from importlib.machinery import PathFinder

HIDDEN = ("ray", "deepspeed")
distribution = importlib.metadata.distribution

class WithoutHidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)

def visible(name):
    if name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)

importlib.metadata.distribution = visible
sys.meta_path[:] = [WithoutHidden if finder is PathFinder else finder for finder in sys.meta_path]
from forge_ray.train.loop import train_loop
from forge_ray.train import launch
from forge_ray.train.job import TrainJob

launch.fit(train_loop, TrainJob.from_json(json.load(open(sys.argv[1]))))
assert "ray" not in sys.modules and "deepspeed" not in sys.modules
"""


def losses(job: TrainJob) -> list[float]:
    text = job.store.read(f"runs/{job.run}/metrics.jsonl").decode()
    return [json.loads(line)["loss"] for line in text.splitlines()]


def test_trains_without_ray_and_deepspeed(jobs: Callable[..., TrainJob], run: Callable[..., str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"engine": "torch", "zero_stage": 0, "scaling": {"num_workers": 0}, "adapter": {"r": 4}}
    bare, usual = jobs("bare", **settings), jobs("bare-usual", **settings)
    file = tmp_path / "job.json"
    file.write_text(json.dumps(bare.to_json()))
    done = subprocess.run([sys.executable, "-c", BLOCKED, str(file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert bare.store.is_published("runs/bare/export")
    run(usual)
    assert losses(bare) == losses(usual)
