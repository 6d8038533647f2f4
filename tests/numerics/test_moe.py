"""Mixtures of experts: the balance of their routers, ZeRO-3 over a block as a whole, both classes of Mistral 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Jobs, Run, exported, first_steps, largest_difference, losses
from families import version

from forge_ray.errors import ConfigError
from forge_ray.store.files import Store
from forge_ray.train.loss import load_balance
from forge_ray.train.moe import Balance, block_classes, routers

pytestmark = pytest.mark.numerics
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_load_balance_matches_the_published_formula() -> None:
    torch.manual_seed(0)
    tokens, experts, taken = 50, 8, 2
    logits = torch.randn(tokens, experts, dtype=torch.float32, requires_grad=True)
    chosen = logits.detach().topk(taken, dim=-1).indices
    used = torch.rand(tokens) > 0.3
    balance = load_balance(logits, chosen, used)

    expected = torch.zeros(())
    for expert in range(experts):
        rows = [token for token in range(tokens) if used[token]]
        share = sum(int(expert in chosen[token].tolist()) for token in rows) / (len(rows) * taken)
        probability = torch.stack([torch.softmax(logits[token], -1)[expert] for token in rows]).mean()
        expected = expected + experts * share * probability
    torch.testing.assert_close(balance, expected)
    (one,), (other,) = (torch.autograd.grad(loss, [logits], retain_graph=True) for loss in (balance, expected))
    torch.testing.assert_close(one, other)
    assert not one[~used].any()  # padding balances nothing
    alike = torch.zeros(8, 8)
    assert float(load_balance(alike, torch.arange(8)[:, None], torch.ones(8))) == pytest.approx(1.0)
    one_takes_all = torch.full((8, 8), -50.0).index_fill_(1, torch.tensor([3]), 50.0)
    assert float(load_balance(one_takes_all, torch.full((8, 1), 3), torch.ones(8))) == pytest.approx(8.0)
    assert float(load_balance(alike, torch.arange(8)[:, None], torch.zeros(8))) == 0.0  # nothing but padding


def test_router_is_balanced_or_frozen(jobs: Jobs, run: Run, tmp_path: Path) -> None:
    """The balance is told, is less with its loss, and is the same on two ranks, recomputed."""
    base = version("mistral4-sees", jobs, tmp_path / "model")
    torch_only = {"engine": "torch", "zero_stage": 0, "optimizer": {"lr": 3e-2}, "max_steps": 5, "global_batch": 2}

    def job(name: str, **settings: Any) -> Any:
        return jobs.on_base(jobs(f"router-{name}", **torch_only | settings), base)

    weak, strong = job("weak", router_aux_loss=1e-6), job("strong", router_aux_loss=100.0)
    frozen = job("frozen", router="frozen", max_steps=2)
    run(weak, strong, frozen)
    two = job("two", router_aux_loss=100.0, engine="deepspeed", zero_stage=3, activation_checkpointing=True)
    run(two, ranks=2)
    assert losses(weak, "router_balance")[0] == pytest.approx(losses(strong, "router_balance")[0], rel=1e-5)
    assert losses(strong, "router_balance")[-1] < 0.98 * losses(weak, "router_balance")[-1]
    assert losses(two, "router_balance") == pytest.approx(losses(strong, "router_balance"), rel=1e-4)
    assert losses(two) == pytest.approx(losses(strong), rel=1e-4)
    from safetensors.torch import load_file

    before = load_file(jobs.store.local(f"models/{base.id}/model.safetensors"))
    same = {name for name, weight in exported(frozen).items() if torch.equal(weight, before[name].float())}
    gates = {name for name in before if name.endswith("mlp.gate.weight")}
    seen = {name for name in before if name.startswith(("vision_tower", "multi_modal_projector"))}
    assert len(gates) == 2
    assert same == gates | seen
    moved = {name for name, weight in exported(weak).items() if torch.equal(weight, before[name].float())}
    assert moved == seen


def test_zero3_moe_resumes_bit_identical(jobs: Jobs, run: Run, tmp_path: Path) -> None:
    base = version("mistral4-sees", jobs, tmp_path / "model")
    lora = {"r": 4, "alpha": 32, "target_parameters": EXPERTS}
    settings = {"zero_stage": 3, "adapter": lora, "optimizer": {"lr": 1e-2}, "global_batch": 2} | {
        "checkpoint": {"every_steps": 1},
        "max_steps": 3,
    }

    def job(name: str, **more: Any) -> Any:
        return jobs.on_base(jobs(f"moe-{name}", **settings | more), base)

    whole, killed, alone = job("whole"), job("killed"), job("alone", engine="torch", zero_stage=0)
    run(whole, ranks=2)
    run(killed, ranks=2, kill_at=2, expect=23)
    run(killed, ranks=2)
    run(alone)
    assert first_steps(killed) == [0, 1]
    assert losses(killed) == losses(whole)
    assert largest_difference(exported(killed), exported(whole)) == 0
    assert losses(whole) == pytest.approx(losses(alone), rel=1e-5)
    assert any("experts" in name for name in exported(whole))


def test_routers_and_moe_blocks_are_detected(store: Store, tiny_model_dir: Path) -> None:
    from families import FAMILIES

    from forge_ray.models.architecture import open_model

    vocabulary = {"vocab_size": 32, "eos_token_id": 2}
    expected = {"mixtral": "MixtralSparseMoeBlock", "qwen3-moe": "Qwen3MoeSparseMoeBlock", "mistral4-sees": "Mistral4MoE"}
    for family, block in expected.items():
        model = FAMILIES[family](vocabulary)
        assert len(routers(model)) == 2
        assert [name.rsplit(".", 1)[-1] for name in block_classes(model)] == [block]
    dense = open_model(tiny_model_dir, torch.float32)
    assert (routers(dense), block_classes(dense)) == ([], [])
    with pytest.raises(ConfigError, match="no mixture of experts"):
        Balance(dense, 0.1)


def test_engine_answers_match_peft_with_adapted_experts(jobs: Jobs, tmp_path: Path) -> None:
    from peft import PeftModel

    from forge_ray.config.adapter import Adapter
    from forge_ray.config.release import EngineConfig
    from forge_ray.inference.engine import GenerationRequest
    from forge_ray.inference.load import load_engine
    from forge_ray.models.architecture import open_model
    from forge_ray.train.adapter import with_adapter

    base = jobs.store.local(f"models/{version('mistral4-sees', jobs, tmp_path / 'model').id}")
    torch.manual_seed(1)
    adapted = with_adapter(open_model(base, torch.float32), Adapter(r=4, alpha=64, target_parameters=tuple(EXPERTS)))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    offline = PeftModel.from_pretrained(open_model(base, torch.float32), str(tmp_path / "adapter")).eval()
    plain = open_model(base, torch.float32).eval()
    engine = load_engine(base, tmp_path / "adapter", EngineConfig(precision="fp32"), use_gpu=False)
    prompts = [tuple(range(10, 10 + length)) for length in (5, 14)]
    try:
        answers = engine.generate([GenerationRequest(prompt, 8) for prompt in prompts])
    finally:
        engine.close()
    for prompt, generation in zip(prompts, answers, strict=True):
        how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
        expected_ids, other = (
            m.generate(input_ids=torch.tensor([prompt]), **how)[0, len(prompt) :] for m in (offline, plain)
        )
        assert generation.token_ids == tuple(expected_ids.tolist())
        assert expected_ids.tolist() != other.tolist()
