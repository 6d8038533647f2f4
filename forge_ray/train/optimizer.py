"""The optimizer that both engines step, and the learning rates of its groups of weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError

UP = (".lora_B.", ".lora_embedding_B.")  # PEFT's names of the matrices that start at zero


def lr_factors(config: TrainConfig) -> tuple[float, ...]:
    """Of each group, its learning rate over that of the step. Not kept in the groups themselves: a resharded checkpoint of
    ZeRO-3 gives all of them the settings of the first."""
    ratio = config.adapter.lr_ratio if config.adapter else 1.0
    return (1.0,) if ratio == 1.0 else (1.0, ratio)


def make_optimizer(weights: Sequence[tuple[str, Tensor]], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the run over the named weights: one group, or with LoRA+ (arXiv:2402.12354) a second one for the
    matrices B. It is torch's own: DeepSpeed's are C++ extensions that want a compiler on every worker."""
    groups = [[weight for _, weight in weights]]
    if len(lr_factors(config)) > 1:
        is_up = [any(part in name for part in UP) for name, _ in weights]
        groups = [[weight for (_, weight), up in zip(weights, is_up, strict=True) if up is group] for group in (False, True)]
    options = config.optimizer
    if options.name == "adafactor":
        return torch.optim.Adafactor(groups[0], lr=options.lr, weight_decay=options.weight_decay)
    adamw = _adamw_8bit() if options.name == "adamw_8bit" else torch.optim.AdamW
    optimizer: torch.optim.Optimizer = adamw(
        [{"params": group} for group in groups],
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
    )
    return optimizer


def _adamw_8bit() -> Any:
    """bitsandbytes' class: moments in 8 bits by blocks of 256 weights (arXiv:2110.02861), of smaller weights in fp32."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.optimizer.name=adamw_8bit needs bitsandbytes",
            hint="pip install 'forge-ray[qlora]' on every worker, or set train.optimizer.name=adamw",
        )
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


def set_lr(optimizer: torch.optim.Optimizer, lr: float, factors: tuple[float, ...]) -> None:
    """Of the coming step: `lr` is that of the first group."""
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group["lr"] = lr * factor
