"""From a checkpoint to weights, to a model, to a servable export, without the workers that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forge_ray.errors import StoreError, TrainingError
from forge_ray.store import paths
from forge_ray.train import checkpoint, finish
from forge_ray.train.checkpoint import Checkpoint, Position
from forge_ray.train.engine import trained
from forge_ray.train.job import TrainJob
from forge_ray.train.methods import method_of
from forge_ray.train.model import load_for_training
from forge_ray.train.zero import consolidated


def verified(job: TrainJob, step: int) -> Checkpoint:
    """The checkpoint of `step`, authentic and every byte checked as a resume does. Raises `NotFound` where there is none
    or that the run removed while it was read, `StoreError` where it is not whole or another run's, `PolicyError` where its
    manifest is not authentic."""
    store = job.store
    checkpoint.require_step(store, job.run, step)
    relative = paths.checkpoint(job.run, step)
    whole, reason = checkpoint.verify(store, relative, checkpoint.expected(job))
    if whole is None or whole.position.step != step:
        checkpoint.require_step(store, job.run, step)
        reason = reason or f"it is of step {whole.position.step}"  # type: ignore[union-attr]
        raise StoreError(f"{relative} is not used: {reason}", hint="take another step")
    return whole


def of_checkpoint(folder: Path, position: Position) -> dict[str, Tensor]:
    """The trained weights in fp32 by their name in the model, on the CPU. No code of it runs: it is
    read as data (`data_only`)."""
    if position.engine == "torch":
        state: dict[str, Tensor] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)["weights"]
        return state
    return consolidated(folder)


def load(job: TrainJob, step: int, device: torch.device) -> nn.Module:
    """The base model with the weights of that checkpoint, in the precision of the run and as one process holds it."""
    whole = verified(job, step)
    weights = of_checkpoint(whole.folder, whole.position)
    base = job.store.fetch_dir(paths.model(job.base.id), files=job.base.files, verify=not job.store.is_local)
    alone = job.config.model_copy(update={"engine": "torch", "zero_stage": 0})
    model = load_for_training(base, alone, job.precision, device, 1, method_of(job).head)
    with torch.no_grad():
        for name, parameter in trained(model):
            if name not in weights:
                raise TrainingError(f"the checkpoint of step {step} has no weight {name}", hint="take another step")
            parameter.copy_(weights[name])
    return model


def export_checkpoint(values: dict[str, Any], step: int, relative: str) -> str:
    """Write what the end of the run would export, of `step`, to `relative` in the store; returns its kind. `values` is
    `TrainJob.to_json()`, so that it can be a task of its own."""
    job = TrainJob.from_json(values)
    model = load(job, step, torch.device("cpu"))
    chosen = trained(model) if job.config.adapter else list(model.named_parameters())
    weights = {name: parameter.detach() for name, parameter in chosen}
    base = job.store.fetch_dir(paths.model(job.base.id), files=job.base.files, verify=not job.store.is_local)
    return finish.export(job, model, weights, base, method_of(job).head, relative)
