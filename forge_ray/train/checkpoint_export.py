"""A checkpoint of a run, finished or not, as an export: which step is meant, and the task that writes it.

Nothing here writes to the run's own files or waits for its driver: an export is read from one checkpoint, whose folder is
marked as in use, so that the run keeps it until the export is whole.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from forge_ray.errors import ConfigError, ForgeError, NotFound, TrainingError
from forge_ray.machine.cluster import connect
from forge_ray.store import paths
from forge_ray.store.uses import using
from forge_ray.train import checkpoint, validation
from forge_ray.train.job import TrainJob

LAST, BEST = "last", "best"


@dataclass(frozen=True)
class CheckpointExport:
    """The folder of the store that holds the export, and whether it has an `adapter` or `full` weights."""

    folder: str
    kind: str


def step_of(job: TrainJob, text: str) -> int:
    """The step that `best`, `last` or a number means. Raises `NotFound` where the run has no such checkpoint, with those
    that it has, and `ConfigError` for anything else."""
    store, run = job.store, job.run
    if text == LAST:
        position = checkpoint.find(store, checkpoint.expected(job), None)
        if position is None:
            raise NotFound(f"{run} has no whole checkpoint", hint="wait for its first checkpoint")
        return position.step
    if text == BEST:
        top, step = validation.best(validation.read(store, run)), validation.best_step(store, run)
        if top and step != top.step:
            raise NotFound(
                f"the best validation of {run} was at step {top.step}, whose checkpoint is gone",
                hint=f"{_listed(job)}; train.validation.keep_best=true keeps the best",
            )
        if step is None:
            raise NotFound(f"{run} has no best checkpoint: it has no validation yet", hint=_listed(job))
        return step
    if not text.isdecimal():
        raise ConfigError(f"{text!r} is not a step of {run}", hint=f"give a number, `{BEST}` or `{LAST}`")
    checkpoint.require_step(store, run, int(text))
    return int(text)


def _listed(job: TrainJob) -> str:
    return f"its checkpoints: {', '.join(map(str, checkpoint.steps(job.store, job.run))) or 'none'}"


@contextmanager
def exported(job: TrainJob, step: int, purpose: str) -> Iterator[CheckpointExport]:
    """An export of the checkpoint of `step`, next to those of the run, until the block ends. `purpose` names it in the
    mark of use, for which neither the run nor `forge store prune` removes what is read here."""
    aside = paths.run(job.run, "exports", f"{paths.step(step)}-{uuid.uuid4().hex[:8]}")
    with using(job.store, purpose, paths.checkpoint(job.run, step), aside, paths.model(job.base.id)):
        try:
            yield CheckpointExport(aside, export_step(job, step, aside))
        finally:
            job.store.delete_dir(aside)


def export_step(job: TrainJob, step: int, relative: str) -> str:
    """Write the export of a checkpoint to `relative`; returns its kind. In a task where there is a cluster, since this
    machine may lack the memory for the model; else here."""
    import ray

    from forge_ray.train.weights import export_checkpoint

    if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
        return export_checkpoint(job.to_json(), step, relative)
    connect()
    # no CPU is asked for: those of a run that is training are all taken, and it is the disk that this waits for
    task = ray.remote(num_cpus=0, max_retries=1)(export_checkpoint)
    try:
        kind: str = ray.get(task.remote(job.to_json(), step, relative))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ForgeError) else TrainingError(str(error.cause)) from None
    return kind
