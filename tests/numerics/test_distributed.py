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


Worlds = dict[int, tuple[str, ...]]  # number of ranks → engines
# one rank has nothing to shard: ZeRO 0 stands for stages 1 and 2 there
WORLDS: Worlds = {1: ("torch", "zero0", "zero3"), 2: tuple(ENGINES)}
THE_OTHERS: Worlds = {1: ("torch", "zero1", "zero2"), 2: ()}
PARAMETERS = [pytest.param(WORLDS, id="worlds"), pytest.param(THE_OTHERS, id="the others", marks=pytest.mark.large)]


def both_worlds(jobs: Jobs, run: Run, name: str, worlds: Worlds, **settings: Any) -> dict[str, TrainJob]:
    """Engines on one rank and on two, each group of processes running all of them one after another."""
    trained = {}
    for ranks, engines in worlds.items():
        group = {
            f"{engine}-{ranks}": jobs(f"{name}-{len(worlds[2])}-{engine}-{ranks}", **ENGINES[engine], **settings)
            for engine in engines
        }
        if not group:
            continue
        run(*group.values(), ranks=ranks)
        trained |= group
    return trained


@pytest.mark.parametrize("worlds", PARAMETERS)
@pytest.mark.parametrize("adapter", [None, {"r": 4}], ids=["full", "lora"])
def test_engines_and_world_sizes_agree(
    jobs: Jobs, run: Run, adapter: dict[str, Any] | None, worlds: Worlds, record_property: pytest.RecordProperty
) -> None:
    """`large` has ZeRO 1 and 2 on one rank, where they compute what ZeRO 0 computes in the quick suite."""
    validation = {"every_steps": 2, "max_rows": 3}  # an odd number: one rank has a pass without rows
    trained = both_worlds(jobs, run, f"same-{bool(adapter)}", worlds, adapter=adapter, validation=validation)
    reference = trained.pop("torch-1")
    weights = exported(reference)
    assert len(losses(reference)) == 4
    worst = 0.0
    for name, job in trained.items():
        assert losses(job) == pytest.approx(losses(reference), rel=LOSS), name
        assert losses(job, "validation_loss") == pytest.approx(losses(reference, "validation_loss"), rel=LOSS), name
        assert losses(job, "grad_norm") == pytest.approx(losses(reference, "grad_norm"), rel=NORM), name
        difference = largest_difference(exported(job), weights)
        worst = max(worst, difference)
        assert difference < WEIGHTS, (name, difference)
    record_property("largest_weight_difference", worst)
    print(f"largest weight difference {worst:.2g}")


@pytest.mark.parametrize("worlds", PARAMETERS)
def test_gradient_clipping_in_every_engine(jobs: Jobs, run: Run, worlds: Worlds) -> None:
    """With an eps far above the gradients AdamW's step is in proportion to them, so the clip shows in the weights.

    `large` has ZeRO 1 and 2 on one rank; the quick suite has both on two."""
    options = {"lr": 1e-1, "eps": 1.0, "weight_decay": 0.0}
    clipped = both_worlds(jobs, run, "clip", worlds, optimizer=options, max_grad_norm=0.05, max_steps=2)
    number = len(worlds[2])
    free = jobs(f"clip-not-{number}", engine="torch", zero_stage=0, optimizer=options, max_grad_norm=0, max_steps=2)
    off = jobs(f"clip-off-zero0-{number}", zero_stage=0, optimizer=options, max_grad_norm=0, max_steps=2)
    off2 = jobs(f"clip-off-zero2-{number}", zero_stage=2, optimizer=options, max_grad_norm=0, max_steps=2)
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
