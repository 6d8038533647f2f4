"""A run's checkpoint as something that can be served."""

from __future__ import annotations

from forge_ray.errors import TrainingError
from forge_ray.progress import Stage, stage
from forge_ray.records import ModelVersion, canonical_json, files_digest
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.erased import refuse_erased
from forge_ray.store.files import Store
from forge_ray.train import validation
from forge_ray.train.checkpoint_export import CheckpointExport, export_step, exported, step_of
from forge_ray.train.frozen import joined_licence
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
    export_step(job, step, paths.export(job.run))
    job.store.write(paths.result(job.run), canonical_json(result | {"export_step": step}))


def export_run(store: Store, run: str, step: str) -> ModelVersion:
    """A verified checkpoint of a run, finished or not, as a model version that no gate has judged. `step`: a number, `best`
    or `last`."""
    with Catalog.open(store) as catalog, stage("export") as it:
        job = job_of(catalog, run)
        number = step_of(job, step)
        with exported(job, number, f"export of {run}") as export:
            version = _register(catalog, job, number, export, it)
        return version


def _register(catalog: Catalog, job: TrainJob, step: int, export: CheckpointExport, it: Stage) -> ModelVersion:
    """Put an export on record as a candidate."""
    store, run = catalog.store, job.run
    files = store.files(export.folder)
    version = ModelVersion(
        name=job.name,
        status="candidate",
        weights="adapter" if export.kind == "adapter" else "full",
        files=files,
        files_digest=files_digest(files),
        base_model=job.base.id,
        run=run,
        step=step,
        dataset=job.dataset.id,
        licence=joined_licence(job.base.licence, job.frozen.version if job.frozen else None),
    ).sealed()
    store.copy_dir(export.folder, paths.model(version.id))
    is_registered = catalog.has(version.id)
    folder = "" if is_registered else paths.model(version.id)
    for origin in job.origins:
        refuse_erased(store, version.id, job.dataset.id, origin, folder)
    version = catalog.put(version)
    it.done(f"{version.id}  {'already there: ' if is_registered else ''}step {step} of {run}, candidate")
    return version
