"""What the guards do when a step has no finite result, when the loss rises, and when a row makes a worker fail."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import Jobs, Run, export_digest, exported, first_steps, losses
from worker import KILLED

from forge_ray.train import incidents, metrics
from forge_ray.train.job import TrainJob

pytestmark = pytest.mark.numerics
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch", "zero_stage": 0},
    **{f"zero{stage}": {"zero_stage": stage} for stage in range(4)},
}
DROPOUT = {"r": 4, "dropout": 0.2}
KINDS = {("fp32", "torch"), ("fp32", "zero0"), ("fp32", "zero2"), ("fp32", "zero3"), ("bf16", "torch"), ("bf16", "zero1")}
ALL_KINDS = {("fp32", name) for name in ENGINES} | {("bf16", name) for name in ("zero1", "zero2", "zero3", "torch")}


def told(job: TrainJob) -> list[incidents.Incident]:
    return incidents.read(job.store, job.run)


def lines(job: TrainJob) -> list[dict[str, Any]]:
    return metrics.read(job.store.local(f"runs/{job.run}") / metrics.METRICS)


@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [
        pytest.param(2, KINDS, id="two ranks"),
        pytest.param(2, ALL_KINDS - KINDS, id="two ranks, the others", marks=pytest.mark.large),
        pytest.param(1, ALL_KINDS, id="one rank", marks=pytest.mark.large),
    ],
)
def test_retried_step_is_bit_identical(ranks: int, kinds: set[tuple[str, str]], jobs: Jobs, run: Run) -> None:
    """Computed again from the same random state: with dropout it would show. Every engine leaves the update out.

    `large` repeats for ZeRO 1 and 2, which share their code, and for one rank what the quick suite shows of two.
    """
    pairs = [
        tuple(
            jobs(f"{what}-{name}-{precision}-{ranks}", precision, adapter=DROPOUT, max_steps=3, **ENGINES[name])
            for what in ("sound", "recovered")
        )
        for precision, name in sorted(kinds)
    ]
    run(*(sound for sound, _ in pairs), ranks=ranks)
    run(*(hurt for _, hurt in pairs), ranks=ranks, faults={"nan": {2: 1}})
    for sound, hurt in pairs:
        (incident,) = told(hurt)
        assert (incident["kind"], incident["step"], incident["first"]) == ("recovered", 2, "nan"), hurt.run
        assert export_digest(hurt) == export_digest(sound), hurt.run


@pytest.mark.parametrize("name", ["torch", "zero2", "zero3"])
def test_non_finite_step_is_skipped_and_its_records_are_named(name: str, jobs: Jobs, run: Run) -> None:
    job = jobs(f"skipped-{name}", max_steps=3, **ENGINES[name])
    run(job, ranks=2, faults={"nan": {2: 9}})
    (incident,) = told(job)
    assert (incident["kind"], incident["step"], incident["same_again"]) == ("not_finite", 2, True)
    assert len(incident["rows"]) == len(incident["records"]) == job.config.global_batch
    assert all(record.startswith("rec_") for row in incident["records"] for record in row)
    assert [line["step"] for line in lines(job) if "left_out" in line] == [2]
    assert len(losses(job)) == 2
    result = job.store.read_json(f"runs/{job.run}/result.json")
    assert result["metrics"]["steps_left_out"] == 1
    assert all(bool(value.isfinite().all()) for value in exported(job).values())


def test_too_many_skipped_steps_end_the_run(jobs: Jobs, run: Run) -> None:
    job = jobs("too-many", max_steps=8, **ENGINES["torch"])
    printed = run(job, faults={"nan": dict.fromkeys((1, 2, 4, 6), 9)}, expect=1, says="4 steps had no finite result, of 8")
    assert "more than train.guards.max_skipped=0.01" in printed
    assert [incident["step"] for incident in told(job)] == [1, 2, 4, 6]


def test_consecutive_or_final_non_finite_steps_end_the_run(jobs: Jobs, run: Run) -> None:
    says = "3 steps in a row had no finite result, the last with loss=nan: it is the weights"
    run(jobs("in-a-row", max_steps=8, **ENGINES["torch"]), faults={"nan": dict.fromkeys((2, 3, 4), 9)}, expect=1, says=says)
    last = jobs("last-step", max_steps=3, **ENGINES["torch"])
    run(last, faults={"nan": {3: 9}}, expect=1, says="the last step (3) had no finite result")
    assert not last.store.exists(f"runs/{last.run}/export")


@pytest.mark.parametrize("name", ["torch", pytest.param("zero2", marks=pytest.mark.large), "zero3"])
def test_loss_spike_is_rolled_back_and_its_steps_are_skipped(name: str, jobs: Jobs, run: Run) -> None:
    """`large` repeats it for ZeRO 2, of which the quick suite shows the guard by torch and the resume in test_resume.py."""
    spike = {"window": 8, "patience": 2}
    settings = {"max_steps": 12, "checkpoint": {"every_steps": 4}, "guards": {"spike": spike}, **ENGINES[name]}
    job = jobs(f"spike-{name}", **settings)
    run(job, ranks=2, faults={"rise": {9: 1, 10: 1}})
    (incident,) = told(job)
    assert (incident["kind"], incident["step"], incident["last_step"]) == ("spike", 9, 10)
    assert incident["loss"] > 10 * incident["mean_before"]
    assert first_steps(job) == [0, 8]
    assert [line["step"] for line in lines(job) if "left_out" in line] == [9, 10]
    # what it came to is what a run comes to that is killed in the middle of that: the decision is on record, not in memory
    killed = jobs(f"spike-killed-{name}", **settings)
    run(killed, ranks=2, faults={"rise": {9: 1, 10: 1}}, kill_at=11, expect=KILLED)
    run(killed, ranks=2, faults={"rise": {9: 1, 10: 1}})
    assert export_digest(killed) == export_digest(job)
    assert len(told(killed)) == 1


def test_checkpoint_from_inside_a_spike_is_not_resumed(jobs: Jobs, run: Run) -> None:
    spike = {"window": 8, "patience": 3}
    job = jobs("spike-saved", max_steps=16, checkpoint={"every_steps": 2}, guards={"spike": spike}, **ENGINES["torch"])
    printed = run(job, faults={"rise": {11: 1, 12: 1, 13: 1}})
    assert "step-00000012 is skipped: it holds steps that were left out later" in printed
    assert first_steps(job) == [0, 10]


def test_row_that_crashes_a_worker_is_quarantined_and_named(jobs: Jobs, run: Run) -> None:
    """Two rows in one pass: it fails with both, then row by row, then without the one."""
    job = jobs("poison", micro_batch_size=2, max_steps=6, checkpoint={"every_steps": 2}, **ENGINES["torch"])
    victim = next(iter(order_of(job).rows_of(2, range(4))[1:2]))
    faults = {"raise": {victim: 0}}
    for _ in range(2):
        run(job, faults=faults, expect=KILLED)
    run(job, faults=faults)
    kinds = [incident["kind"] for incident in told(job)]
    assert kinds == ["failure", "failure", "quarantine"]
    first, second, put_aside = told(job)
    assert first["rows"] == order_of(job).rows_of(2, range(2))
    assert second["rows"] == put_aside["rows"] == [victim]
    assert put_aside["step"] == 3
    assert put_aside["error"] == f"ArithmeticError: no such token in row {victim}"
    assert put_aside["records"] == second["records"] != []
    assert first_steps(job) == [0, 2, 2]
    sound = replace(job, run="poison-free")
    run(sound)
    trained = {line["step"]: line["trained_tokens"] for line in lines(job)}
    before = {line["step"]: line["trained_tokens"] for line in lines(sound)}
    assert {step for step in before if trained[step] < before[step]} >= {3}
    assert json.dumps(lines(job)[0]["loss"]) == json.dumps(lines(sound)[0]["loss"])


def order_of(job: TrainJob) -> Any:
    from forge_ray.data.dataset import order

    return order.order_of(job.dataset, "train", job.config.seed, job.config.global_batch)
