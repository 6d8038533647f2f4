"""The end of a run: the servable export, then the facts for its record."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from forge_ray.config.method import loss_name
from forge_ray.config.train import TrainConfig
from forge_ray.data.dataset.order import Order
from forge_ray.data.tokens.text_tools import write_form
from forge_ray.models.architecture import Head
from forge_ray.records import canonical_json
from forge_ray.store import paths
from forge_ray.store.scratch import scratch
from forge_ray.train import attempts, incidents, metrics
from forge_ray.train.job import TrainJob
from forge_ray.train.model import export_adapter, export_full, merge_adapter

RESULT = "result.json"


def export(job: TrainJob, model: Any, weights: dict[str, Tensor], base: Path, head: Head, relative: str = "") -> str:
    """Plain Hugging Face or PEFT safetensors under `relative`, `runs/<id>/export` by default; returns which of the two."""
    with job.store.staged_dir(relative or paths.export(job.run)) as target:
        if job.config.adapter is None:
            export_full(base, weights, target, head)
        elif job.config.export == "adapter":
            export_adapter(model, weights, job.base.id, target, head)
        else:
            with scratch("adapter") as adapter:
                export_adapter(model, weights, job.base.id, adapter, head)
                merge_adapter(base, adapter, target)
        write_form(target, job.dataset.config.get("tools", "template"))
        job.check_may_publish()
    return export_kind(job.config)


def export_kind(config: TrainConfig) -> str:
    """What `export` returns."""
    return "adapter" if config.adapter and config.export == "adapter" else "full"


def finish(
    job: TrainJob, folder: Path, order: Order, num_steps: int, chain: str, export_kind: str, stopped: dict[str, Any] | None
) -> None:
    """The facts of the finished run, for its record; the last thing written."""
    lines = metrics.read(folder / metrics.METRICS)
    metrics.plot(lines, folder / metrics.CURVE, f"{job.name} · {job.run}", loss_name(job.config.method_name))
    compute = sum(line["compute_s"] for line in lines)
    summary = {
        "loss": next(line["loss"] for line in reversed(lines) if "loss" in line),
        "seconds": sum(line["seconds"] for line in lines),
        "wait_s": sum(line["wait_s"] for line in lines),
        "compute_s": compute,
        "checkpoint_s": sum(line.get("checkpoint_s", 0.0) for line in lines),
        "tokens": sum(line["tokens"] for line in lines),
        "trained_tokens": sum(line["trained_tokens"] for line in lines),
        "tokens_per_s": sum(line["tokens"] for line in lines) / max(compute, 1e-9),
        "peak_bytes": max(max(line.get("peak_bytes", [0])) for line in lines),
        "steps_left_out": sum("left_out" in line for line in lines),
    }
    if measured := [line for line in lines if "mfu" in line]:
        summary["mfu"] = sum(line["mfu"] * line["seconds"] for line in measured) / sum(line["seconds"] for line in measured)
    if "validation_loss" in lines[-1]:
        summary["validation_loss"] = lines[-1]["validation_loss"]
    result = {
        "num_steps": num_steps,
        "samples_seen": num_steps * order.global_batch,
        "order_digest": chain,
        "attempts": attempts.read(job.store, job.run),
        "incidents": incidents.read(job.store, job.run),
        "metrics": summary,
        "export_kind": export_kind,
        "stopped_early": stopped,
    }
    job.check_may_publish()
    job.store.write(paths.run(job.run, RESULT), canonical_json(result))
    if not job.store.is_local:
        for name in (metrics.METRICS, metrics.CURVE):
            job.store.write(paths.run(job.run, name), (folder / name).read_bytes())
        shutil.rmtree(folder, ignore_errors=True)
