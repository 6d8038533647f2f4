"""Nothing in a checkpoint is code: whatever its files name, reading them calls nothing of it."""

from __future__ import annotations

import inspect
import os
import pickle
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from forge_ray.errors import TrainingError
from forge_ray.train import zero
from forge_ray.train.zero import FORBID_DATA, FORCE_DATA, TAG, ZeroEngine, consolidated, data_only, plain_classes

pytestmark = pytest.mark.unit
OTHER_READERS = re.compile(
    r"\bpickle\.(loads?|Unpickler)\(|\bfrom torch import .*\bload\b|\btorch\.jit\.load|allow_pickle=True"
)


class Plant:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.canary, "this was run")


def zero_checkpoint(folder: Path, ranks: int = 2) -> Path:
    """Of two weights, in DeepSpeed's layout of stage 2; the smallest that its own reader takes."""
    state = folder / TAG
    state.mkdir(parents=True)
    shapes = [OrderedDict([("a", torch.Size([2, 2])), ("b", torch.Size([4]))])]
    model = {"module": {}, "buffer_names": [], "param_shapes": shapes, "shared_params": {}, "ds_version": "0"}
    torch.save(model, state / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        part = torch.arange(8.0).chunk(ranks)[rank].clone()
        flat = {"zero_stage": 2, "partition_count": ranks, "single_partition_of_fp32_groups": [part]}
        torch.save({"optimizer_state_dict": flat}, state / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


@pytest.mark.parametrize("name", ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_planted_checkpoint_file_runs_nothing(tmp_path: Path, name: str, form: str) -> None:
    """Of a remade manifest no digest tells: the file is read, and refused."""
    folder, canary = zero_checkpoint(tmp_path / "step"), tmp_path / "canary"
    assert torch.equal(consolidated(folder)["b"], torch.arange(4.0, 8.0))
    if form == "zip":
        torch.save({"optimizer_state_dict": Plant(canary)}, folder / TAG / name)
    else:
        (folder / TAG / name).write_bytes(pickle.dumps(Plant(canary)))
    with pytest.raises((TrainingError, RuntimeError)):
        consolidated(folder)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Plant(canary)))
    assert canary.exists()  # the control: it does what it says


def test_planted_file_beside_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    folder, canary = zero_checkpoint(tmp_path / "step"), tmp_path / "canary"
    torch.save(Plant(canary), folder / TAG / "bf16_zero_pp_rank_7_mp_rank_00_optim_states.pt")
    with pytest.raises(TrainingError, match="is not data alone"):
        consolidated(folder)
    assert not canary.exists()


def test_planted_checkpoint_of_unpartitioned_weights_runs_nothing(tmp_path: Path) -> None:
    folder, canary = tmp_path / "step", tmp_path / "canary"
    (folder / TAG).mkdir(parents=True)
    torch.save({"module": Plant(canary)}, folder / TAG / "mp_rank_00_model_states.pt")
    with pytest.raises(TrainingError, match="is not data alone"):
        consolidated(folder)
    assert not canary.exists()


@pytest.mark.slow
def test_conversion_to_other_numbers_of_workers_runs_nothing(tmp_path: Path) -> None:
    folder, canary = zero_checkpoint(tmp_path / "step"), tmp_path / "canary"
    torch.save(Plant(canary), folder / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(TrainingError, match="is not data alone"):
        ZeroEngine.reshard(object.__new__(ZeroEngine), folder, tmp_path / "target")
    assert not canary.exists()


def test_what_deepspeed_asks_of_torch_is_overruled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's readers pass `weights_only=False`; this is the control that torch still lets itself be overruled."""
    monkeypatch.setenv(FORBID_DATA, "1")
    canary = tmp_path / "canary"
    torch.save(Plant(canary), tmp_path / "file.pt")
    with pytest.raises(TrainingError, match="is not data alone"), data_only():
        torch.load(tmp_path / "file.pt", weights_only=False)
    assert not canary.exists()
    assert os.environ[FORBID_DATA] == "1"
    assert FORCE_DATA not in os.environ
    assert not set(plain_classes()) & set(torch.serialization.get_safe_globals())


def test_deepspeed_reads_checkpoints_by_torch_load_alone() -> None:
    """Another reader would not be overruled: a new release that has one must fail here."""
    from deepspeed.checkpoint import deepspeed_checkpoint, ds_to_universal, universal_checkpoint, zero_checkpoint
    from deepspeed.runtime import base_optimizer, engine
    from deepspeed.runtime.checkpoint_engine import torch_checkpoint_engine
    from deepspeed.runtime.zero import stage3, stage_1_and_2
    from deepspeed.utils import zero_to_fp32

    readers = (deepspeed_checkpoint, ds_to_universal, universal_checkpoint, zero_checkpoint, base_optimizer, engine)
    for module in (*readers, torch_checkpoint_engine, stage3, stage_1_and_2, zero_to_fp32):
        assert not OTHER_READERS.search(inspect.getsource(module)), module.__name__
    assert hasattr(engine.DeepSpeedEngine, "_copy_recovery_script")  # what is not written, see `ZeroEngine.save`


def test_classes_that_a_checkpoint_may_hold_only_set_fields() -> None:
    """None of them has a way of its own to be unpickled, which could call something."""
    for kind in plain_classes():
        assert "__setstate__" not in vars(kind)
        assert kind.__module__ in sys.modules
    assert len(plain_classes()) == 3
    assert "weights_only=False)" not in inspect.getsource(zero)
