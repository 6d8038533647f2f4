"""Run a training loop on Ray Train's workers, or here (level 3). The only file that knows Ray Train's constructors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from forge_ray.errors import TrainingError
from forge_ray.train.job import TrainJob

RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
Loop = Callable[[dict[str, Any]], None]


def fit(loop: Loop, job: TrainJob) -> None:
    """Run `loop` to its end; with `num_workers` 0 in this process, without Ray. Raises `TrainingError`."""
    if job.config.scaling.num_workers == 0:
        loop(replace(job, under_ray=False).to_json())
        return

    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    # our verified checkpoints are the state; Ray's snapshot is rewritten in place, and a torn one refuses every start
    job.store.delete(f"runs/{job.run}/{RAY_SNAPSHOT}")
    scaling = job.config.scaling
    resources = {"CPU": scaling.cpus_per_worker}
    if scaling.gpus_per_worker:
        resources["GPU"] = scaling.gpus_per_worker
    trainer = TorchTrainer(
        loop,
        train_loop_config=replace(job, under_ray=True).to_json(),
        torch_config=TorchConfig(backend="nccl" if scaling.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=bool(scaling.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=job.run,  # Ray takes only checkpoints from below its own folder, which is so the run's
            storage_filesystem=job.store.filesystem,
            storage_path=job.store.path("runs"),
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps the worker's exception; the cause is what a person needs
        cause = _root(error)
        raise TrainingError(
            f"run {job.run} failed: {type(cause).__name__}: {str(cause).strip().splitlines()[-1] if str(cause) else ''}",
            hint=f"the same command resumes it from its last checkpoint; logs: {job.store.place}/runs/{job.run}",
        ) from error


def _root(error: BaseException) -> BaseException:
    """The first exception of a worker inside Ray's wrappers."""
    seen = {id(error)}
    while True:
        failures = getattr(error, "worker_failures", None)
        inner = next(iter(failures.values())) if failures else getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException) or id(inner) in seen:
            return error
        seen.add(id(inner))
        error = inner


def report(metrics: dict[str, Any], job: TrainJob, checkpoint: str) -> None:
    """Tell Ray Train of a checkpoint that is already where it belongs; a barrier, so every rank calls it equally often."""
    if not job.under_ray:
        return
    import ray.train
    from ray.train import CheckpointUploadMode

    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint(job.store.path(checkpoint), filesystem=job.store.filesystem),
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
    )
