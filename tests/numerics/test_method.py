"""The seam of a training method: what is not supervised fine-tuning goes through the same loop, with all its guarantees."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import Jobs, Run, export_digest, exported, first_steps, largest_difference, losses

from forge_ray.data.dataset.order import order_of
from forge_ray.data.dataset.stream import Rows
from forge_ray.train import incidents, metrics
from forge_ray.train.audit import DataFacts, audit
from forge_ray.train.job import TrainJob

pytestmark = pytest.mark.numerics
TORCH: dict[str, Any] = {"engine": "torch", "zero_stage": 0, "optimizer": {"lr": 1e-3, "eps": 1e-6}}
LOOKING: dict[str, Any] = {"validation": {"every_steps": 2, "max_rows": 3}, "max_steps": 4}


def facts_of(job: TrainJob) -> DataFacts:
    order = order_of(job.dataset, "train", job.config.seed, job.config.global_batch)
    lines = metrics.read(job.store.local(f"runs/{job.run}") / metrics.METRICS)
    result = job.store.read_json(f"runs/{job.run}/result.json")
    return DataFacts(
        job.run, Rows.of(job.store, job.dataset, "train"), order, result["num_steps"], result["order_digest"], lines
    )


def test_pairs_in_a_row_do_not_depend_on_passes_or_workers(jobs: Jobs, run: Run) -> None:
    """Divided by pairs, with tokens still reported; the method's own metric in training and validation."""
    one = jobs("pairs-one", **TORCH, **LOOKING)
    three = jobs("pairs-three", **TORCH, **LOOKING, micro_batch_size=3)
    two = jobs("pairs-two", **TORCH, **LOOKING)
    run(one, three, method="pairs")
    run(two, ranks=2, method="pairs")
    tuned = jobs("pairs-usual", **TORCH, **LOOKING)
    run(tuned)
    assert losses(one, "trained_tokens") == losses(tuned, "trained_tokens")
    for other in (three, two):
        for name in ("loss", "margin", "validation_loss", "validation_margin"):
            assert losses(other, name) == pytest.approx(losses(one, name), rel=1e-4, abs=1e-5), (other.run, name)
        assert largest_difference(exported(other), exported(one)) < 1e-5
    assert len(set(losses(one))) == 4


def test_rows_made_in_the_step_are_part_of_the_chain_and_resume_exactly(jobs: Jobs, run: Run) -> None:
    settings = TORCH | {"checkpoint": {"every_steps": 2}, "max_steps": 5, "global_batch": 3}
    whole, killed = jobs("made-whole", **settings), jobs("made-killed", **settings)
    run(whole, ranks=2, method="pairs")
    run(killed, ranks=2, kill_at=4, expect=23, method="pairs")
    run(killed, ranks=2, method="pairs")
    assert first_steps(killed) == [0, 2]
    assert export_digest(killed) == export_digest(whole)
    facts = facts_of(whole)
    assert facts_of(killed).order_digest == facts.order_digest != facts.order.digest(5)
    assert audit(facts, lambda *_: None).problems == ()
    forged = [line | ({"derived": "sha256:0"} if line["step"] == 3 else {}) for line in facts.lines]
    (problem,) = audit(replace(facts, lines=forged), lambda *_: None).problems
    assert "the order's digest" in problem


def test_row_left_out_weighs_nothing(jobs: Jobs, run: Run) -> None:
    plain, without = jobs("pairs-plain", **TORCH, max_steps=1), jobs("pairs-without", **TORCH, max_steps=1)
    order = order_of(plain.dataset, "train", plain.config.seed, plain.config.global_batch)
    left_out = order.rows_of(0, range(1))
    incidents.write(without.store, without.run, "quarantine", 1, rows=left_out, records=[], error="a test")
    run(plain, without, method="pairs")
    assert losses(without) != losses(plain)
    assert losses(without, "tokens")[0] < losses(plain, "tokens")[0]
    assert losses(without, "rows_sum") == losses(plain, "rows_sum")  # it was read all the same


def test_column_that_nobody_declared_is_refused(jobs: Jobs, run: Run) -> None:
    run(jobs("pairs-undeclared", **TORCH), method="pairs", expect=1, says="its training method declares")


def test_validation_of_made_columns_is_refused(jobs: Jobs, run: Run) -> None:
    job = jobs("made-validated", **TORCH, **LOOKING)
    run(job, method="pairs", expect=1, says="set train.validation.max_rows=0")
    assert json.loads(job.store.read(f"runs/{job.run}/metrics.jsonl").splitlines()[0])["step"] == 1
