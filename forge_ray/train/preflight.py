"""Before a run starts: what it takes, whether it fits, what its adapter reaches."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.config.adapter import Adapter
from forge_ray.config.classify import Reward
from forge_ray.config.method import Preference
from forge_ray.config.run import RunConfig
from forge_ray.config.scaling import Scaling, Workers
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError, TrainingError
from forge_ray.machine.capacity import Demand, refuse_oversized
from forge_ray.machine.cluster import connect, has_gpu, memory_per_worker
from forge_ray.models.architecture import LM, Head
from forge_ray.progress import visible
from forge_ray.records import DatasetManifest, ModelVersion, canonical_json
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train import plan as planning
from forge_ray.train import run_folder
from forge_ray.train.adapter import Coverage
from forge_ray.train.frozen import FrozenModel, of_version
from forge_ray.train.methods.preference import refuse_ungraded
from forge_ray.train.micro_batch import largest_pass
from forge_ray.train.model import refuse_without_compiler
from forge_ray.train.plan import Plan
from forge_ray.train.stated import Stated

UNKNOWN = (KeyError, TypeError, ZeroDivisionError)  # raised by a plan for an architecture that it has no numbers of


@dataclass(frozen=True)
class Assumptions:
    """What `forge plan` is told in place of what it would look up; 0: it looks, or leaves that part out."""

    num_workers: int = 0
    memory_gb: float = 0.0  # per worker
    tokens_per_s: float = 0.0  # of one worker
    cost_per_hour: float = 0.0  # of one worker
    num_rows: int = 0  # packed and full, in place of a dataset


@dataclass(frozen=True)
class Planned:
    """What is planned for: a model's shapes, a dataset's numbers, and what the two are called."""

    model: planning.Model
    dataset: DatasetManifest | Stated
    base_name: str
    dataset_name: str
    frozen: planning.Model | None = None  # whose numbers the loss reads, where that is not the model of the start


@dataclass(frozen=True)
class Judgement:
    """A plan, why it cannot work ("" where it can, or nobody can tell), and the nearest settings that would."""

    plan: Plan
    problem: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Estimate:
    """What `forge plan` says. Sizes in bytes: `disk_bytes` while the run lasts, `left_bytes` after it; `memory_limit` is of
    one worker, None where it is not known."""

    plan: Plan
    disk_bytes: int
    left_bytes: int
    memory_limit: int | None
    base_model: str
    dataset: str
    not_counted: list[str]  # of a worker's memory
    is_assumed: bool  # the dataset: its size is stated, or follows from the sizes of files
    coverage: Coverage | None
    precision: str
    micro_batch_size: int
    num_workers: int
    seconds: float | None
    cost: float | None
    problem: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        memory = vars(self.plan.memory) | {"total": self.plan.memory.total}
        own = {name: value for name, value in vars(self).items() if name not in ("plan", "coverage")}
        adapter = self.coverage.to_json() if self.coverage else None
        return {**vars(self.plan), **own, "memory": memory, "adapter": adapter, "reaches": self.reaches}

    @property
    def reaches(self) -> list[str]:
        """What the adapter reaches, in words; empty without one."""
        return self.coverage.lines() if self.coverage else []


def estimate(train: TrainConfig, store: Store, precision: str, planned: Planned, assumptions: Assumptions) -> Estimate:
    """What a run of these settings takes, and whether it fits."""
    num_workers = assumptions.num_workers or max(train.scaling.max_workers, 1)
    limit = memory_limit(train.scaling, assumptions)
    train = with_micro_batch(train, precision, planned, num_workers, limit)
    judgement = judge(train, store, precision, planned, num_workers, limit)
    rate = assumptions.tokens_per_s * num_workers
    # a forward pass is half of a step where the base is frozen, else a third (`benchmarks/train_step.py` has the formula)
    forward_only = judgement.plan.reference_tokens / (2 if train.adapter else 3)
    if active := judgement.plan.reference_active:  # of another model, larger or smaller
        forward_only *= active / judgement.plan.num_active
    if train.method_name == "kto":  # each step looks at its answers with other prompts first
        forward_only += judgement.plan.num_tokens / (2 if train.adapter else 3)
    seconds = (judgement.plan.num_tokens + forward_only) / rate if rate else None
    paid = seconds is not None and assumptions.cost_per_hour
    return Estimate(
        plan=judgement.plan,
        disk_bytes=disk_bytes(train, judgement.plan),
        left_bytes=left_bytes(train, judgement.plan),
        memory_limit=limit,
        base_model=planned.base_name,
        dataset=planned.dataset_name,
        not_counted=planning.not_counted(planned.model, train, precision),
        is_assumed=isinstance(planned.dataset, Stated),
        coverage=planned.model.coverage(train.adapter) if train.adapter else None,
        precision=precision,
        micro_batch_size=int(train.micro_batch_size),
        num_workers=num_workers,
        seconds=seconds,
        cost=seconds / 3600 * num_workers * assumptions.cost_per_hour if seconds and paid else None,
        problem=judgement.problem,
        remedy=judgement.remedy,
    )


def memory_limit(scaling: Scaling, assumptions: Assumptions) -> int | None:
    """Bytes that one worker may hold: as assumed, else as the cluster says."""
    if assumptions.memory_gb:
        return int(assumptions.memory_gb * 1e9)
    if assumptions.num_workers:
        scaling = scaling.model_copy(update={"num_workers": assumptions.num_workers})
    if scaling.max_workers:
        connect()
    return memory_per_worker(scaling)


def with_micro_batch(
    train: TrainConfig, precision: str, planned: Planned, num_workers: int, limit: int | None
) -> TrainConfig:
    """The settings with a number in place of `micro_batch_size=auto`."""
    if train.micro_batch_size != "auto":
        return train
    size = largest_pass(planned.model, train, precision, planned.dataset, num_workers, limit, planned.frozen)
    return train.model_copy(update={"micro_batch_size": size})


def micro_batch_of(
    train: TrainConfig,
    store: Store,
    precision: str,
    base: ModelVersion,
    manifest: DatasetManifest,
    run: str,
    frozen: FrozenModel | None,
) -> int:
    """What `micro_batch_size=auto` means to a run: the number that it began with, or one that is decided now and kept, so
    that a run that goes on elsewhere adds in the same order. 0 where the run file states the number. Ray must be connected
    unless the run does without."""
    if train.micro_batch_size != "auto":
        return 0
    if kept := run_folder.micro_batch_of(store, run):
        return kept
    try:
        planned = _planned(train, store, base, manifest, frozen)
        workers, limit = max(train.scaling.max_workers, 1), memory_per_worker(train.scaling)
        size = int(with_micro_batch(train, precision, planned, workers, limit).micro_batch_size)
    except UNKNOWN:
        size = 1
    return run_folder.keep_micro_batch(store, run, size)


def _planned(
    train: TrainConfig, store: Store, base: ModelVersion, manifest: DatasetManifest, frozen: FrozenModel | None
) -> Planned:
    model = planning.Model.of(configuration(store, base), Head(train.targets))
    return Planned(model, manifest, base.id, manifest.id, shapes_of_frozen(store, frozen))


def judge(
    train: TrainConfig, store: Store, precision: str, planned: Planned, num_workers: int, limit: int | None
) -> Judgement:
    """Whether it fits into `limit` bytes per worker and onto the store's disk."""
    plan = planning.plan(planned.model, train, precision, planned.dataset, num_workers, planned.frozen)
    free, disk = store.free_bytes(), disk_bytes(train, plan)
    if limit and plan.reference_memory > limit:
        return Judgement(
            plan,
            f"{train.frozen_model} needs {_size(plan.reference_memory)} in each worker while it is asked about the rows,"
            f" there are {_size(limit)}",
            "take workers with more memory, a smaller model in its place, or its answers as rows of train.method=sft",
        )
    if limit and plan.memory.total > limit:
        near = planning.nearest(planned.model, train, precision, planned.dataset, num_workers, limit, planned.frozen)
        names = ("micro_batch_size", "activation_checkpointing", "engine", "zero_stage")
        changes = [
            f"train.{name}={getattr(near, name)}" for name in names if near and getattr(near, name) != getattr(train, name)
        ]
        if near:
            changes += [f"train.offload.{n}={v}" for n, v in near.offload if v != getattr(train.offload, n)]
        return Judgement(
            plan,
            f"a worker needs {_size(plan.memory.total)}, there are {_size(limit)}",
            f"this fits: {' '.join(changes)}" if changes else "take more workers, an adapter, or a smaller model",
        )
    if free is not None and disk > free:
        problem = f"the checkpoints and the export need {_size(disk)}, {_size(free)} are free"
        return Judgement(plan, problem, "free space on the store's disk, or train an adapter")
    return Judgement(plan)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def disk_bytes(train: TrainConfig, plan: Plan) -> int:
    """The plan counts the newest checkpoints; the best one, and the one that a task reads, may be kept in addition."""
    more = int(train.keeps_best) + int(train.validation.background)
    return plan.disk_bytes + more * plan.checkpoint_bytes + 2 * plan.reference_bytes  # in pieces, and put together


def num_kept(train: TrainConfig, plan: Plan) -> int:
    """Checkpoints that a run has when it has ended, at most."""
    every = train.checkpoint.every_steps
    num_written = -(-plan.steps // every) if every else 1
    return min(num_written, train.checkpoint.keep + int(train.keeps_best))


def left_bytes(train: TrainConfig, plan: Plan) -> int:
    """What a run leaves on the disk when it has ended: checkpoints and the export. A version that is released from it shares
    the export's files on a local store."""
    return num_kept(train, plan) * plan.checkpoint_bytes + plan.export_bytes + plan.reference_bytes


def configuration(store: Store, base: ModelVersion) -> Path:
    """A folder with the configuration of a base model, which is all that its shapes follow from."""
    if store.is_local:
        return store.local(paths.model(base.id))
    folder = Path(tempfile.mkdtemp(prefix="forge-config-"))
    (folder / "config.json").write_bytes(store.read(paths.model(base.id, "config.json")))
    return folder


def shapes_of_frozen(store: Store, frozen: FrozenModel | None) -> planning.Model | None:
    """Of a frozen model as it is loaded; an adapter on it is small."""
    return planning.Model.of(configuration(store, frozen.full)) if frozen else None


def stated_frozen(train: TrainConfig, store: Store) -> planning.Model | None:
    """Of a frozen model as a run file names it, where rows are stated and nothing is looked up but its shapes: a folder that
    holds `config.json`, or a version of the store."""
    if not train.frozen_model:
        return None
    if (Path(train.frozen_model) / "config.json").is_file():
        return planning.Model.of(Path(train.frozen_model))
    with Catalog.read_only(store) as catalog:
        return shapes_of_frozen(store, of_version(catalog, catalog.model(train.frozen_model)))


def refuse_impossible(
    config: RunConfig,
    store: Store,
    precision: str,
    base: ModelVersion,
    manifest: DatasetManifest,
    run: str,
    frozen: FrozenModel | None = None,
) -> None:
    """Before anything is taken: `ConfigError` where the run cannot fit, with the nearest settings that do, or where it needs
    a compiler that is not here. In a cluster of several machines each worker looks for its own."""
    scaling = config.train.scaling
    refuse_unplaceable(config.train)
    if config.train.compile and _workers_are_here(scaling):
        refuse_without_compiler(config.train)
    if not config.train.guards.refuse_impossible or store.list(paths.checkpoints(run), recursive=True):
        return  # one that has got as far as a checkpoint fits
    try:
        planned = _planned(config.train, store, base, manifest, frozen)
        limit, workers = memory_per_worker(scaling), max(scaling.max_workers, 1)
        train = with_micro_batch(config.train, precision, planned, workers, limit)
        judgement = judge(train, store, precision, planned, workers, limit)
    except UNKNOWN as error:
        why = f"{type(error).__name__}: {visible(str(error))}"
        print(f"  the plan does not know this model ({why}); not judged", file=sys.stderr)
        return
    if judgement.problem:
        raise ConfigError(
            f"{run} cannot fit: {judgement.problem}",
            hint=f"{judgement.remedy}; or go on all the same: --force, or --set train.guards.refuse_impossible=false",
        )


def workers_demand(train: TrainConfig) -> Demand:
    """What the fewest workers of a run ask of Ray."""
    scaling = train.scaling
    count = scaling.num_workers.min if isinstance(scaling.num_workers, Workers) else scaling.num_workers
    settings = "train.scaling: num_workers, cpus_per_worker, gpus_per_worker"
    return Demand("training", count, scaling.cpus_per_worker, scaling.gpus_per_worker, settings)


def refuse_unplaceable(train: TrainConfig) -> None:
    """`ConfigError` where the workers, or the task that validates, ask for more than there is. Ray must be connected unless
    the run does without."""
    if train.scaling.max_workers:
        refuse_oversized(workers_demand(train))
        if train.validation.background:
            task = train.validation
            settings = "train.validation: cpus, gpus"
            refuse_oversized(Demand("validation in the background", 1, task.cpus, task.gpus, settings))
    elif train.scaling.gpus_per_worker and not has_gpu():
        raise ConfigError(
            f"train.scaling.gpus_per_worker={train.scaling.gpus_per_worker:g}, and torch finds no GPU on this machine",
            hint="set train.scaling.gpus_per_worker=0, or train where there is one; `forge doctor` shows what torch sees",
        )


def refuse_without_rows(train: TrainConfig, store: Store, manifest: DatasetManifest) -> None:
    """Raises where the dataset has no rows that this method trains on, a pair without the margin that it needs, or none for
    the validation that the settings need."""
    taken: tuple[str, ...] = ("chat", "text")
    if isinstance(train.method, Preference | Reward):
        taken = ("preference",) if isinstance(train.method, Reward) else (train.method.rows,)
    others = manifest.kinds.keys() - {*taken, "multimodal"}
    if others or not manifest.splits["train"].num_rows:
        kinds = ", ".join(f"{count} {kind}" for kind, count in manifest.kinds.items())
        hint = f"give the run file sources of {' or '.join(taken)} rows"
        for name, rows in (("dpo", "preference"), ("kto", "feedback")):
            hint += f", or set train.method={{kind: {name}}}" if {rows} == others else ""
        hint += ", or leave out train.method" if others and others <= {"chat", "text"} else ""
        raise TrainingError(
            f"{manifest.id} has {'no packed rows' if not others else 'other rows'}: it holds {kinds} records;"
            f" train.method={train.method_name} takes {' and '.join(taken)} records",
            hint=hint,
        )
    if isinstance(train.method, Preference):
        refuse_ungraded(train.method, store, manifest)
    needs_validation = train.validation.early_stopping or train.validation.keep_best or train.export_step == "best"
    if needs_validation and not ("validation" in manifest.splits and manifest.splits["validation"].num_rows):
        raise ConfigError(
            f"{manifest.id} has no validation rows: nothing says which checkpoint is the best, or when to stop",
            hint="set data.splits.validation, or leave out keep_best, early_stopping and export_step=best",
        )


def _workers_are_here(scaling: Scaling) -> bool:
    """Whether every worker runs on this machine. Ray must be connected unless the run does without."""
    if not scaling.max_workers:
        return True
    import ray

    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]} == {ray.util.get_node_ip_address()}


def report_reach(store: Store, run: str, base: ModelVersion, adapter: Adapter | None, head: Head = LM) -> None:
    """Say and write down what the adapter reaches, before anything is taken. Raises `ConfigError` where that is less than
    its patterns name."""
    if adapter is None:
        return
    coverage = planning.Model.of(configuration(store, base), head).coverage(adapter)
    print("\n".join(f"  adapter   {visible(line)}" for line in coverage.lines()), file=sys.stderr, flush=True)
    store.write(paths.run(run, "adapter.json"), canonical_json(coverage.to_json()))
