"""A run's checkpoint as something that can be served."""

from __future__ import annotations

import os
from typing import Any

from forge_ray.errors import ConfigError, ForgeError, NotFound, TrainingError
from forge_ray.machine.cluster import connect
from forge_ray.progress import stage
from forge_ray.records import ModelVersion, canonical_json, files_digest
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.erased import refuse_erased
from forge_ray.store.files import Store
from forge_ray.store.uses import using
from forge_ray.train import checkpoint, validation
from forge_ray.train.job import TrainJob, job_of


def export_best(job: TrainJob) -> None:
    """Where the run file wants the best checkpoint exported: now, when every validation is there."""
    result = job.store.read_json(paths.result(job.run))
    if job.config.export_step != "best" or "export_step" in result:
        return
    step = validation.best_step(job.store, job.run)
    if step is None:
        raise TrainingError(
            f"no checkpoint of {job.run} was validated, so none is the best (train.export_step=best)",
            hint=f"`forge runs show {job.run}` says why; `forge runs export {job.run}` registers its last checkpoint",
        )
    _export_checkpoint(job, step, paths.export(job.run))
    job.store.write(paths.result(job.run), canonical_json(result | {"export_step": step}))


def _export_checkpoint(job: TrainJob, step: int, relative: str) -> str:
    """In a task where there is a cluster, since this machine may lack the memory for the model; else here."""
    import ray

    from forge_ray.train.weights import export_checkpoint

    if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
        return export_checkpoint(job.to_json(), step, relative)
    connect()
    # no CPU is asked for: those of a run that goes on are all taken, and it is the disk that this waits for
    task = ray.remote(num_cpus=0, max_retries=1)(export_checkpoint)
    try:
        kind: str = ray.get(task.remote(job.to_json(), step, relative))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ForgeError) else TrainingError(str(error.cause)) from None
    return kind


def export_run(store: Store, run: str, step: str) -> ModelVersion:
    """A verified checkpoint of a run, finished or not, as a model version that no gate has judged. `step`: a number, `best`,
    or "" for the newest."""
    with Catalog.open(store) as catalog, stage("export") as it:
        job = job_of(catalog, run)
        number: int | None
        if step == "best":
            top, number = validation.best(validation.read(store, run)), validation.best_step(store, run)
            if top and number != top.step:
                raise NotFound(
                    f"the best validation of {run} was at step {top.step}, whose checkpoint is gone",
                    hint="name a step that is there (`forge runs show`); train.validation.keep_best=true keeps the best",
                )
            hint = "it has no validation yet: name a step"
        elif step:
            if not step.isdecimal():
                raise ConfigError(f"--step {step!r} is no step", hint="give a number, or `best`")
            number, hint = int(step), ""
        else:
            position = checkpoint.find(store, checkpoint.expected(job), None)
            number, hint = position.step if position else None, "wait for its first checkpoint"
        if number is None:
            raise NotFound(f"{run} has no {step or 'whole'} checkpoint", hint=hint)
        aside = paths.run(run, "exports", paths.step(number))
        with using(store, f"export of {run}", paths.checkpoint(run, number), aside, paths.model(job.base.id)):
            kind: Any = _export_checkpoint(job, number, aside)
        files = store.files(aside)
        version = ModelVersion(
            name=job.name,
            status="candidate",
            weights=kind,
            files=files,
            files_digest=files_digest(files),
            base_model=job.base.id,
            run=run,
            step=number,
            dataset=job.dataset.id,
            licence=job.base.licence,
        ).sealed()
        store.copy_dir(aside, paths.model(version.id))
        store.delete_dir(aside)
        is_registered = catalog.has(version.id)
        folder = "" if is_registered else paths.model(version.id)
        for origin in (job.base.id, job.initial.id if job.initial else ""):
            refuse_erased(store, version.id, job.dataset.id, origin, folder)
        version = catalog.put(version)
        it.done(f"{version.id}  {'already there: ' if is_registered else ''}step {number} of {run}, candidate")
        return version
