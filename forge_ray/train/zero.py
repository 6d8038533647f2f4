"""DeepSpeed ZeRO, and every quirk of it, in one place."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forge_ray.config.optimizer import Offload
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError, TrainingError, first_line
from forge_ray.train.engine import Write, trained
from forge_ray.train.moe import block_classes
from forge_ray.train.optimizer import lr_factors, make_optimizer, set_lr

TAG = "state"
FORCE_DATA, FORBID_DATA = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def zero_config(config: TrainConfig, precision: str, world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON from our fields. Whatever has a default that moves between releases is set."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # only logged by DeepSpeed: the loop says which pass ends a step
        "gradient_accumulation_steps": 1,  # the recipe owns the boundary and the scale
        "train_batch_size": world_size,
        "gradient_clipping": config.max_grad_norm,  # DeepSpeed's own default became 1.0 in 0.19
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "stage3_gather_16bit_weights_on_model_save": False,
            **_offload(config.offload),
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps there too; theirs wants a compiler
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def _offload(offload: Offload) -> dict[str, Any]:
    """Pinned memory only where there is a GPU to copy to."""
    places = {"offload_optimizer": offload.optimizer, "offload_param": offload.parameters}
    pinned = torch.cuda.is_available()
    return {name: {"device": device, "pin_memory": pinned} for name, device in places.items() if device != "none"}


def import_deepspeed() -> Any:
    """The library, with no accelerator guessing, no progress chatter, and the rank that it asks for."""
    os.environ.setdefault("LOCAL_RANK", "0")  # Ray Train and torchrun set it; a single process has none
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if "deepspeed" not in sys.modules and "mlflow" not in sys.modules:
        # its autotuner, which nobody uses here, imports mlflow where that is installed: a second
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # "cannot be imported"
        try:
            import deepspeed
        finally:
            sys.modules.pop("mlflow", None)
    import deepspeed

    return deepspeed


def open_deepspeed() -> Any:
    """The library, on the process group that is already there; before anything else of it runs, partitioned loading too:
    without its own view of the group it takes itself for the only rank."""
    deepspeed = import_deepspeed()
    # an inference-only C++ extension that the CPU backend would compile at start, on every worker
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


def _writer(write: Write) -> Any:
    """DeepSpeed's name for it is a checkpoint engine."""
    from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo, TorchCheckpointEngine

    class Through(TorchCheckpointEngine):  # type: ignore[misc]
        def save(self, state_dict: Any, path: str) -> None:
            write(state_dict, path)

        def commit(self, info: CheckpointCommitInfo) -> bool:
            return True

    return Through()


def plain_classes() -> list[Any]:
    """The classes of DeepSpeed's whose instances its checkpoints hold; making one does nothing but set its fields."""
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


@contextlib.contextmanager
def data_only() -> Iterator[None]:
    """Inside, `torch.load` reads tensors, plain values and `plain_classes`, and calls nothing else that a file names.
    DeepSpeed asks torch for the opposite (`weights_only=False`); torch's own variable overrules the caller, here and in the
    processes started inside."""
    before = {name: os.environ.pop(name, None) for name in (FORCE_DATA, FORBID_DATA)}
    os.environ[FORCE_DATA] = "1"
    try:
        with torch.serialization.safe_globals(plain_classes()):
            yield
    except pickle.UnpicklingError as error:
        raise TrainingError(
            f"a file of the checkpoint is not data alone: {first_line(error)}",
            hint="it was changed, or another tool wrote it: remove that checkpoint; the one before is used",
        ) from None
    finally:
        os.environ.pop(FORCE_DATA)
        os.environ.update({name: value for name, value in before.items() if value is not None})


class ZeroEngine:
    """Stages 0 to 3 over the process group that is already there."""

    def __init__(self, model: nn.Module, config: TrainConfig, precision: str) -> None:
        if precision == "bf16" and config.zero_stage == 0:
            raise ConfigError(
                "DeepSpeed's stage 0 has no bf16 with fp32 gradients (train.zero_stage=0, precision bf16)",
                hint="set train.zero_stage=1, or train.engine=torch, or train.precision=fp32",
            )
        deepspeed = open_deepspeed()
        self.stage = config.zero_stage
        self.world_size = dist.get_world_size()
        optimizer, self.lr_factors = make_optimizer(trained(model), config), lr_factors(config)
        settings = zero_config(config, precision, self.world_size)
        if self.stage == 3 and (blocks := block_classes(model)):
            settings["zero_optimization"]["leaf_module"] = {"classes": blocks}
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self.model: nn.Module = self.engine.module
        # stage 0 in fp32 clips and steps the plain optimizer, and tells nobody the norm
        self.is_plain = self.optimizer is optimizer
        self.loads_anywhere = self.is_plain
        if hasattr(self.optimizer, "check_grad_overflow"):
            self.optimizer.check_grad_overflow = True  # stages 1 and 2 look only under bf16 unless told

    def forward(self, **inputs: Any) -> Any:
        return self.engine(**inputs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed averages over the ranks; the loss is scaled by the global token count, so the sum is wanted
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        set_lr(self.optimizer, lr, self.lr_factors)
        gradients = [p.grad for _, p in trained(self.model) if p.grad is not None] if self.is_plain else []
        plain_norm = torch.nn.utils.get_total_norm(gradients)
        if self.is_plain and not torch.isfinite(plain_norm):
            self.engine.optimizer.zero_grad()
            return float("inf")
        self.engine.step()  # ZeRO's optimizers leave out a step whose norm is not finite
        return float(plain_norm if self.is_plain else self.engine.get_global_grad_norm())

    def save(self, folder: Path, write: Write) -> None:
        torch_engine, self.engine.checkpoint_engine = self.engine.checkpoint_engine, _writer(write)
        self.engine._copy_recovery_script = lambda save_path: None  # scripts next to the files, which no manifest lists
        try:
            self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        finally:
            self.engine.checkpoint_engine = torch_engine

    def reshard(self, folder: Path, target: Path) -> None:
        """DeepSpeed's universal checkpoint: one file per weight and optimizer state. Frozen weights are in neither; the base
        is held to its digest before."""
        command = ["-m", "forge_ray.train.reshard", "--inject_missing_state"]
        paths = ["--input_folder", str(folder / TAG), "--output_folder", str(target / TAG)]
        done = subprocess.run([sys.executable, *command, *paths], capture_output=True, text=True, check=False)
        if done.returncode:
            raise TrainingError(f"DeepSpeed's converter says {done.stderr.strip().splitlines()[-1:]}", hint="")

    def load(self, folder: Path, resharded: bool = False) -> None:
        self.engine._config.load_universal_checkpoint = resharded
        # not strict: frozen weights are not in the checkpoint, the base model is loaded before
        with data_only():
            path, _ = self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if path is None:
            raise TrainingError(f"DeepSpeed could not load {folder}", hint="remove that checkpoint; the one before is used")
        if resharded:  # at stage 3 all groups are left with one tensor of steps, which each of them would count up
            for state in self.optimizer.optimizer.state.values():
                state["step"] = state["step"].clone() if torch.is_tensor(state["step"]) else state["step"]

    def weights(self, trained_only: bool) -> dict[str, Tensor]:
        import deepspeed

        weights = {}
        for name, parameter in self.engine.module.named_parameters():
            if trained_only and not parameter.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                if dist.get_rank() == 0:
                    weights[name] = parameter.detach().cpu().clone()
        return weights


def consolidated(folder: Path) -> dict[str, Tensor]:
    """The trained weights in fp32 out of what `ZeroEngine.save` wrote, at any stage and by any number of ranks; no process
    group is needed. The files are read as data alone."""
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        import_deepspeed()
        stack.enter_context(data_only())
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        if not list((folder / TAG).glob("*_optim_states.pt")):  # stage 0 in fp32: the model's own weights are the masters
            path = folder / TAG / "mp_rank_00_model_states.pt"
            state = torch.load(path, map_location="cpu", weights_only=True)["module"]
            return {name: value.float() for name, value in state.items()}
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)
    return {name: value.float() for name, value in weights.items()}
