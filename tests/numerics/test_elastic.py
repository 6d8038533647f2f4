"""Another number of workers in mid-run: the same rows in the same order, and the same losses within rounding.

Tolerance (fp32, CPU): losses 2e-6 relative; weights 1e-5 absolute after three steps of up to 1e-3 each, as between world
sizes that never changed (test_distributed.py). bf16: its rounding, 2e-2.
"""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Jobs, Run, exported, first_steps, largest_difference, losses

from forge_ray.data.dataset.order import order_of
from forge_ray.train import attempts
from forge_ray.train.job import TrainJob

pytestmark = pytest.mark.numerics
STEPS = 3
LORA: dict[str, Any] = {"r": 4}
CASES: dict[str, dict[str, Any]] = {
    "zero1-full": {"zero_stage": 1},
    "zero2-full": {"zero_stage": 2},
    "zero3-full": {"zero_stage": 3},
    "zero2-lora": {"zero_stage": 2, "adapter": LORA},
    "zero3-lora": {"zero_stage": 3, "adapter": LORA},
}


def job_of(jobs: Jobs, name: str, precision: str = "fp32", **settings: Any) -> TrainJob:
    return jobs(name, precision, max_steps=STEPS, checkpoint={"every_steps": 1}, **settings)


def through_worlds(job: TrainJob, run: Run) -> None:
    """Two workers in the first step, one in the second, three in the last: 4 rows a step do not divide by 3."""
    run(job, ranks=2, kill_at=2, expect=23)
    run(job, ranks=1, kill_at=3, expect=23)
    run(job, ranks=3)
    assert first_steps(job) == [0, 1, 2]
    assert [start["world_size"] for start in attempts.read(job.store, job.run)] == [2, 1, 3]


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c == "zero3-lora" else pytest.mark.large) for c in CASES])
def test_resume_on_two_one_and_three_workers(case: str, jobs: Jobs, run: Run) -> None:
    steady, elastic = job_of(jobs, f"steady-{case}", **CASES[case]), job_of(jobs, f"elastic-{case}", **CASES[case])
    run(steady, ranks=2)
    through_worlds(elastic, run)
    result = elastic.store.read_json(f"runs/{elastic.run}/result.json")
    order = order_of(elastic.dataset, "train", elastic.config.seed, elastic.config.global_batch)
    assert result["order_digest"] == order.digest(STEPS)
    assert losses(elastic) == pytest.approx(losses(steady), rel=2e-6)
    difference = largest_difference(exported(elastic), exported(steady))
    print(f"{case}: largest difference of a weight {difference:.2g}")
    assert difference < 1e-5


@pytest.mark.large
def test_zero1_reshards_in_bf16(jobs: Jobs, run: Run) -> None:
    steady = job_of(jobs, "steady-bf16", "bf16", zero_stage=1, adapter=LORA)
    elastic = job_of(jobs, "elastic-bf16", "bf16", zero_stage=1, adapter=LORA)
    run(steady, ranks=2)
    through_worlds(elastic, run)
    assert losses(elastic) == pytest.approx(losses(steady), rel=2e-2)


def test_zero0_in_bf16_is_refused(jobs: Jobs, run: Run) -> None:
    printed = run(job_of(jobs, "bf16-zero0", "bf16", zero_stage=0), expect=1, says="has no bf16 with fp32 gradients")
    assert "hint: set train.zero_stage=1, or train.engine=torch" in printed


def test_rank_without_rows_does_not_change_the_step(jobs: Jobs, run: Run) -> None:
    """Three ranks share four rows: one has two passes, the others one and an empty one."""
    one, three = (jobs(f"uneven-{ranks}", zero_stage=3, max_steps=2) for ranks in (1, 3))
    run(one)
    run(three, ranks=3)
    assert losses(three) == pytest.approx(losses(one), rel=2e-6)
    # three partial sums instead of one: AdamW turns the rounding of a gradient near zero into up to a step (1e-3)
    assert largest_difference(exported(three), exported(one)) < 5e-5
