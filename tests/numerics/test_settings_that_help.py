"""Settings that change what is computed, each by its effect: schedule, noise, learning rates of an adapter, frozen weights.

Every one is exact across a restart; on another number of workers the tolerances are those of test_elastic.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Jobs, Run, export_digest, exported, first_steps, largest_difference, losses
from worker import KILLED

from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError
from forge_ray.train.freezing import freeze_weights, frozen_names
from forge_ray.train.loss import token_logps
from forge_ray.train.neftune import add_noise
from forge_ray.train.schedule import learning_rate
from forge_ray.train.weights import load

pytestmark = pytest.mark.numerics
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch", "zero_stage": 0},
    **{f"zero{stage}": {"zero_stage": stage} for stage in range(4)},
}
WSD = {"name": "wsd", "decay_ratio": 0.5, "warmup_ratio": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "neftune": {"neftune_alpha": 5.0, "schedule": WSD},
    "loraplus": {"adapter": {"r": 4, "lr_ratio": 8.0}, "neftune_alpha": 5.0},
    "freeze": {"freeze": ["embed_tokens", "layers.0"]},
    "saved": {"adapter": {"r": 4, "modules_to_save": ["lm_head", "embed_tokens"]}, "neftune_alpha": 5.0},
}


def cases(*quick: str) -> list[Any]:
    every = [f"{engine}-{name}" for engine in ENGINES for name in SETTINGS]
    return [pytest.param(case, marks=() if case in quick else pytest.mark.large) for case in every]


@pytest.mark.parametrize(
    "case", cases("torch-neftune", "torch-loraplus", "zero2-loraplus", "zero3-loraplus", "zero2-freeze", "zero3-saved")
)
def test_resume_is_bit_identical(case: str, jobs: Jobs, run: Run) -> None:
    engine, _, name = case.partition("-")
    whole = jobs(f"extra-{case}", max_steps=3, checkpoint={"every_steps": 1}, **ENGINES[engine], **SETTINGS[name])
    broken = replace(whole, run=f"{whole.run}-broken", name=f"{whole.run}-broken")
    run(whole, ranks=2)
    run(broken, ranks=2, kill_at=3, expect=KILLED)
    run(broken, ranks=2)
    assert first_steps(broken) == [0, 2]
    assert losses(broken) == losses(whole)
    assert export_digest(broken) == export_digest(whole)


def test_adafactor_resumes_bit_identical_and_steps_in_proportion(jobs: Jobs, run: Run, tiny_model_dir: Path) -> None:
    """A restart in each precision; two steps move each weight by at most the rate, of its own size."""
    from transformers import LlamaForCausalLM

    options: dict[str, Any] = {"optimizer": {"name": "adafactor", "lr": 1e-2, "weight_decay": 0.1}, **ENGINES["torch"]}
    for precision in ("fp32", "bf16"):
        whole = jobs(f"factor-{precision}", precision, max_steps=3, checkpoint={"every_steps": 1}, **options)
        broken = replace(whole, run=f"{whole.run}-broken", name=f"{whole.run}-broken")
        run(whole)
        run(broken, kill_at=3, expect=KILLED)
        run(broken)
        assert first_steps(broken) == [0, 2]
        assert losses(broken) == losses(whole)
        assert export_digest(broken) == export_digest(whole)
    before = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    first = load(jobs("factor-fp32", max_steps=3, checkpoint={"every_steps": 1}, **options), 2, torch.device("cpu"))
    moved = [
        float(((after - weight).square().mean().sqrt() / weight.square().mean().sqrt()).detach())
        for (_, weight), (_, after) in zip(before.named_parameters(), first.named_parameters(), strict=True)
    ]
    assert all(0.001 < share < 0.04 for share in moved)


def test_wsd_rates_reach_the_optimizer(jobs: Jobs, run: Run) -> None:
    settings = {**ENGINES["torch"], "max_steps": 4, "optimizer": {"lr": 1e-3}}
    wsd = jobs("wsd-wsd", schedule=WSD, **settings)
    constant = jobs("wsd-constant", schedule={"name": "constant", "warmup_ratio": 0}, **settings)
    run(wsd, constant)
    assert losses(wsd, "lr") == [learning_rate(step, 4, 1e-3, wsd.config.schedule) for step in range(4)]
    assert losses(wsd)[:3] == losses(constant)[:3]
    assert losses(wsd)[3] != losses(constant)[3]  # the third step is the first of the decay


class Echo(torch.nn.Module):
    """Embeddings as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding(10, 400)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        embedded: torch.Tensor = self.embeddings(input_ids)
        return embedded


def test_neftune_noise_is_uniform_and_scaled_by_the_length_of_its_document() -> None:
    torch.manual_seed(0)
    model = Echo().train()
    ids, edges = torch.zeros(1, 104, dtype=torch.long), torch.tensor([0, 4, 104], dtype=torch.int32)
    plain = model(ids, cu_seq_lens_q=edges)
    add_noise(model, 6.0)
    state = torch.get_rng_state()
    noise = (model(ids, cu_seq_lens_q=edges) - plain).detach()[0]
    for part, length in ((noise[:4], 4), (noise[4:], 100)):
        scale = 6.0 / (length * 400) ** 0.5
        assert 0.99 * scale < float(part.abs().max()) <= scale * (1 + 1e-5)
        assert float(part.std()) == pytest.approx(scale / 3**0.5, rel=0.05)
        assert abs(float(part.mean())) < 0.05 * scale
    torch.set_rng_state(state)
    assert torch.equal((model(ids, cu_seq_lens_q=edges) - plain).detach()[0], noise)
    assert torch.equal(model.eval()(ids, cu_seq_lens_q=edges), plain)


def test_neftune_changes_training_and_leaves_validation_alone(jobs: Jobs, run: Run) -> None:
    """A learning rate next to nothing: the weights stay, so that validation losses agree and training losses do not."""
    settings = {"max_steps": 2, "optimizer": {"lr": 1e-12}, "validation": {"every_steps": 1, "max_rows": 3}}
    runs = [
        jobs(f"noise-{alpha}-{engine}", neftune_alpha=alpha, **settings, **ENGINES[engine])
        for engine in ("torch", "zero2")
        for alpha in (0.0, 5.0)
    ]
    run(*runs)
    for plain, noisy in (runs[:2], runs[2:]):
        assert losses(noisy, "validation_loss") == pytest.approx(losses(plain, "validation_loss"), rel=1e-6)
        assert all(abs(one - other) > 1e-4 for one, other in zip(losses(plain), losses(noisy), strict=True))
    assert losses(runs[1]) == pytest.approx(losses(runs[3]), rel=2e-6)  # both engines draw the same noise


def test_repeated_step_sees_the_same_noise(jobs: Jobs, run: Run) -> None:
    once, twice = (jobs(f"noise-again-{name}", neftune_alpha=5.0, max_steps=2, **ENGINES["torch"]) for name in "ab")
    run(once)
    run(twice, faults={"nan": {1: 1}})
    assert losses(twice) == losses(once)
    assert export_digest(twice) == export_digest(once)


def test_neftune_works_with_recomputed_activations(jobs: Jobs, run: Run) -> None:
    settings = {"neftune_alpha": 5.0, "adapter": {"r": 4, "dropout": 0.1}, "max_steps": 2, **ENGINES["torch"]}
    kept, again = (jobs(f"noise-recomputed-{on}", activation_checkpointing=on, **settings) for on in (False, True))
    run(kept, again)
    assert losses(again) == losses(kept)
    assert export_digest(again) == export_digest(kept)


def test_lr_ratio_is_that_of_b_over_a(jobs: Jobs, run: Run) -> None:
    """AdamW's first step is the learning rate for every weight with a gradient; B starts at zero, so A has one in the second
    step only. Without decay B of one step is `lr` times the ratio."""
    settings = {"max_steps": 1, "optimizer": {"lr": 1e-4, "eps": 1e-12}, "schedule": {"warmup_ratio": 0}, "max_grad_norm": 0}
    for engine in ("torch", "zero2", "zero3"):
        for ratio in (1.0, 8.0):
            job = jobs(f"ratio-{engine}-{ratio}", adapter={"r": 4, "lr_ratio": ratio}, **settings, **ENGINES[engine])
            run(job)
            up = torch.cat([value.flatten() for name, value in exported(job).items() if ".lora_B." in name])
            assert float(up.abs().median()) == pytest.approx(1e-4 * ratio, rel=1e-3), engine


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        pytest.param(name, stage, marks=() if (name, stage) == ("plus", 3) else pytest.mark.large)
        for name in ("plus", "freeze")
        for stage in (1, 2, 3)
    ],
)
def test_groups_of_weights_reshard(name: str, stage: int, jobs: Jobs, run: Run) -> None:
    """Two workers, then one, then three: each group keeps its rate, its moments and its own count of steps."""
    settings = {"plus": {"adapter": {"r": 4, "lr_ratio": 8.0}}, "freeze": SETTINGS["freeze"]}[name]
    steady, moved = (
        jobs(f"{kind}-{name}-{stage}", max_steps=3, checkpoint={"every_steps": 1}, zero_stage=stage, **settings)
        for kind in ("steady", "moved")
    )
    run(steady, ranks=2)
    run(moved, ranks=2, kill_at=2, expect=KILLED)
    run(moved, ranks=1, kill_at=3, expect=KILLED)
    run(moved, ranks=3)
    assert first_steps(moved) == [0, 1, 2]
    assert losses(moved) == pytest.approx(losses(steady), rel=2e-6)
    assert largest_difference(exported(moved), exported(steady)) < 5e-5


def test_engines_agree_on_loraplus(jobs: Jobs, run: Run) -> None:
    runs = [jobs(f"agree-{name}", adapter={"r": 4, "lr_ratio": 8.0}, max_steps=3, **one) for name, one in ENGINES.items()]
    run(*runs, ranks=2)
    for job in runs[1:]:
        assert losses(job) == pytest.approx(losses(runs[0]), rel=2e-6), job.run
        assert largest_difference(exported(job), exported(runs[0])) < 5e-5, job.run
        of_checkpoint = {n: p.detach() for n, p in load(job, 3, torch.device("cpu")).named_parameters() if p.requires_grad}
        assert len(of_checkpoint) == len(exported(job))
        for name, weight in exported(job).items():
            place = name.replace(".weight", ".default.weight")
            torch.testing.assert_close(of_checkpoint[place], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("engine", ["torch", "zero2", "zero3"])
def test_frozen_weights_stay_and_have_no_state(engine: str, jobs: Jobs, run: Run, tiny_model_dir: Path) -> None:
    from safetensors.torch import load_file

    job = jobs(f"frozen-{engine}", freeze=["embed_tokens", "layers.0", "down_proj"], max_steps=1, **ENGINES[engine])
    run(job)
    base = {name: value.float() for path in tiny_model_dir.glob("*.safetensors") for name, value in load_file(path).items()}
    after = exported(job)
    assert base.keys() <= after.keys()  # whole
    unchanged = {name for name, value in base.items() if torch.equal(value, after[name])}
    named = {name for name in base if "embed_tokens" in name or ".layers.0." in name or "down_proj" in name}
    assert named == unchanged
    folder = job.store.local(f"runs/{job.run}/checkpoints/step-00000001")
    if engine == "torch":
        state = torch.load(folder / "state.pt", weights_only=True)
        assert not named & state["weights"].keys()
        assert len(state["optimizer"]["state"]) == len(state["weights"])
    trained = sum(value.numel() for name, value in base.items() if name not in named)
    size = sum(path.stat().st_size for path in folder.rglob("*.pt") if "rng" not in path.name)
    assert size < 16 * trained + 30_000  # weights, fp32 copy and two moments of what is trained


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"freeze": ["q_prj"]}, "'q_prj' matches nothing of this model's text", "embed_tokens, lm_head, norm, layers.0, "),
        ({"freeze": ["model", "lm_head"]}, "leaves no weight of this model to train", "name fewer"),
    ],
)
def test_pattern_that_cannot_be_honoured_is_refused(
    settings: dict[str, Any], message: str, hint: str, tiny_model_dir: Path
) -> None:
    from forge_ray.models.architecture import empty_model

    with pytest.raises(ConfigError, match=message) as error:
        freeze_weights(empty_model(tiny_model_dir), parse(TrainConfig, settings))
    assert hint in error.value.hint


def test_either_name_of_a_tied_weight_freezes_it() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    for pattern in ("lm_head", "embed_tokens"):
        with torch.device("meta"):
            tied: Any = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
        freeze_weights(tied, parse(TrainConfig, {"freeze": [pattern]}))
        assert frozen_names(tied) == {"model.embed_tokens.weight"}


def test_noise_is_over_whole_documents_of_a_batch() -> None:
    """What the loss hands to the model has the bounds of its documents, which the noise is scaled by."""
    handed: dict[str, Any] = {}

    def forward(**inputs: Any) -> Any:
        handed.update(inputs)
        raise StopIteration

    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "loss_mask": torch.ones(2, 4, dtype=torch.long)}
    batch["position_ids"] = torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]])
    with pytest.raises(StopIteration):
        token_logps(forward, batch)
    assert handed["cu_seq_lens_q"].tolist() == [0, 3, 4, 6, 8]


def test_modules_to_save_are_trained_in_full_exported_and_merged(jobs: Jobs, run: Run, tiny_model_dir: Path) -> None:
    """In every engine alike; the merged export has the adapter's own embedding and output, and the base's norm."""
    from safetensors.torch import load_file

    engines = ("torch", "zero2", "zero3")
    settings: dict[str, Any] = {"adapter": SETTINGS["saved"]["adapter"], "max_steps": 2}
    runs = {name: jobs(f"saved-{name}", **settings, **ENGINES[name]) for name in engines}
    merged = jobs("saved-merged", export="merged", **settings, **ENGINES["torch"])
    run(*runs.values(), merged)
    base = {name: value.float() for path in tiny_model_dir.glob("*.safetensors") for name, value in load_file(path).items()}
    weights, whole = exported(runs["torch"]), exported(merged)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert float((weights[f"base_model.model.{name}"] - base[name]).abs().max()) > 1e-4
        torch.testing.assert_close(whole[name], weights[f"base_model.model.{name}"])
    assert torch.equal(whole["model.norm.weight"], base["model.norm.weight"])
    assert len(weights) == 2 + 2 * 7 * 2
    for name in engines[1:]:
        assert losses(runs[name]) == pytest.approx(losses(runs["torch"]), rel=2e-6)
        assert largest_difference(exported(runs[name]), weights) < 1e-5
    assert merged.store.read_json(f"runs/{merged.run}/export/config.json")["tie_word_embeddings"] is False


def test_adapter_with_saved_modules_is_trained_on(jobs: Jobs, run: Run, tiny_model_dir: Path) -> None:
    """`init_from: continue` begins with the saved modules of the adapter, too."""
    from forge_ray.train.adapter import load_weights, with_adapter

    job = jobs("saved-before", adapter=SETTINGS["saved"]["adapter"], max_steps=1, **ENGINES["torch"])
    run(job)
    from transformers import LlamaForCausalLM

    assert job.config.adapter is not None
    model = with_adapter(LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), job.config.adapter)
    load_weights(model, job.store.local(f"runs/{job.run}/export"))
    named = dict(model.named_parameters())
    saved = named["base_model.model.lm_head.modules_to_save.default.weight"]
    assert torch.equal(saved, exported(job)["base_model.model.lm_head.weight"])
