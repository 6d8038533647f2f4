"""Before a run takes anything: does it fit, and what does its adapter reach."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from forge_ray.config.run import RunConfig
from forge_ray.config.train import Adapter, Scaling, TrainConfig
from forge_ray.errors import ConfigError
from forge_ray.machine.cluster import room_of_a_worker
from forge_ray.records import DatasetManifest, ModelVersion, canonical_json
from forge_ray.store import paths
from forge_ray.store.files import Store
from forge_ray.train import plan as planning
from forge_ray.train.model import refuse_without_compiler
from forge_ray.train.plan import Plan


def judge(
    train: TrainConfig,
    store: Store,
    precision: str,
    model: planning.Model,
    manifest: DatasetManifest | planning.Stated,
    workers: int,
    room: int | None,
) -> tuple[Plan, str, str]:
    """The plan, in words what cannot fit ("" where all does, or nobody can tell), and the nearest settings that do."""
    found = planning.plan(model, train, precision, manifest, workers)
    free, disk = store.free_bytes(), disk_bytes(train, found)
    if room and found.memory.total > room:
        near = planning.nearest(model, train, precision, manifest, workers, room)
        names = ("micro_batch_size", "activation_checkpointing", "engine", "zero_stage")
        changes = [
            f"train.{name}={getattr(near, name)}" for name in names if near and getattr(near, name) != getattr(train, name)
        ]
        if near:
            changes += [f"train.offload.{n}={v}" for n, v in near.offload if v != getattr(train.offload, n)]
        return (
            found,
            f"a worker needs {_size(found.memory.total)}, there are {_size(room)}",
            f"this fits: {' '.join(changes)}" if changes else "take more workers, an adapter, or a smaller model",
        )
    if free is not None and disk > free:
        problem = f"the checkpoints and the export need {_size(disk)}, {_size(free)} are free"
        return found, problem, "make room where the store lies, or train an adapter"
    return found, "", ""


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def disk_bytes(train: TrainConfig, found: Plan) -> int:
    """The plan counts the newest checkpoints; the best one, and the one that a task reads, may stay beside them."""
    beside = int(train.validation.keep_best or train.export_step == "best") + int(train.validation.background)
    return found.disk_bytes + beside * found.checkpoint_bytes


def configuration(store: Store, base: ModelVersion) -> Path:
    """A folder with the configuration of a base model, which is all that its shapes follow from."""
    if store.is_local:
        return store.local(paths.model(base.id))
    folder = Path(tempfile.mkdtemp(prefix="forge-config-"))
    (folder / "config.json").write_bytes(store.read(paths.model(base.id, "config.json")))
    return folder


def refuse_impossible(
    config: RunConfig, store: Store, precision: str, base: ModelVersion, manifest: DatasetManifest, run: str
) -> None:
    """Before anything is taken: `ConfigError` where the run cannot fit, with the nearest settings that do, or where it needs
    a compiler that is not here. In a cluster of several machines each worker looks for its own."""
    scaling = config.train.scaling
    if config.train.compile and _workers_are_here(scaling):
        refuse_without_compiler(config.train)
    if not config.train.guards.refuse_impossible or store.list(paths.checkpoints(run), recursive=True):
        return  # one that has got as far as a checkpoint fits
    try:
        room = room_of_a_worker(scaling)
        model = planning.Model.of(configuration(store, base))
        _, problem, remedy = judge(config.train, store, precision, model, manifest, max(scaling.max_workers, 1), room)
    except (KeyError, TypeError, ZeroDivisionError) as error:  # an architecture that the plan has no numbers of
        print(f"  the plan does not know this model ({type(error).__name__}: {error}); not judged", file=sys.stderr)
        return
    if problem:
        raise ConfigError(
            f"{run} cannot fit: {problem}",
            hint=f"{remedy}; or go on all the same: --force, or --set train.guards.refuse_impossible=false",
        )


def _workers_are_here(scaling: Scaling) -> bool:
    """Whether every worker runs on this machine. Ray must be connected unless the run does without."""
    if not scaling.max_workers:
        return True
    import ray

    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]} == {ray.util.get_node_ip_address()}


def report_reach(store: Store, run: str, base: ModelVersion, adapter: Adapter | None) -> None:
    """Say and write down what the adapter reaches, before anything is taken. Raises `ConfigError` where that is less than
    its patterns name."""
    if adapter is None:
        return
    found = planning.Model.of(configuration(store, base)).coverage(adapter)
    print("\n".join(f"  adapter   {line}" for line in found.lines()), file=sys.stderr, flush=True)
    store.write(paths.run(run, "adapter.json"), canonical_json(found.to_json()))
