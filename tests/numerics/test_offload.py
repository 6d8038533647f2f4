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
PAIRS = [
    pytest.param(("zero1-full", "zero3-lora"), id="each kind"),
    pytest.param(("zero2-lora", "zero3-full"), id="the others", marks=pytest.mark.large),
]


@pytest.mark.parametrize("names", PAIRS)
def test_offload_matches_training_without_it_and_retries_bit_identically(
    names: tuple[str, ...], jobs: Jobs, run: Run
) -> None:
    """The optimizer steps on the CPU and takes the norm in another order: rounding. Where the weights lie changes no bit.

    `large` repeats it for ZeRO 2, which shares its code with ZeRO 1, and for ZeRO-3 without an adapter.
    """
    inside = {name: jobs(f"inside-{name}", max_steps=3, **(CASES[name] | {"offload": {}})) for name in names}
    outside = {name: jobs(f"outside-{name}", max_steps=3, **CASES[name]) for name in names}
    weights = {"offload": {"parameters": "cpu"}}
    weights_only = jobs(f"outside-weights-{names[1]}", max_steps=3, **(CASES[names[1]] | weights))
    run(*inside.values(), *outside.values(), weights_only, ranks=2)
    for name, job in outside.items():
        assert losses(job) == pytest.approx(losses(inside[name]), rel=2e-6), name
        assert largest_difference(exported(job), exported(inside[name])) < 1e-6, name
    assert export_digest(weights_only) == export_digest(inside[names[1]])

    hurt = {name: replace(job, run=f"hurt-{name}", name=f"hurt-{name}") for name, job in outside.items()}
    run(*hurt.values(), ranks=2, faults={"nan": {2: 1}})
    for name, job in hurt.items():
        assert [incident["kind"] for incident in incidents.read(job.store, job.run)] == ["recovered"], name
        assert export_digest(job) == export_digest(outside[name]), name


@pytest.mark.parametrize("names", PAIRS)
def test_resume_is_bit_identical_with_offload(names: tuple[str, ...], jobs: Jobs, run: Run) -> None:
    """And the weights of ZeRO-3 may move back in between."""
    cadence = {"checkpoint": {"every_steps": 1}, "max_steps": 3}
    whole = {name: jobs(f"whole-out-{name}", **CASES[name], **cadence) for name in names}
    broken = {name: jobs(f"broken-out-{name}", **CASES[name], **cadence) for name in names}
    run(*whole.values(), ranks=2)
    for job in broken.values():
        run(job, ranks=2, kill_at=3, expect=KILLED)
    moved = jobs(broken[names[1]].run, **(CASES[names[1]] | {"offload": OPTIMIZER}), **cadence)
    run(*(broken | {names[1]: moved}).values(), ranks=2)
    for name, job in broken.items():
        assert first_steps(job) == [0, 2], name
        assert export_digest(job) == export_digest(whole[name]), name


@pytest.mark.parametrize("name", [pytest.param("zero2", marks=pytest.mark.large), "zero3"])
def test_resume_on_another_number_of_workers_with_offload(name: str, jobs: Jobs, run: Run) -> None:
    case = {"zero2": {"zero_stage": 2, "offload": OPTIMIZER}, "zero3": {"zero_stage": 3, "offload": BOTH}}[name]
    settings: dict[str, Any] = {"max_steps": 3, "checkpoint": {"every_steps": 1}, **case}
    steady, elastic = jobs(f"steady-out-{name}", **settings), jobs(f"elastic-out-{name}", **settings)
    run(steady, ranks=2)
    run(elastic, ranks=2, kill_at=3, expect=KILLED)
    run(elastic)
    assert first_steps(elastic) == [0, 2]
    assert losses(elastic) == pytest.approx(losses(steady), rel=2e-6)
    assert largest_difference(exported(elastic), exported(steady)) < 1e-5
