"""A checkpoint that is written while training goes on: of the state at its step, published by all ranks or by none."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Jobs, Run, export_digest, first_steps
from worker import KILLED

from forge_ray.errors import TrainingError
from forge_ray.store.files import Store
from forge_ray.train import attempts, checkpoint, saving
from forge_ray.train.context import Context

pytestmark = pytest.mark.numerics
START = checkpoint.Position(0, 0, "", 1, "run_a", "sha256:c", "ds_a", "sha256:b", "torch", 0, 1)
ALONE = Context(0, 1, 0, torch.device("cpu"), False)


class Engine:
    loads_anywhere = True

    def __init__(self) -> None:
        self.weight = torch.zeros(4)

    def save(self, folder: Path, write: Any) -> None:
        write({"weight": self.weight}, folder / "state.pt")


@pytest.fixture(autouse=True)
def group_of_one() -> Any:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def at(step: int) -> checkpoint.Position:
    return replace(START, step=step, samples_seen=step, order_digest=f"sha256:{step}")


def saver_of(tmp_path: Path, in_background: bool = True) -> saving.Saver:
    return saving.Saver(Engine(), Store(str(tmp_path)), ALONE, keep=2, in_background=in_background)  # type: ignore[arg-type]


def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), torch.save
    monkeypatch.setattr(saving.torch, "save", lambda state, stream: (gate.wait(30), write(state, stream)))
    saver = saver_of(tmp_path)
    assert saver.begin(at(2)) is None
    saver.engine.weight.fill_(9.0)  # type: ignore[attr-defined]  # the next step, in place
    assert saver.advance(saver.written, saver.published) is None
    assert checkpoint.steps(saver.store, "run_a") == []
    gate.set()
    deadline, saved = time.monotonic() + 30, None
    while not saved and time.monotonic() < deadline:
        saved = saver.advance(saver.written, saver.published)
        time.sleep(0.01)
    assert saved == saving.Saved(2, "runs/run_a/checkpoints/step-00000002")
    state = torch.load(saver.store.local(saved.path) / "state.pt", weights_only=True)
    assert state["weight"].tolist() == [0.0] * 4  # of its own step
    assert checkpoint.find(saver.store, START) == at(2)
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize("in_background", [True, False])
def test_write_error_loses_only_that_checkpoint(
    in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = saver_of(tmp_path, in_background)
    assert (saver.begin(at(2)) or saver.finish()) == saving.Saved(2, "runs/run_a/checkpoints/step-00000002")

    def fails(state: Any, stream: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.torch, "save", fails)
    saved = saver.begin(at(4)) or saver.finish()
    assert saved is not None
    assert not saved.path
    assert saved.problem == "rank 0: OSError: [Errno 28] No space left on device"
    assert not list(tmp_path.rglob(".tmp-*"))
    monkeypatch.undo()
    assert (saver.begin(at(6)) or saver.finish()) == saving.Saved(6, "runs/run_a/checkpoints/step-00000006")
    assert checkpoint.steps(saver.store, "run_a") == [6, 2]


def test_superseded_attempt_publishes_nothing(tmp_path: Path) -> None:
    saver = saver_of(tmp_path)
    for _ in range(2):
        attempts.start(saver.store, "run_a", 1, 0)
    with pytest.raises(TrainingError, match="attempt 1 of run_a was overtaken by attempt 2"):
        saver.begin(at(2)) or saver.finish()
    assert checkpoint.steps(saver.store, "run_a") == []


def test_existing_checkpoint_is_not_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = saver_of(tmp_path)
    saver.begin(at(2)), saver.finish()
    monkeypatch.setattr(Engine, "save", lambda self, folder, write: pytest.fail("it stands"))
    assert saver.begin(replace(at(2), attempt=1)) == saving.Saved(2, "runs/run_a/checkpoints/step-00000002")


@pytest.mark.parametrize("stage", [1, 3])
def test_kill_during_a_background_save_resumes_bit_identical(stage: int, jobs: Jobs, run: Run) -> None:
    """Where it goes on depends on how far the thread was; the bytes at the end do not."""
    settings: dict[str, Any] = {"zero_stage": stage, "max_steps": 4, "adapter": {"r": 4, "dropout": 0.2}}
    settings["checkpoint"] = {"every_steps": 1, "asynchronous": True}
    whole, killed = jobs(f"background-{stage}", **settings), jobs(f"background-killed-{stage}", **settings)
    run(whole, ranks=2)
    for step in (3, 4):
        run(killed, ranks=2, kill_at=step, expect=KILLED)
    run(killed, ranks=2)
    assert first_steps(killed)[1] in (1, 2)
    assert export_digest(killed) == export_digest(whole)
    assert checkpoint.steps(killed.store, killed.run) == [4, 3]
