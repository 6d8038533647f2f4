"""ZeRO with its state in main memory: the same training within rounding, and every promise as without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import Jobs, Run, export_digest, exported, first_steps, largest_difference, losses
from worker import KILLED

from forge_ray.train import incidents

pytestmark = pytest.mark.numerics
OPTIMIZER, BOTH = {"optimizer": "cpu"}, {"optimizer": "cpu", "parameters": "cpu"}
LORA: dict[str, Any] = {"r": 4, "dropout": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "zero1-full": {"zero_stage": 1, "offload": OPTIMIZER},
    "zero2-lora": {"zero_stage": 2, "offload": OPTIMIZER, "adapter": LORA},
    "zero3-full": {"zero_stage": 3, "offload": BOTH},
    "zero3-lora": {"zero_stage": 3, "offload": BOTH, "adapter": LORA},
}


def test_it_trains_as_without_and_a_step_that_fails_once_changes_no_bit(jobs: Jobs, run: Run) -> None:
    """The optimizer steps on the CPU and takes the norm in another order: rounding. Where the weights lie changes no bit."""
    inside = {name: jobs(f"inside-{name}", **(case | {"offload": {}})) for name, case in CASES.items()}
    outside = {name: jobs(f"outside-{name}", **case) for name, case in CASES.items()}
    weights_only = jobs("outside-weights", zero_stage=3, offload={"parameters": "cpu"})
    run(*inside.values(), *outside.values(), weights_only, ranks=2)
    for name, job in outside.items():
        assert losses(job) == pytest.approx(losses(inside[name]), rel=2e-6), name
        assert largest_difference(exported(job), exported(inside[name])) < 1e-6, name
    assert export_digest(weights_only) == export_digest(inside["zero3-full"])

    hurt = {name: replace(job, run=f"hurt-{name}", name=f"hurt-{name}") for name, job in outside.items()}
    run(*hurt.values(), ranks=2, faults={"nan": {3: 1}})
    for name, job in hurt.items():
        assert [incident["kind"] for incident in incidents.read(job.store, job.run)] == ["recovered"], name
        assert export_digest(job) == export_digest(outside[name]), name


def test_resumed_equals_uninterrupted_and_the_weights_may_move(jobs: Jobs, run: Run) -> None:
    cadence = {"checkpoint": {"every_steps": 2}, "max_steps": 6}
    whole = {name: jobs(f"whole-out-{name}", **case, **cadence) for name, case in CASES.items()}
    broken = {name: jobs(f"broken-out-{name}", **case, **cadence) for name, case in CASES.items()}
    run(*whole.values(), ranks=2)
    for job in broken.values():
        run(job, ranks=2, kill_at=5, expect=KILLED)
    moved = jobs(broken["zero3-lora"].run, **(CASES["zero3-lora"] | {"offload": OPTIMIZER}), **cadence)
    run(*(broken | {"zero3-lora": moved}).values(), ranks=2)
    for name, job in broken.items():
        assert first_steps(job) == [0, 4], name
        assert export_digest(job) == export_digest(whole[name]), name


@pytest.mark.parametrize("name", [pytest.param("zero2", marks=pytest.mark.large), "zero3"])
def test_another_number_of_workers(name: str, jobs: Jobs, run: Run) -> None:
    case = {"zero2": {"zero_stage": 2, "offload": OPTIMIZER}, "zero3": {"zero_stage": 3, "offload": BOTH}}[name]
    settings: dict[str, Any] = {"max_steps": 6, "checkpoint": {"every_steps": 2}, **case}
    steady, elastic = jobs(f"steady-out-{name}", **settings), jobs(f"elastic-out-{name}", **settings)
    run(steady, ranks=2)
    run(elastic, ranks=2, kill_at=3, expect=KILLED)
    run(elastic, kill_at=5, expect=KILLED)
    run(elastic, ranks=2)
    assert first_steps(elastic) == [0, 2, 4]
    assert losses(elastic) == pytest.approx(losses(steady), rel=2e-6)
    assert largest_difference(exported(elastic), exported(steady)) < 1e-5
