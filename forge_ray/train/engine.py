"""The optimizer step behind one seam, and its plain-torch implementation.

`TorchEngine` needs nothing but torch: gradients are summed over the ranks once per step, and under bf16 the optimizer works
on fp32 master weights. `zero.ZeroEngine` is the other implementation.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forge_ray.config.train import TrainConfig
from forge_ray.train.optimizer import lr_factors, make_optimizer, set_lr

Write = Callable[[Any, str | Path], None]  # (state, path): what `torch.save` takes, in its order


class TrainEngine(Protocol):
    """Owns model, gradients and optimizer. The loss given to `backward` is already scaled by the global token count, and
    gradients are *summed* over micro-batches and ranks."""

    model: nn.Module

    def forward(self, **inputs: Any) -> Any: ...

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """`is_last`: the last micro-batch of the step."""
        ...

    def step(self, lr: float) -> float:
        """Clip, update, zero the gradients; returns the gradient norm before clipping. Where that is not finite nothing is
        updated."""
        ...

    def save(self, folder: Path, write: Write) -> None:
        """Collective: every rank writes its part of weights and optimizer state (frozen weights left out)."""
        ...

    @property
    def loads_anywhere(self) -> bool:
        """Whether `load` takes what any number of ranks saved."""
        ...

    def reshard(self, folder: Path, target: Path) -> None:
        """Of what `save` wrote, a copy in `target` that any number of ranks can `load(target, resharded=True)`."""
        ...

    def load(self, folder: Path, resharded: bool = False) -> None:
        """Collective: the opposite of `save`."""
        ...

    def weights(self, trained_only: bool) -> dict[str, Tensor]:
        """Collective: complete tensors on the CPU, on rank 0; other ranks get an empty dict."""
        ...


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


class TorchEngine:
    """ZeRO stage 0 without DeepSpeed: every rank holds everything."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model = model
        self.max_grad_norm = config.max_grad_norm
        self.parameters = trained(model)
        self.masters = [p.detach().float().clone() if p.dtype != torch.float32 else p for _, p in self.parameters]
        names = [name for name, _ in self.parameters]
        self.optimizer = make_optimizer(list(zip(names, self.masters, strict=True)), config)
        self.lr_factors = lr_factors(config)
        # fp32 accumulators: bf16 sums over many micro-batches would lose the small gradients
        self.gradients = [torch.zeros_like(master, dtype=torch.float32) for master in self.masters]

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()
        for (_, parameter), total in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not None:
                total += parameter.grad
                parameter.grad = None

    def step(self, lr: float) -> float:
        if dist.get_world_size() > 1:
            for total in self.gradients:
                dist.all_reduce(total)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(total) for total in self.gradients]))
        if not torch.isfinite(norm):
            for total in self.gradients:
                total.zero_()
            return float("inf")
        scale = min(1.0, self.max_grad_norm / (float(norm) + 1e-6)) if self.max_grad_norm else 1.0
        set_lr(self.optimizer, lr, self.lr_factors)
        for master, total in zip(self.masters, self.gradients, strict=True):
            master.grad = total * scale
        self.optimizer.step()
        with torch.no_grad():
            for (_, parameter), master, total in zip(self.parameters, self.masters, self.gradients, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
                master.grad = None
                total.zero_()
        return float(norm)

    loads_anywhere = True  # every rank holds everything

    def save(self, folder: Path, write: Write) -> None:
        if dist.get_rank() == 0:
            masters = {name: master for (name, _), master in zip(self.parameters, self.masters, strict=True)}
            write({"weights": masters, "optimizer": self.optimizer.state_dict()}, folder / "state.pt")

    def reshard(self, folder: Path, target: Path) -> None:
        shutil.copytree(folder, target, dirs_exist_ok=True)  # what it saves loads anywhere as it is

    def load(self, folder: Path, resharded: bool = False) -> None:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for (name, parameter), master in zip(self.parameters, self.masters, strict=True):
                master.copy_(state["weights"][name])
                if master is not parameter:
                    parameter.copy_(master)
        self.optimizer.load_state_dict(state["optimizer"])

    def weights(self, trained_only: bool) -> dict[str, Tensor]:
        if dist.get_rank():
            return {}
        chosen = dict(self.parameters) if trained_only else dict(self.model.named_parameters())
        return {name: parameter.detach().cpu() for name, parameter in chosen.items()}
