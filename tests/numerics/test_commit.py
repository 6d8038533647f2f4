"""The commit of a checkpoint: whatever happens while it is written or afterwards, the newest whole one is what is found."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forge_ray.records import canonical_json
from forge_ray.store import paths
from forge_ray.store.files import MANIFEST, Store
from forge_ray.train import checkpoint

HERE = Path(__file__).parent
pytestmark = pytest.mark.numerics


@pytest.mark.parametrize(("way", "code"), [("die", 9), ("full", 1)])
def test_crash_at_any_write_leaves_the_newest_whole_checkpoint(way: str, code: int, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(HERE / "crash.py"), str(tmp_path), way],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    points = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(points) >= 12  # a folder, two files in six pieces, the manifest, the rename, what is removed
    assert {point["code"] for point in points} <= {code, 0}
    assert sum(point["code"] == code for point in points) >= 11
    for point in points:
        assert point["kept"] == (6 if point["published"] else 4), point
        assert point["again"] == 0, point
        assert point["then"] == 6, point
        assert point["steps"] == [6, 4], point
    assert {point["kept"] for point in points if point["code"] == code} >= {4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("commit")
    script = "import sys, crash, pathlib; print([crash.in_a_child(pathlib.Path(sys.argv[1]), s, -1, '') for s in (2, 4)])"
    run = subprocess.run(
        [sys.executable, "-c", script, str(folder)], cwd=HERE, capture_output=True, text=True, timeout=120, check=True
    )
    assert "(0, " in run.stdout
    return folder


def start() -> checkpoint.Position:
    return checkpoint.Position(0, 0, "", 1, "run_crash", "sha256:c", "ds_a", "sha256:b", "torch", 0, 1)


def test_every_flipped_bit_and_truncation_is_detected(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen, store = random.Random(0), Store(str(saved))
    folder = saved / paths.checkpoints("run_crash") / "step-00000004"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {path.name for path in files} == {"part-0.bin", "part-1.bin", "rng-00000.pt", MANIFEST}
    whole = checkpoint.find(store, start())
    assert whole is not None
    assert whole.step == 4
    for number in range(1000):
        path = chosen.choice(files)
        data = path.read_bytes()
        at = chosen.randrange(len(data))
        if number % 4:
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << chosen.randrange(8))]) + data[at + 1 :])
        else:
            path.write_bytes(data[:at])
        position = checkpoint.find(store, start())
        assert position is not None, (path.name, at)
        assert position.step == 2, (path.name, at)
        path.write_bytes(data)
    assert sum("is skipped" in record.message for record in caplog.records) == 1000
    position = checkpoint.find(store, start())
    assert position == whole


def test_checkpoint_under_a_wrong_step_name_is_skipped(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(str(shutil.copytree(saved, tmp_path / "store")))
    folder = store.local(paths.checkpoints("run_crash"))
    shutil.copytree(folder / "step-00000002", folder / "step-00000009")
    position = checkpoint.find(store, start())
    assert position is not None
    assert position.step == 4
    assert "step-00000009 is skipped: it is of step 2" in caplog.text


def test_manifest_with_a_stale_digest_is_skipped(saved: Path, tmp_path: Path) -> None:
    store = Store(str(shutil.copytree(saved, tmp_path / "store")))
    path = store.local(paths.checkpoints("run_crash")) / "step-00000004" / MANIFEST
    manifest = json.loads(path.read_bytes())
    assert manifest["parent"].startswith("step-00000002:sha256:")
    manifest["position"]["samples_seen"] = 0
    path.write_bytes(canonical_json(manifest))
    position = checkpoint.find(store, start())
    assert position is not None
    assert position.step == 2


def test_full_disk_is_detected_before_writing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(saved))
    assert checkpoint.why_no_space(store, "run_crash") == ""
    size = sum(entry.size for entry in store.files("runs/run_crash/checkpoints/step-00000004"))
    monkeypatch.setattr(Store, "free_bytes", lambda self: int(size * checkpoint.SPACE_FACTOR) - 1)
    assert "GB are free, a checkpoint of" in checkpoint.why_no_space(store, "run_crash")
    monkeypatch.setattr(Store, "free_bytes", lambda self: int(size * checkpoint.SPACE_FACTOR) + 1)
    assert checkpoint.why_no_space(store, "run_crash") == ""
