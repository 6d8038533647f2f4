"""A LoRA layer in one step, in place of PEFT's seven.

PEFT computes W x, B A x, scales it and adds it, each a pass over an output of its own. Here the low-rank product is added
while it is computed, forward and backward (`addmm`), and rounded once. Same weights, same names, same exports.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_ray.config.train import TrainConfig

PLAIN = ("lora", "rslora")


def fuse(model: Any, config: TrainConfig) -> int:
    """Replace `forward` of the layers that allow it, and return how many: plain linear layers whose weights are at hand
    (ZeRO-3 brings them when a layer's own parts are called), without dropout."""
    from peft.tuners.lora import Linear

    adapter = config.adapter
    if (
        adapter is None
        or adapter.dropout
        or adapter.method not in PLAIN
        or adapter.quantize != "none"
        or config.zero_stage == 3
    ):
        return 0
    layers = [module for module in model.modules() if type(module) is Linear and type(module.get_base_layer()) is nn.Linear]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward(layer: Any, x: Tensor) -> Tensor:
    if layer.disable_adapters:
        output: Tensor = layer.get_base_layer()(x)
        return output
    (name,) = layer.active_adapters
    base, scaling = layer.get_base_layer(), layer.scaling[name]
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    output = _Lora.apply(x, base.weight, base.bias, down, up, scaling)  # type: ignore[no-untyped-call]
    return output


class _Lora(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T; W and bias are frozen."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        narrow_NR = x_NI @ a_RI.T
        y_NO = F.linear(x_NI, weight_OI, bias_O).addmm_(narrow_NR, b_OR.T, alpha=scaling)
        context.save_for_backward(x_NI, weight_OI, a_RI, b_OR, narrow_NR)
        context.scaling, context.shape = scaling, x.shape
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, a_RI, b_OR, narrow_NR = context.saved_tensors
        dy_NO = gradients[0].reshape(-1, weight_OI.shape[0])
        scaled_NR = (dy_NO @ b_OR).mul_(context.scaling)
        dx = None
        if context.needs_input_grad[0]:
            dx = (dy_NO @ weight_OI).addmm_(scaled_NR, a_RI).view(context.shape)
        return dx, None, None, scaled_NR.T @ x_NI, (dy_NO.T @ narrow_NR).mul_(context.scaling), None
