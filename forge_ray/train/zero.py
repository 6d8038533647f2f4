"""DeepSpeed ZeRO, and every quirk of it, in one place (level 3)."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forge_ray.config.train import TrainConfig
from forge_ray.errors import TrainingError
from forge_ray.train.engine import trained

TAG = "state"


def zero_config(config: TrainConfig, precision: str, world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON from our fields. Whatever has a default that moves between releases is set."""
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": 1,  # the recipe owns the boundary and the scale
        "train_batch_size": config.micro_batch_size * world_size,
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
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def prepare_environment() -> None:
    """Before deepspeed is imported: no accelerator guessing, no progress chatter, the rank that it asks for."""
    os.environ.setdefault("LOCAL_RANK", "0")  # Ray Train and torchrun set it; a single process has none
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def open_deepspeed() -> Any:
    """The library, on the process group that is already there; before anything else of it runs, partitioned loading too:
    without its own view of the group it takes itself for the only rank."""
    prepare_environment()
    import deepspeed

    # an inference-only C++ extension that the CPU backend would compile at start, on every worker
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


class ZeroEngine:
    """Stages 0 to 3 over the process group that is already there."""

    def __init__(self, model: nn.Module, config: TrainConfig, precision: str) -> None:
        deepspeed = open_deepspeed()
        self.stage = config.zero_stage
        self.world_size = dist.get_world_size()
        options = config.optimizer
        # torch's AdamW: DeepSpeed's own are C++ extensions that want a compiler on every worker
        optimizer = torch.optim.AdamW(
            [parameter for _, parameter in trained(model)],
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=zero_config(config, precision, self.world_size)
        )
        self.model: nn.Module = self.engine.module
        # stage 0 in fp32 clips and steps the plain optimizer, and tells nobody the norm
        self.is_plain = self.optimizer is optimizer

    def forward(self, **inputs: Any) -> Any:
        return self.engine(**inputs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed averages over the ranks; the loss is scaled by the global token count, so the sum is wanted
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        gradients = [p.grad for _, p in trained(self.model) if p.grad is not None] if self.is_plain else []
        plain_norm = torch.nn.utils.get_total_norm(gradients)
        self.engine.step()
        return float(plain_norm if self.is_plain else self.engine.get_global_grad_norm())

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        # not strict: frozen weights are not in the checkpoint, the base model is loaded before
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if path is None:
            raise TrainingError(f"DeepSpeed could not load {folder}", hint="remove that checkpoint; the one before is used")

    def weights(self, trained_only: bool) -> dict[str, Tensor]:
        import deepspeed

        found = {}
        for name, parameter in self.engine.module.named_parameters():
            if trained_only and not parameter.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                if dist.get_rank() == 0:
                    found[name] = parameter.detach().cpu().clone()
        return found
