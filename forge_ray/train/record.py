"""The record of a finished run, from what its workers wrote."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from forge_ray.config.base import resolved
from forge_ray.config.method import loss_name
from forge_ray.config.run import RunConfig
from forge_ray.machine import environment
from forge_ray.records import RunRecord
from forge_ray.store import paths
from forge_ray.train import incidents, metrics, validation
from forge_ray.train.job import TrainJob, identity_digest


def run_record(job: TrainJob, config: RunConfig) -> RunRecord:
    """The record of a finished run, from what its workers wrote last."""
    result = job.store.read_json(paths.result(job.run))
    validations = validation.read(job.store, job.run)
    best = validation.best(validations)
    scores = {"best_step": best.step, "best_validation_loss": best.loss} if best else {}
    last = next((item.loss for item in reversed(validations) if item.step == result["num_steps"]), None)
    if last is not None and math.isfinite(last):
        scores["validation_loss"] = last
    _redraw(job, validations)
    newest = result["attempts"][-1] if result["attempts"] else {}
    made_in = next(iter(newest.get("environments", ())), "")  # the workers', not this process's
    lock = environment.read(job.store, made_in)
    return RunRecord(
        id=job.run,
        name=config.name,
        method=job.config.method_name,
        config=resolved(config),
        config_digest=identity_digest(job),
        dataset=job.dataset.id,
        base_model=job.base.id,
        base_digest=job.base.files_digest,
        initial_adapter=job.initial.id if job.initial else "",
        initial_digest=job.initial.files_digest if job.initial else "",
        frozen_model=job.frozen.version.id if job.frozen else "",
        frozen_digest=job.frozen.version.files_digest if job.frozen else "",
        micro_batch_size=job.chosen_micro_batch,
        seed=job.config.seed,
        num_steps=result["num_steps"],
        samples_seen=result["samples_seen"],
        order_digest=result["order_digest"],
        order_key=job.dataset.splits["train"].rows_digest,
        attempts=tuple(result["attempts"]),
        incidents=tuple(incidents.read(job.store, job.run)),
        code_digest=newest.get("code_digest") or environment.code_digest(),
        code_commit=newest.get("code_commit", ""),
        environment=environment.versions(lock),
        environment_digest=made_in,
        hardware=lock.get("hardware", {}),
        metrics=result["metrics"] | scores,
        adapter=job.store.read_json(paths.run(job.run, "adapter.json")) if job.config.adapter else {},
        stopped_early=result["stopped_early"],
        export_step=result.get("export_step", 0),
        export=job.store.files(paths.export(job.run)),
        export_kind=result["export_kind"],
    )


def _redraw(job: TrainJob, validations: list[validation.Result]) -> None:
    """The loss curve once more, with what tasks beside the workers found."""
    if not any(result.background for result in validations):
        return
    losses = {result.step: result.loss for result in validations if result.loss is not None}
    lines = metrics.parse(job.store.read(paths.run(job.run, metrics.METRICS)).decode())
    with tempfile.TemporaryDirectory(prefix="forge-curve-") as folder:
        path = Path(folder) / metrics.CURVE
        scored = [line | ({"validation_loss": losses[line["step"]]} if line["step"] in losses else {}) for line in lines]
        metrics.plot(scored, path, f"{job.name} · {job.run}", loss_name(job.config.method_name))
        job.store.write(paths.run(job.run, metrics.CURVE), path.read_bytes())
