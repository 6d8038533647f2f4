"""Training compute, time and devices of a run, estimated from its record, with the formula.

FLOPs are model FLOPs by the formula of `train/speed.py`. Neither FLOPs nor hours include the recomputation of activation
checkpointing, steps that were repeated after a failure, start-up, validation and evaluation: both are lower bounds.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ForgeError
from forge_ray.records import DatasetManifest, RunRecord
from forge_ray.store import paths
from forge_ray.store.files import Store
from forge_ray.train import metrics

FORMULA = (
    "FLOPs = tokens x (4 N + 2 T + 6 L D d) + trained tokens x V H x (4, or 6 where the head is trained). N: weights of"
    " the linear layers that a token passes, the adapter's included; T: the trained ones among them; L layers of D = heads x"
    " head size; d: mean length of a document; V H: the output head. Forward 2 N, gradients of inputs 2 N, of weights 2 T"
    " (frozen ones get none), so 6 N where all are trained. Source: arXiv:2204.02311, appendix B, with T apart from N."
)
THIRD = 1 / 3  # of the original model's training compute
GPAI_FLOPS = 1e23  # indicative of a general-purpose model
THIRD_SOURCE = (
    "European Commission, guidelines on the scope of the obligations for providers of general-purpose AI models, July 2025:"
    " a modifier's compute is held against a third of the original model's training compute, or, where that cannot be known,"
    " against a third of 10^23 FLOPs (of 10^25 for a model with systemic risk)"
)


@dataclass(frozen=True)
class RunCompute:
    """The compute of one run; None for figures that are not on record."""

    tokens: int | None
    trained_tokens: int | None
    flops: float | None
    seconds: float | None  # of the steps that were not repeated, by the first worker's clock
    worker_hours: float | None
    world_sizes: tuple[int, ...]
    gpus_per_worker: float | None
    cpus_per_worker: float | None

    @property
    def device_hours(self) -> tuple[str, float] | None:
        """("GPU", hours) or ("CPU", core hours)."""
        if self.worker_hours is None or self.gpus_per_worker is None or self.cpus_per_worker is None:
            return None
        if self.gpus_per_worker:
            return "GPU", self.worker_hours * self.gpus_per_worker
        return "CPU core", self.worker_hours * self.cpus_per_worker


def of_run(store: Store, run: RunRecord, dataset: DatasetManifest | None) -> RunCompute:
    scaling = run.config.get("train", {}).get("scaling", {})
    tokens, trained = (_whole(run.metrics.get(name)) for name in ("tokens", "trained_tokens"))
    sizes = tuple(dict.fromkeys(int(attempt["world_size"]) for attempt in run.attempts))
    return RunCompute(
        tokens,
        trained,
        _flops(store, run, dataset, tokens, trained),
        run.metrics.get("seconds"),
        _worker_hours(store, run),
        sizes,
        scaling.get("gpus_per_worker"),
        scaling.get("cpus_per_worker"),
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _flops(
    store: Store, run: RunRecord, dataset: DatasetManifest | None, tokens: int | None, trained: int | None
) -> float | None:
    path = paths.model(run.base_model, "config.json")
    if tokens is None or trained is None or dataset is None or "train" not in run.config or not store.exists(path):
        return None
    from forge_ray.train.speed import flops

    with tempfile.TemporaryDirectory(prefix="forge-flops-") as folder:
        (Path(folder) / "config.json").write_bytes(store.read(path))
        try:
            estimate = flops(Path(folder), parse(TrainConfig, run.config["train"]), dataset)
        except ForgeError:  # settings or an architecture that this release does not support
            return None
    return estimate.of(tokens, trained) if estimate else None


def _worker_hours(store: Store, run: RunRecord) -> float | None:
    """The sum over steps of seconds times the number of workers at the time."""
    if not run.attempts or "seconds" not in run.metrics:
        return None
    sizes = {int(attempt["world_size"]) for attempt in run.attempts}
    if len(sizes) == 1:
        return run.metrics["seconds"] * sizes.pop() / 3600
    path = paths.run(run.id, metrics.METRICS)
    if not store.exists(path):
        return None
    total = 0.0
    for line in metrics.parse(store.read(path).decode()):
        size = next(int(a["world_size"]) for a in reversed(run.attempts) if a["first_step"] < line["step"])
        total += line["seconds"] * size
    return total / 3600
