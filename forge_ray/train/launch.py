"""Run a training loop on Ray Train's workers, or here. The only file that knows Ray Train's constructors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from forge_ray.config.scaling import Workers
from forge_ray.errors import ForgeError, TrainingError, first_cause, last_line
from forge_ray.machine.capacity import wait_for
from forge_ray.machine.hardware import cpus
from forge_ray.machine.ray_internals import RAY_SNAPSHOT, leave_sigint, remove_orphaned_groups, started_here
from forge_ray.store import paths
from forge_ray.train import checkpoint, diagnosis, incidents, validation
from forge_ray.train.job import TrainJob
from forge_ray.train.manifest_key import manifest_key

logger = logging.getLogger("forge_ray")
Loop = Callable[[dict[str, Any]], None]
Validate = Callable[[dict[str, Any], int], None]  # (TrainJob.to_json(), step): writes its result into the store


def fit(loop: Loop, job: TrainJob, validate: Validate | None = None) -> None:
    """Run `loop` to its end; with `num_workers` 0 in this process, without Ray. Raises `TrainingError`. `validate` is what a
    task does with a checkpoint, where `train.validation.background` wants one.

    What fails is started again from its last checkpoint, until it failed `max_failures` times without getting any further.
    Ray would count all failures of a run's life, and would go on for ever with one that always fails in the same step.
    """
    manifest_key(job.store)  # a store without one is refused before anything starts
    allowed, without_progress = job.config.scaling.max_failures, 0
    reached = _progress(job)
    while True:
        try:
            return _fit_once(loop, job, validate)
        except Exception as error:  # Ray wraps the worker's exception; the cause is what a person needs
            cause = first_cause(error)
            now = _progress(job)
            without_progress = 0 if now > reached else without_progress + 1
            reached = now
            reason = f"{type(cause).__name__}: {last_line(cause)}"
            if isinstance(cause, ForgeError) or 0 <= allowed < without_progress:
                message = cause.message if isinstance(cause, ForgeError) else reason
                page = diagnosis.write(job, cause)
                raise TrainingError(
                    f"run {job.run} failed: {message}",
                    hint=(f"{cause.hint}; " if isinstance(cause, ForgeError) and cause.hint else "")
                    + f"what happened and what to do: {page}; the same command resumes it from its last checkpoint",
                ) from error
            logger.warning("%s; started again (%s)", reason, job.run)
            if job.config.scaling.max_workers:
                remove_orphaned_groups()
            incidents.write(job.store, job.run, "restart", reached[0], why=reason[:300])


def _progress(job: TrainJob) -> tuple[int, int]:
    """The step of the newest checkpoint, and how many rows were put aside: either is a reason to try again."""
    newest = next(iter(checkpoint.steps(job.store, job.run)), 0)
    return newest, len(incidents.left_out(incidents.read(job.store, job.run)).rows)


def _fit_once(loop: Loop, job: TrainJob, validate: Validate | None) -> None:
    scaling = job.config.scaling
    if scaling.max_workers == 0:
        loop(replace(job, under_ray=False).to_json())
        return

    import ray.train
    from ray.data import DataContext, ExecutionResources
    from ray.train.torch import TorchTrainer

    from forge_ray.train.preflight import workers_demand
    from forge_ray.train.process_group import ProcessGroup

    wait_for(workers_demand(job.config))
    if started_here():  # workers have the same context: no more tasks that read rows than cores, though Ray has more slots
        DataContext.get_current().execution_options.resource_limits = ExecutionResources.for_limits(cpu=cpus())
    # our verified checkpoints are the state; Ray's snapshot is rewritten in place, and a torn one refuses every start
    job.store.delete(paths.run(job.run, RAY_SNAPSHOT))
    resources = {"CPU": scaling.cpus_per_worker}
    if scaling.gpus_per_worker:
        resources["GPU"] = scaling.gpus_per_worker
    size: dict[str, Any] = {"num_workers": scaling.num_workers}
    if isinstance(scaling.num_workers, Workers):
        least, most, every_s = scaling.num_workers.min, scaling.num_workers.max, scaling.num_workers.resize_every_s
        size = {"num_workers": (least, most), "elastic_resize_monitor_interval_s": every_s}
    beside: dict[str, Any] = {}
    if validate and job.config.validation.background:
        beside["validation_config"] = _validation_config(job, validate)
    trainer = TorchTrainer(
        loop,
        train_loop_config=replace(job, under_ray=True).to_json(),
        torch_config=ProcessGroup(backend="nccl" if scaling.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            **size, use_gpu=bool(scaling.gpus_per_worker), resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=job.run,  # Ray takes only checkpoints from below its own folder, which is so the run's
            storage_filesystem=job.store.filesystem,
            storage_path=job.store.path(paths.run()),
            failure_config=ray.train.FailureConfig(max_failures=0),
        ),
        **beside,
    )
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    leave_sigint(trainer)
    trainer.fit()


def _validation_config(job: TrainJob, validate: Validate) -> Any:
    """Ray's own task does nothing but wait for one of ours: should a process of Ray's task be lost more often than it is
    retried, the controller would end, and the run with it; it answers for exceptions of the function alone."""
    from ray.train import ValidationConfig

    function = partial(_apart, validate=validate, values=replace(job, under_ray=True).to_json())
    return ValidationConfig(function, ray_remote_kwargs={"num_cpus": 0, "max_retries": -1})


def _apart(checkpoint: Any, step: int, validate: Validate, values: dict[str, Any]) -> dict[str, Any]:
    """Have `validate` done by a task with its own CPUs and GPUs; whatever goes wrong there is an incident, and no more."""
    import ray

    job = TrainJob.from_json(values)
    settings = job.config.validation
    task = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus, max_retries=0)(validate)
    reference = task.remote(values, step)
    try:
        ray.get(reference, timeout=settings.timeout_s)
    except Exception as error:
        ray.cancel(reference, force=True)
        cause = first_cause(error)
        reason = f"{type(cause).__name__}: {last_line(cause)}"[:300]
        if isinstance(error, ray.exceptions.GetTimeoutError):
            reason = (
                f"it had not ended after train.validation.timeout_s={settings.timeout_s:g}, including its wait for resources"
            )
        validation.write(job.store, job.run, validation.Result(step, problem=reason, background=True))
        incidents.write(job.store, job.run, "validation", step, why=reason)
    return {}


def is_preempted(job: TrainJob) -> bool:
    """Whether a node of this group is to be taken away; collective, and told once."""
    if not job.under_ray:
        return False
    import ray.train

    info = ray.train.get_preemption_info()
    is_news = info is not None and info.deadline_ms not in _reported_deadlines
    if info is not None:
        _reported_deadlines.add(info.deadline_ms)
    return is_news


_reported_deadlines: set[Any] = set()


def report(metrics: dict[str, Any], job: TrainJob, checkpoint: str, validate: bool = False) -> None:
    """Tell Ray Train of a checkpoint that is already where it belongs; a barrier, so every rank calls it equally often.
    `validate`: a task is to be started for it."""
    if not job.under_ray:
        return
    import ray.train
    from ray.train import CheckpointUploadMode, ValidationTaskConfig

    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint(job.store.path(checkpoint), filesystem=job.store.filesystem),
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        validation=ValidationTaskConfig(fn_kwargs={"step": metrics["step"]}) if validate else False,
    )
