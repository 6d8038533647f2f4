"""One answer, however it is computed: plain torch, ZeRO 0 to 3, one rank or two.

Tolerances (fp32, CPU; the sums are taken in another order): losses and norms 2e-6 relative, weights 1e-5 absolute after four
steps that change them by up to 4e-3. Measured: weights 1.9e-6 (full), 4e-7 (LoRA).
"""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Jobs, Run, exported, largest_difference, losses

from forge_ray.train.job import TrainJob

pytestmark = pytest.mark.numerics
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch", "zero_stage": 0},
    **{f"zero{stage}": {"zero_stage": stage} for stage in range(4)},
}
LOSS, NORM, WEIGHTS = 2e-6, 5e-6, 1e-5


def both_worlds(jobs: Jobs, run: Run, name: str, **settings: Any) -> dict[str, TrainJob]:
    """Every engine on one rank and on two, each group of processes running all of them one after another."""
    made = {}
    for ranks in (1, 2):
        group = {
            f"{engine}-{ranks}": jobs(f"{name}-{engine}-{ranks}", **options, **settings)
            for engine, options in ENGINES.items()
        }
        run(*group.values(), ranks=ranks)
        made |= group
    return made


@pytest.mark.parametrize("adapter", [None, {"r": 4}], ids=["full", "lora"])
def test_every_engine_and_world_size_gives_one_answer(
    jobs: Jobs, run: Run, adapter: dict[str, Any] | None, record_property: pytest.RecordProperty
) -> None:
    validation = {"every_steps": 2, "max_rows": 3}  # an odd number: one rank has a pass without rows
    made = both_worlds(jobs, run, f"same-{bool(adapter)}", adapter=adapter, validation=validation)
    reference = made.pop("torch-1")
    weights = exported(reference)
    assert len(losses(reference)) == 4
    worst = 0.0
    for name, job in made.items():
        assert losses(job) == pytest.approx(losses(reference), rel=LOSS), name
        assert losses(job, "validation_loss") == pytest.approx(losses(reference, "validation_loss"), rel=LOSS), name
        assert losses(job, "grad_norm") == pytest.approx(losses(reference, "grad_norm"), rel=NORM), name
        difference = largest_difference(exported(job), weights)
        worst = max(worst, difference)
        assert difference < WEIGHTS, (name, difference)
    record_property("largest_weight_difference", worst)
    print(f"largest weight difference {worst:.2g}")


def test_every_engine_clips(jobs: Jobs, run: Run) -> None:
    """With an eps far above the gradients AdamW's step is in proportion to them, so the clip shows in the weights."""
    options = {"lr": 1e-1, "eps": 1.0, "weight_decay": 0.0}
    clipped = both_worlds(jobs, run, "clip", optimizer=options, max_grad_norm=0.05, max_steps=2)
    free = jobs("clip-not", engine="torch", zero_stage=0, optimizer=options, max_grad_norm=0, max_steps=2)
    off = jobs("clip-off-zero0", zero_stage=0, optimizer=options, max_grad_norm=0, max_steps=2)
    off2 = jobs("clip-off-zero2", zero_stage=2, optimizer=options, max_grad_norm=0, max_steps=2)
    run(free, off, off2)
    reference = clipped["torch-1"]
    weights = exported(reference)
    assert min(losses(reference, "grad_norm")) > 1  # twenty times what is allowed
    for name, job in clipped.items():
        assert losses(job, "grad_norm") == pytest.approx(losses(reference, "grad_norm"), rel=1e-5), name
        assert largest_difference(exported(job), weights) < 1e-6, name
    for job in (off, off2):
        assert losses(job, "grad_norm") == pytest.approx(losses(free, "grad_norm"), rel=1e-4)
        assert largest_difference(exported(job), exported(free)) < 1e-4
    assert largest_difference(exported(free), weights) > 1e-2
