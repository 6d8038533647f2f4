"""N workers that share each row come to what one worker comes to that has it alone.

Tolerance (fp32, CPU): losses 2e-6 relative, weights 1e-5 absolute after four steps of up to 1e-3. `eps` is 1e-6: with 1e-8
AdamW turns the rounding of a gradient near zero into a whole step (measured: one weight of 4,096 by 1.4e-4).
"""

from __future__ import annotations

from typing import Any

import pytest
from conftest import SEQUENCE_LENGTH, Jobs, Run, export_digest, exported, first_steps, largest_difference, losses
from worker import KILLED

from forge_ray.data.dataset import order
from forge_ray.data.dataset.order import Order
from forge_ray.data.dataset.stream import Rows
from forge_ray.errors import ConfigError
from forge_ray.train import attempts, incidents, metrics
from forge_ray.train.audit import DataFacts, audit
from forge_ray.train.job import TrainJob
from forge_ray.train.sequence_parallel import _check, _repeats

pytestmark = pytest.mark.numerics
ADAM = {"lr": 1e-3, "weight_decay": 0.01, "eps": 1e-6}
LORA: dict[str, Any] = {"r": 4}
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch", "zero_stage": 0},
    **{f"zero{stage}": {"zero_stage": stage} for stage in range(4)},
}


def shared(jobs: Jobs, name: str, size: int = 2, workers: int = 2, precision: str = "fp32", **settings: Any) -> TrainJob:
    settings = {"optimizer": ADAM, "sequence_parallel": size, "scaling": {"num_workers": workers}} | settings
    return jobs(name, precision, **settings)


def order_of(job: TrainJob) -> Order:
    return order.order_of(job.dataset, "train", job.config.seed, job.config.global_batch)


def audited(job: TrainJob, num_steps: int) -> None:
    """`forge audit data`: each row is seen by every worker of a group, and counted once."""
    order, lines = order_of(job), metrics.read(job.store.local(f"runs/{job.run}") / metrics.METRICS)
    rows = Rows.of(job.store, job.dataset, "train")
    report = audit(DataFacts(job.run, rows, order, num_steps, order.digest(num_steps), lines), lambda *_: None)
    assert (report.steps_compared, report.problems) == (num_steps, ()), job.run


def same(job: TrainJob, reference: TrainJob) -> None:
    for name in ("loss", "validation_loss"):
        assert losses(job, name) == pytest.approx(losses(reference, name), rel=2e-6), (job.run, name)
    for name in ("rows_sum", "trained_tokens", "tokens"):
        assert losses(job, name) == losses(reference, name), (job.run, name)
    assert largest_difference(exported(job), exported(reference)) < 1e-5, job.run


@pytest.mark.parametrize(
    ("adapter", "names"),
    [
        pytest.param(None, ("torch", "zero1", "zero3"), id="full"),
        pytest.param(LORA, ("torch", "zero2"), id="lora"),
        pytest.param(None, ("zero0", "zero2"), id="full, the others", marks=pytest.mark.large),
        pytest.param(LORA, ("zero3",), id="lora, the others", marks=pytest.mark.large),
    ],
)
def test_two_workers_per_row_match_one(adapter: dict[str, Any] | None, names: tuple[str, ...], jobs: Jobs, run: Run) -> None:
    """`large` repeats for other pairs of engine and method what the quick suite shows of each engine and each method."""
    settings: dict[str, Any] = {"adapter": adapter, "validation": {"every_steps": 2, "max_rows": 3}, "max_steps": 3}
    alone = jobs(f"alone-{bool(adapter)}-{len(names)}", optimizer=ADAM, **ENGINES["torch"], **settings)
    sharing = [shared(jobs, f"shared-{name}-{bool(adapter)}", **ENGINES[name], **settings) for name in names]
    sharing.append(
        shared(
            jobs, f"shared-recomputed-{bool(adapter)}-{len(names)}", zero_stage=3, activation_checkpointing=True, **settings
        )
    )
    run(alone)
    run(*sharing, ranks=2)
    for job in sharing:
        same(job, alone)


def test_four_workers_in_two_groups_or_one(jobs: Jobs, run: Run) -> None:
    """The model has 4 heads of queries and 2 of keys and values, so that a group of 4 repeats the latter."""
    settings: dict[str, Any] = {"validation": {"every_steps": 2, "max_rows": 3}, "micro_batch_size": 2, "max_steps": 2}
    alone = jobs("alone-4", optimizer=ADAM, **ENGINES["torch"], **settings)
    sharing = [
        shared(jobs, f"shared-4-{size}-{name}", size, 4, **ENGINES[name], **settings)
        for size, name in ((2, "torch"), (2, "zero2"), (4, "torch"))
    ]
    run(alone)
    run(*sharing, ranks=4)
    for job in sharing:
        same(job, alone)
        audited(job, 2)


def test_resume_with_sequence_parallelism(jobs: Jobs, run: Run) -> None:
    cadence = {"checkpoint": {"every_steps": 1}, "max_steps": 3}
    kinds: dict[str, dict[str, Any]] = {
        "zero2-lora": {"zero_stage": 2, "adapter": {"r": 4, "dropout": 0.1}},
        "zero3-full": {"zero_stage": 3},
    }
    whole = {kind: shared(jobs, f"whole-{kind}", **options, **cadence) for kind, options in kinds.items()}
    broken = {kind: shared(jobs, f"broken-{kind}", **options, **cadence) for kind, options in kinds.items()}
    run(*whole.values(), ranks=2)
    for job in broken.values():
        run(job, ranks=2, kill_at=3, expect=KILLED)
    run(*broken.values(), ranks=2)
    for kind, job in broken.items():
        assert first_steps(job) == [0, 2], kind
        assert export_digest(job) == export_digest(whole[kind]), kind


@pytest.mark.parametrize("name", ["torch", pytest.param("zero3", marks=pytest.mark.large)])
def test_resume_with_other_sequence_parallelism(name: str, jobs: Jobs, run: Run) -> None:
    """`large` repeats it for ZeRO-3, whose checkpoints test_elastic.py takes to other numbers of workers."""
    settings: dict[str, Any] = {"checkpoint": {"every_steps": 1}, "max_steps": 3, **ENGINES[name]}
    whole, moved = (shared(jobs, f"{what}-shared-{name}", **settings) for what in ("steady", "moved"))
    run(whole, ranks=2)
    run(moved, ranks=2, kill_at=2, expect=KILLED)
    run(moved, ranks=4, kill_at=3, expect=KILLED)  # two groups
    run(jobs(moved.run, optimizer=ADAM, **settings))  # one worker with whole rows: the same run
    assert [(start["world_size"], start["first_step"]) for start in attempts.read(moved.store, moved.run)] == [
        (2, 0),
        (4, 1),
        (1, 2),
    ]
    assert losses(moved) == pytest.approx(losses(whole), rel=2e-6)
    assert largest_difference(exported(moved), exported(whole)) < 1e-5


def test_guards_with_sequence_parallelism(jobs: Jobs, run: Run) -> None:
    """A step that fails once changes no bit; a row that fails is put aside after two starts, not after two workers."""
    sound, hurt = (shared(jobs, f"{what}-shared", zero_stage=2, max_steps=3) for what in ("sound", "hurt"))
    bf16 = shared(jobs, "bf16-shared", precision="bf16", zero_stage=2, max_steps=3)
    run(sound, bf16, ranks=2)
    run(hurt, ranks=2, faults={"nan": {2: 1}})
    assert export_digest(hurt) == export_digest(sound)
    assert losses(bf16) == pytest.approx(losses(sound), rel=2e-2)

    poison = shared(jobs, "poison-shared", **ENGINES["torch"])
    victim = order_of(poison).rows_of(1, range(4))[1]
    for _ in range(2):
        run(poison, ranks=2, faults={"raise": {victim: 0}}, expect=KILLED)
        assert "quarantine" not in [incident["kind"] for incident in incidents.read(poison.store, poison.run)]
    run(poison, ranks=2, faults={"raise": {victim: 0}})
    (put_aside,) = [incident for incident in incidents.read(poison.store, poison.run) if incident["kind"] == "quarantine"]
    assert put_aside["rows"] == [victim]


def test_kv_heads_are_repeated_as_little_as_possible() -> None:
    for heads, kv_heads, size, repeats in (
        (8, 8, 4, 1),
        (8, 2, 2, 1),
        (8, 2, 4, 2),
        (8, 1, 8, 8),
        (12, 4, 6, 3),
        (12, 3, 2, 2),
    ):
        assert _repeats(heads, kv_heads, size) == repeats
        assert kv_heads * repeats % size == 0 == heads % (kv_heads * repeats)


class Shape:
    """What `_check` looks at."""

    def __init__(self, **values: Any) -> None:
        self.__dict__ |= {"num_attention_heads": 4} | values


@pytest.mark.parametrize(
    ("shape", "length", "size", "says"),
    [
        (Shape(num_attention_heads=6), 48, 4, "does not divide the 6 attention heads"),
        (Shape(), 50, 4, "does not divide data.sequence_length=50"),
        (Shape(rope_parameters={"rope_type": "dynamic"}), 48, 2, "dynamic"),
    ],
)
def test_unsupported_models_and_sizes_are_refused(shape: Shape, length: int, size: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        _check(shape, length, size)
    assert error.value.hint
    _check(Shape(rope_parameters={"rope_type": "llama3"}), 48, 2)


def test_workers_that_do_not_divide_into_groups_are_refused(jobs: Jobs, run: Run) -> None:
    printed = run(shared(jobs, "three", **ENGINES["torch"]), ranks=3, expect=1, says="3 workers do not make groups")
    assert "hint: use a multiple of 2 workers" in printed
    assert SEQUENCE_LENGTH % 2 == 0
