"""The layer in one step computes what PEFT's computes, and is used where it can be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.train.lora import fuse

pytestmark = pytest.mark.numerics


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.second(torch.relu(self.first(x)))
        return output


def adapted(rslora: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        Two(), LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"], init_lora_weights=False, use_rslora=rslora)
    )
    return model.train()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("outer", [False, True], ids=["rows", "rows wanted back"])
def test_fused_lora_matches_peft(rslora: bool, outer: bool) -> None:
    plain = adapted(rslora)
    fused = copy.deepcopy(plain)
    method = "rslora" if rslora else "lora"
    assert fuse(fused, parse(TrainConfig, {"adapter": {"r": 4, "alpha": 8, "method": method}})) == 2
    x = torch.randn(3, 5, 12)
    results = []
    for model in (plain, fused):
        inputs = x.clone().requires_grad_(outer)
        out = model(inputs)
        out.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([out.detach(), *gradients, *([inputs.grad] if outer else [])])
    assert len(results[0]) == 5 + outer
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": {"dropout": 0.1}},
        {"adapter": {"method": "dora"}},
        {"adapter": {}, "zero_stage": 3},
        {},
    ],
)
def test_unsupported_adapters_are_left_to_peft(settings: dict[str, Any]) -> None:
    model = adapted()
    assert fuse(model, parse(TrainConfig, settings)) == 0
    assert all("forward" not in vars(module) for module in model.modules())
