"""Validation while training: the same loss from a checkpoint, the best one kept, and an end that a resume agrees with."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Jobs, Run, export_digest, exported, first_steps, losses
from worker import KILLED

from forge_ray.data.dataset.order import order_of
from forge_ray.data.dataset.stream import Rows
from forge_ray.errors import NotFound, StoreError, TrainingError
from forge_ray.records import files_digest
from forge_ray.store import paths
from forge_ray.train import audit, checkpoint, metrics, validation, weights
from forge_ray.train.job import TrainJob

pytestmark = pytest.mark.numerics
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch", "zero_stage": 0},
    **{f"zero{stage}": {"zero_stage": stage} for stage in (0, 2, 3)},
}
LOOKING = {"validation": {"every_steps": 2, "max_rows": 5}, "checkpoint": {"every_steps": 2}}
# the loss rises: a learning rate that a tiny model cannot take
WORSE = {
    "optimizer": {"lr": 0.3},
    "schedule": {"name": "constant", "warmup_ratio": 0.0},
    "guards": {"spike": None},
    "engine": "torch",
    "zero_stage": 0,
    "max_steps": 12,
}
STOPPING: dict[str, Any] = {
    "validation": {"every_steps": 2, "max_rows": 5, "early_stopping": {"patience": 2}, "keep_best": True},
    "checkpoint": {"every_steps": 2, "keep": 2},
}


def folder(job: TrainJob) -> str:
    return f"runs/{job.run}"


def result(job: TrainJob) -> dict[str, Any]:
    facts: dict[str, Any] = job.store.read_json(f"{folder(job)}/result.json")
    return facts


def test_checkpoint_alone_gives_the_same_loss_and_export(jobs: Jobs, run: Run) -> None:
    """Any engine and stage, full and LoRA: validated and exported without the workers that wrote it."""
    from forge_ray.train.validating import validate_checkpoint
    from forge_ray.train.weights import export_checkpoint

    kinds = {
        f"{engine}-{name}": options | {"adapter": adapter}
        for engine, options in ENGINES.items()
        for name, adapter in (("full", None), ("lora", {"r": 4, "dropout": 0.1}))
        if not (engine in ("torch", "zero0") and adapter)  # the names of an adapter are the same at every stage
    }
    tasks = {kind: jobs(f"apart-{kind}", **options, **LOOKING) for kind, options in kinds.items()}
    tasks["bf16"] = jobs("apart-bf16", precision="bf16", zero_stage=2, adapter={"r": 4}, **LOOKING)
    tasks["bf16-full"] = jobs("apart-bf16-full", precision="bf16", zero_stage=3, **LOOKING)
    run(*tasks.values(), ranks=2)
    for kind, job in tasks.items():
        inside = {item.step: item.loss for item in validation.read(job.store, job.run)}
        assert list(inside) == [2, 4], kind
        assert inside[4] == losses(job, "validation_loss")[-1], kind
        validate_checkpoint(job.to_json(), 2)
        outside = {item.step: item.loss for item in validation.read(job.store, job.run) if item.background}
        assert outside[2] == pytest.approx(inside[2], abs=1e-6 if job.precision == "fp32" else 2e-3), kind
        export_checkpoint(job.to_json(), 4, f"{folder(job)}/exports/step-4")
        ours, theirs = (job.store.files(f"{folder(job)}/{name}") for name in ("exports/step-4", "export"))
        assert files_digest(ours) == files_digest(theirs), kind


def test_unverified_checkpoint_is_not_opened(jobs: Jobs, run: Run) -> None:
    from forge_ray.train.validating import validate_checkpoint

    job = jobs("changed", engine="torch", zero_stage=0, **LOOKING)
    run(job)
    path = job.store.local(paths.checkpoints(job.run, "step-00000002", "state.pt"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="sha256"):
        validate_checkpoint(job.to_json(), 2)
    with pytest.raises(NotFound, match="no checkpoint of step 3") as caught:
        validate_checkpoint(job.to_json(), 3)
    assert "4, 2" in caught.value.hint
    other = replace(job, config=job.config.model_copy(update={"seed": 9}))
    with pytest.raises(StoreError, match="config_digest"):
        validate_checkpoint(other.to_json(), 4)


def test_early_stopped_run_equals_a_shorter_run(jobs: Jobs, run: Run) -> None:
    """Stopped at the second validation that is no better; the best checkpoint stays; a resume decides the same, also when it
    was killed after the last checkpoint."""
    job = jobs("early", **WORSE, **STOPPING)
    run(job)
    outcome = result(job)
    stopped = outcome["stopped_early"]
    assert stopped is not None
    step = stopped["step"]
    scores = validation.read(job.store, job.run)
    best = validation.best(scores)
    assert best is not None
    assert step == best.step + 4 < stopped["of"] == 12
    assert f"step {best.step} in 2 validations" in stopped["why"]
    assert (outcome["num_steps"], outcome["samples_seen"]) == (step, 4 * step)
    assert checkpoint.steps(job.store, job.run) == [step, step - 2, best.step]
    assert validation.best_step(job.store, job.run) == best.step

    rows = Rows.of(job.store, job.dataset, "train")
    order = order_of(job.dataset, "train", job.config.seed, 4)
    assert outcome["order_digest"] == order.digest(step)
    lines = metrics.read(job.store.local(folder(job)) / metrics.METRICS)
    facts = audit.DataFacts(job.run, rows, order, step, outcome["order_digest"], lines)
    assert audit.audit(facts, lambda done, total, text: None).problems == ()

    short = jobs("early-short", **WORSE | {"max_steps": step}, **LOOKING)
    run(short)
    assert export_digest(short) == export_digest(job)

    for number, (at, when) in enumerate([(step, "append"), (step, "report")]):
        killed = replace(job, run=f"early-killed-{number}")
        run(killed, kill_at=at, kill_in=when, expect=KILLED)
        assert not killed.store.exists(f"{folder(killed)}/result.json")
        run(killed)
        assert first_steps(killed) == [0, step if when == "report" else step - 2]
        assert result(killed)["stopped_early"] == stopped
        assert result(killed)["order_digest"] == outcome["order_digest"]
        assert export_digest(killed) == export_digest(job)

    never_better = {"early_stopping": {"patience": 2, "min_delta": 1000}}
    two = jobs("early-two-ranks", **WORSE, **STOPPING | {"validation": STOPPING["validation"] | never_better})
    run(two, ranks=2)
    assert result(two)["num_steps"] == 6


def test_best_checkpoint_is_exported(jobs: Jobs, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from forge_ray.release import candidates

    options = WORSE | {"max_steps": 8, "export_step": "best", "scaling": {"num_workers": 0}}
    job = jobs("best", **options, **LOOKING)
    run(job)
    assert not job.store.exists(f"{folder(job)}/export")
    best = validation.best(validation.read(job.store, job.run))
    assert best is not None
    assert best.step < 8
    candidates.export_best(job)
    assert result(job)["export_step"] == best.step
    short = jobs("best-short", **WORSE | {"max_steps": best.step}, **LOOKING)
    run(short)
    assert exported(job).keys() == exported(short).keys()
    assert export_digest(job) == export_digest(short)
    digest = export_digest(job)
    shutil.rmtree(job.store.local(paths.checkpoint(job.run, best.step)))
    candidates.export_best(job)  # done once
    assert export_digest(job) == digest
    job.store.delete_dir(f"{folder(short)}/validations")
    with pytest.raises(TrainingError, match="no checkpoint of best-short was validated") as caught:
        candidates.export_best(replace(short, config=job.config))
    assert "forge runs export" in caught.value.hint
    monkeypatch.setattr(weights, "of_checkpoint", lambda folder, position: {})
    with pytest.raises(TrainingError, match="has no weight"):
        weights.load(short, best.step, torch.device("cpu"))
