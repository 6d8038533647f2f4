"""What `train.micro_batch_size=auto` stands for."""

from __future__ import annotations

from forge_ray.config.train import TrainConfig
from forge_ray.records import DatasetManifest
from forge_ray.train.plan import Model, plan
from forge_ray.train.stated import Stated

# Tokens of a pass beyond which a larger one gains nothing: matrix products of a CPU's caches, and of a card's many units
ENOUGH = {"cpu": 2048, "gpu": 16384}
SAFE = 0.8  # of a worker's memory: libraries, and what the plan does not know, need some of it


def largest_pass(
    model: Model,
    config: TrainConfig,
    precision: str,
    dataset: DatasetManifest | Stated,
    num_workers: int,
    limit: int | None,
    frozen: Model | None = None,
) -> int:
    """Packed rows per forward pass, a power of two: as many as a worker has of a step, `ENOUGH` tokens have, and `SAFE` of
    `limit` bytes hold; 1 where the limit is not known."""
    enough = ENOUGH["gpu" if config.scaling.gpus_per_worker else "cpu"]
    most = min(config.global_batch * config.sequence_parallel // num_workers, enough // dataset.sequence_length)
    size = 1
    while limit and 2 * size <= most:
        changed = config.model_copy(update={"micro_batch_size": 2 * size})
        if plan(model, changed, precision, dataset, num_workers, frozen).worker_bytes > SAFE * limit:
            break
        size *= 2
    return size
