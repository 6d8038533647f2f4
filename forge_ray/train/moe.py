"""What is special about mixtures of experts: the router, its balance, the block that ZeRO-3 gathers whole.

Which module routes is what transformers itself records as `router_logits`; such a module returns (logits, weights, experts).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from forge_ray.errors import ConfigError
from forge_ray.train.attention import SharedPrompts
from forge_ray.train.loss import load_balance


def routers(model: Any) -> list[nn.Module]:
    """In the order of the layers; none in a dense model."""
    recorder = (getattr(model.get_decoder(), "_can_record_outputs", None) or {}).get("router_logits")
    recorders = recorder if isinstance(recorder, (list, tuple)) else [recorder]
    kinds = tuple(kind for one in recorders if (kind := getattr(one, "target_class", one)))
    return [module for module in model.modules() if kinds and isinstance(module, kinds)]


def block_classes(model: Any) -> list[str]:
    """Classes of the modules that hold a router and its experts, with their module, as DeepSpeed names leaf modules.

    Each rank sends its tokens to other experts; gathering expert by expert, the ranks would wait for each other for ever.
    """
    router_ids = {id(router) for router in routers(model)}
    blocks = [module for module in model.modules() if any(id(child) in router_ids for child in module.children())]
    return sorted({f"{type(block).__module__}.{type(block).__qualname__}" for block in blocks})


class Balance:
    """The load-balancing loss of the pass that was just done.

    Read at the routers, because a model that also sees hands their logits to nobody. With activation checkpointing they run
    once more in the backward pass; what they say there is not looked at.
    """

    def __init__(self, model: Any, coefficient: float) -> None:
        self.coefficient = coefficient
        self.sum = 0.0
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._is_open = False
        self._shared: SharedPrompts | None = None
        modules = routers(model)
        if not modules:
            raise ConfigError(
                f"train.router_aux_loss={coefficient}: {type(model).__name__} is no mixture of experts",
                hint="set train.router_aux_loss=0",
            )
        model.get_decoder().register_forward_pre_hook(self._open, with_kwargs=True)
        for router in modules:
            router.register_forward_hook(self._look)

    def _open(self, _module: nn.Module, _inputs: Any, options: dict[str, Any]) -> None:
        self._seen, self._is_open, self._shared = [], torch.is_grad_enabled(), options.get("shared_prompts")

    def _look(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self._is_open:
            self._seen.append((output[0], output[2]))

    def loss(self, used_BT: Tensor, num_trained: Tensor) -> Tensor:
        """The mean over the layers, times the coefficient, times the trained tokens of the pass, by whose number over all
        passes a step divides; `used`: tokens that are no padding."""
        self._is_open = False
        used = used_BT.flatten().float()
        if shared := self._shared:  # a token that stands for two counts twice
            used = used.new_zeros(len(shared.tokens_M)).index_add(0, shared.places_N, used)
        layers = [load_balance(logits, chosen, used) for logits, chosen in self._seen]
        self._seen = []
        mean = torch.stack(layers).mean() * num_trained
        self.sum += float(mean.detach())
        return self.coefficient * mean

    def take(self) -> float:
        """The sum of `mean * num_trained` since the last call."""
        taken, self.sum = self.sum, 0.0
        return taken
