"""One process: accumulation, the golden trajectory, and what must stop a run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Jobs, Run, export_digest, exported, largest_difference, losses

from forge_ray.data.tokens.chat import load_tokenizer_dir
from forge_ray.errors import TrainingError
from forge_ray.train import loop

pytestmark = pytest.mark.numerics
GOLDEN = Path(__file__).parent / "golden" / "sft_tiny.json"
TORCH = {"engine": "torch", "zero_stage": 0}


def test_golden_trajectory(jobs: Jobs, run: Run) -> None:
    """The losses of twelve steps are those of the committed file, on any CPU, to 1e-4.

    After a change that is meant to move them: `FORGE_REGENERATE=1 pytest tests/numerics/test_training.py -k golden`, and say
    in the commit why they moved.
    """
    settings = {"max_steps": 12, "validation": {"every_steps": 6, "max_rows": 3}}
    full = jobs("golden-full", **TORCH, **settings)
    lora = jobs("golden-lora", zero_stage=2, adapter={"r": 4}, **settings)
    run(full, lora)
    trajectories = {
        job.run: {name: losses(job, name) for name in ("loss", "grad_norm", "validation_loss", "lr")} for job in (full, lora)
    }
    if os.environ.get("FORGE_REGENERATE"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(trajectories, indent=1) + "\n")
    expected = json.loads(GOLDEN.read_text())
    assert trajectories.keys() == expected.keys()
    for name, values in expected.items():
        for kind, trajectory in values.items():
            assert trajectories[name][kind] == pytest.approx(trajectory, rel=1e-4), (name, kind)


@pytest.mark.parametrize("engine", [TORCH, {"zero_stage": 2}], ids=["torch", "zero2"])
def test_gradient_accumulation_matches_one_large_batch(jobs: Jobs, run: Run, engine: dict[str, object]) -> None:
    """Eight micro-batches of one row equal one micro-batch of eight rows: weights to 1e-6.

    With AdamW's usual eps of 1e-8 they differ by 2e-6: a gradient that is nothing but rounding is divided by its own size.
    """
    optimizer = {"lr": 1e-3, "eps": 1e-4}
    name = f"accumulate-{engine.get('engine', 'zero2')}"
    runs = [
        jobs(f"{name}-{size}", global_batch=8, micro_batch_size=size, max_steps=3, optimizer=optimizer, **engine)
        for size in (1, 2, 8)
    ]
    run(*runs)
    for other in runs[1:]:
        assert losses(runs[0]) == pytest.approx(losses(other), rel=1e-6)
        assert largest_difference(exported(runs[0]), exported(other)) < 1e-6


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(("torch-lora", "zero2-full", "zero3-lora"), id="each engine"),
        pytest.param(("torch-full", "zero2-lora", "zero3-full"), id="the other pairs", marks=pytest.mark.large),
    ],
)
def test_activation_checkpointing_is_bit_identical(chosen: tuple[str, ...], jobs: Jobs, run: Run) -> None:
    """`large` repeats for the other pairs of engine and method what the quick suite shows of each engine and each method."""
    engines = {"torch": TORCH, "zero2": {"zero_stage": 2}, "zero3": {"zero_stage": 3}}
    methods: dict[str, Any] = {"full": None, "lora": {"r": 4, "dropout": 0.1}}
    kinds: dict[str, dict[str, Any]] = {
        kind: {"adapter": methods[kind.partition("-")[2]], "max_steps": 3, **engines[kind.partition("-")[0]]}
        for kind in chosen
    }
    kept = [jobs(f"activations-kept-{name}", **kind) for name, kind in kinds.items()]
    again = [jobs(f"activations-again-{name}", activation_checkpointing=True, **kind) for name, kind in kinds.items()]
    run(*kept, *again)
    for plain, recomputed in zip(kept, again, strict=True):
        assert losses(recomputed) == losses(plain), plain.run
        assert export_digest(recomputed) == export_digest(plain), plain.run


@pytest.mark.parametrize("engine", [TORCH, pytest.param({"zero_stage": 2}, marks=pytest.mark.large)], ids=["torch", "zero2"])
def test_compiled_blocks_match_eager(jobs: Jobs, run: Run, engine: dict[str, Any]) -> None:
    """`large` repeats it under DeepSpeed, which gets the blocks of the model as they were compiled."""
    name = engine.get("engine", "zero2")
    plain, compiled = (
        jobs(f"compile-{on}-{name}", adapter={"r": 4}, compile=on, max_steps=2, **engine) for on in (False, True)
    )
    run(plain, compiled)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    assert largest_difference(exported(compiled), exported(plain)) < 1e-5


def test_one_step_matches_plain_torch(jobs: Jobs, run: Run, tiny_model_dir: Path) -> None:
    """One step of the run, by hand: AdamW on the gradient scaled to the norm allowed."""
    from conftest import SEQUENCE_LENGTH
    from transformers import LlamaForCausalLM

    from forge_ray.data.dataset.order import order_of
    from forge_ray.data.dataset.stream import Rows

    options = {"lr": 1e-2, "eps": 1.0, "weight_decay": 0.1}  # an eps so large that AdamW feels the scale of the gradient
    job = jobs("by-hand", max_steps=1, optimizer=options, max_grad_norm=0.5, schedule={"warmup_ratio": 0}, **TORCH)
    run(job)

    rows = Rows.of(job.store, job.dataset, "train")
    order = order_of(job.dataset, "train", 0, 4)
    batch = {name: torch.from_numpy(value) for name, value in rows.batch(order.rows_of(0, range(4))).items()}
    assert batch["input_ids"].shape == (4, SEQUENCE_LENGTH)
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).train()
    labels = batch["input_ids"].masked_fill(batch["loss_mask"] == 0, -100)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), **options)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()

    assert losses(job) == pytest.approx([float(loss.detach())], rel=1e-6)
    assert losses(job, "grad_norm") == pytest.approx([float(norm)], rel=1e-5)
    expected = {name: value.detach() for name, value in model.named_parameters() if name != "lm_head.weight"}
    actual = {name: value for name, value in exported(job).items() if name != "lm_head.weight"}
    assert largest_difference(actual, expected) < 1e-6


@pytest.mark.parametrize("engine", [TORCH, {"zero_stage": 0}, {"zero_stage": 2}], ids=["torch", "zero0", "zero2"])
def test_diverging_run_is_stopped(jobs: Jobs, run: Run, engine: dict[str, object]) -> None:
    job = jobs(f"diverges-{engine}", optimizer={"lr": 1e30}, max_grad_norm=0, max_steps=6, **engine)
    run(job, expect=1, says="steps in a row had no finite result")
    assert not job.store.exists(f"runs/{job.run}/export")
    assert not job.store.list(f"runs/{job.run}/checkpoints", recursive=True)


def test_loop_runs_in_process(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without workers, Ray or DeepSpeed: for a debugger. The error names the step, the values and the remedy."""
    monkeypatch.delenv("RANK", raising=False)
    good = jobs("in-process", max_steps=2, scaling={"num_workers": 0}, **TORCH)
    good = replace(good, dataset=good.dataset.model_copy(update={"config": {"tools": "text"}}))
    loop.train_loop(good.to_json())
    assert len(losses(good)) == 2
    result = good.store.read_json(f"runs/{good.run}/result.json")
    assert (result["num_steps"], result["samples_seen"], result["export_kind"]) == (2, 8, "full")
    assert good.store.exists(f"runs/{good.run}/loss.png")
    # the export says how its dataset writes tools
    assert load_tokenizer_dir(good.store.fetch_dir(f"runs/{good.run}/export")).call_style == "hermes"

    bad = replace(good, run="in-process-bad", config=good.config.model_copy(update={"max_grad_norm": 0.0, "max_steps": 6}))
    bad = replace(
        bad, config=bad.config.model_copy(update={"optimizer": bad.config.optimizer.model_copy(update={"lr": 1e30})})
    )
    with pytest.raises(TrainingError, match=r"3 steps in a row had no finite result") as raised:
        loop.train_loop(bad.to_json())
    assert "train.optimizer.lr=1e+30" in raised.value.hint
