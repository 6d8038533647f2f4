"""The method's loss on held-out rows, without a gradient: in the loop, or of a checkpoint in a task of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from forge_ray.data.dataset.order import order_of
from forge_ray.data.dataset.stream import Rows
from forge_ray.errors import TrainingError
from forge_ray.train.context import Context, join, sum_over_ranks
from forge_ray.train.engine import TrainEngine
from forge_ray.train.job import TrainJob
from forge_ray.train.method import Batch, Method
from forge_ray.train.methods import method_of
from forge_ray.train.sequence_parallel import Slices
from forge_ray.train.step import PassSums, averages, step_mean, tensors, with_columns
from forge_ray.train.validation import Result, write
from forge_ray.train.weights import load, verified


@dataclass(frozen=True)
class PlainModel:
    """What `validate` needs of an engine, over a model that belongs to none."""

    model: Any

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


@torch.no_grad()
def validate(
    job: TrainJob, method: Method, engine: TrainEngine | PlainModel, context: Context, slices: Slices | None = None
) -> dict[str, float]:
    """`validation_loss` and the method's metrics, per unit of weight, on the same validation rows each time; empty where the
    dataset has none. Every rank does the same number of passes.

    A shuffled sample, not the first rows: packing puts the longest documents first, and they are not like the others.
    """
    rows = Rows.of(job.store, job.dataset, "validation")
    num_rows = min(rows.num_rows, job.config.validation.max_rows)
    if not num_rows:
        return {}
    if derived := [column.name for column in method.columns if column.read is None]:
        raise TrainingError(
            f"train.method={job.config.method_name} makes the columns {derived} while it trains; validation rows have none",
            hint="set train.validation.max_rows=0",
        )
    order = order_of(job.dataset, "validation", 0, global_batch=1)
    sample = [order.row(index) for index in range(num_rows)]
    size = job.micro_batch_size

    def parts() -> Iterator[tuple[bool, Batch, Batch]]:
        """(does it count, its rows, this rank's slice of them); a rank whose rows have run out takes part, and counts
        nothing."""
        for start in range(0, num_rows, size * context.data_size):
            numbers = sample[start + context.data_rank * size : start + (context.data_rank + 1) * size]
            read = numbers or sample[:1]
            batch = tensors(with_columns(method, rows, read, rows.batch(read)), method, context)
            yield bool(numbers), batch, slices.cut(batch) if slices else batch

    engine.model.eval()
    sums, weight, whole = PassSums(), 0.0, Batch()
    if method.step_mean:
        of_passes = [(counts, method.step_mean(engine.forward, part)) for counts, _, part in parts()]
        whole = step_mean([(total * counts, count * counts) for counts, (total, count) in of_passes], context)
    for counts, batch, part in parts():
        loss, metrics = method.loss(engine.forward, part | whole).fetch()
        sums = sums.plus(loss * counts, {name: value * counts for name, value in metrics.items()})
        weight += float(method.weight(batch)) * counts
    engine.model.train()
    names = ["loss", *sorted(sums.metrics)]
    *totals, weight = sum_over_ranks([sums.loss, *(sums.metrics[name] for name in names[1:]), weight], context)
    weight = max(weight / context.sp_size, 1.0)  # ranks that share their rows counted them once each
    means = averages(dict(zip(names, totals, strict=True)), weight, method)
    return {f"validation_{name}": value for name, value in means.items()}


def validate_checkpoint(values: dict[str, Any], step: int) -> None:
    """The same as `validate`, from a checkpoint, in a process that belongs to no group; written into the store."""
    job, began = TrainJob.from_json(values), time.perf_counter()
    context = join(bool(job.config.validation.gpus), int(job.config.validation.cpus), under_ray=False)
    position = verified(job, step).position
    method = method_of(job)
    scores = validate(job, method, PlainModel(load(job, step, context.device)), context)
    result = Result(step, position.left_out, scores["validation_loss"], "", time.perf_counter() - began, background=True)
    write(job.store, job.run, result)
