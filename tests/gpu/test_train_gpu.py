"""The torch engine in bf16 on one GPU: it trains, resumes to the bit and exports bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.train import attention
from forge_ray.train.engine import TorchEngine
from forge_ray.train.methods.sft import loss, weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(autouse=True)
def group() -> object:
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tiny() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config._attn_implementation = attention.register()
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()


def batch() -> dict[str, torch.Tensor]:
    ids = (torch.arange(64, device="cuda")[None] + torch.arange(4, device="cuda")[:, None]) % 200
    positions = torch.cat([torch.arange(40), torch.arange(24)])[None].expand(4, -1).to("cuda")
    mask = torch.ones_like(ids)
    mask[:, [0, 40]] = 0
    return {"input_ids": ids, "position_ids": positions, "loss_mask": mask}


def train(engine: TorchEngine, steps: int) -> list[float]:
    rows, losses = batch(), []
    for _ in range(steps):
        mean = loss(engine.forward, rows).loss / weight(rows)
        engine.backward(mean, is_last=True)
        assert engine.step(1e-3) > 0
        losses.append(float(mean.detach()))
    return losses


def config(name: str = "adamw") -> TrainConfig:
    settings = {"engine": "torch", "zero_stage": 0, "scaling": {"gpus_per_worker": 1}}
    return parse(TrainConfig, {**settings, "optimizer": {"lr": 1e-3, "name": name}})


def test_bf16_trains_on_fp32_masters() -> None:
    engine = TorchEngine(tiny(), config())
    losses = train(engine, 30)
    assert losses[-1] < 0.7 * losses[0]
    assert {master.dtype for master in engine.masters} == {torch.float32}
    assert {value.dtype for value in engine.weights(trained_only=True).values()} == {torch.bfloat16}


def test_moments_in_8_bits_train_as_far_as_those_in_32() -> None:
    pytest.importorskip("bitsandbytes")
    engine = TorchEngine(tiny(), config("adamw_8bit"))
    losses = train(engine, 30)
    assert losses[-1] < 0.7 * losses[0]
    assert any(
        value.dtype == torch.uint8
        for state in engine.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_resumed_equals_uninterrupted(tmp_path: Path, optimizer: str) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    whole = TorchEngine(tiny(), config(optimizer))
    train(whole, 6)
    first = TorchEngine(tiny(), config(optimizer))
    train(first, 3)
    first.save(tmp_path, torch.save)
    second = TorchEngine(tiny(), config(optimizer))
    second.load(tmp_path)
    train(second, 3)
    expected = whole.weights(trained_only=True)
    assert all(torch.equal(value, expected[name]) for name, value in second.weights(trained_only=True).items())
