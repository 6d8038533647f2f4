"""One training step: the rows it trains on, what its ranks add up, its passes and its update.

It knows the method and the engine, and nothing of checkpoints, validations or the store.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forge_ray.data.dataset.stream import Arrays, Rows
from forge_ray.errors import TrainingError
from forge_ray.train import checkpoint
from forge_ray.train.context import Context, sum_over_ranks
from forge_ray.train.engine import TrainEngine
from forge_ray.train.guards import AttemptGuards
from forge_ray.train.method import STEP_MEAN, STORED, Batch, Column, Method, ReadRows
from forge_ray.train.moe import Balance
from forge_ray.train.sequence_parallel import Slices


@dataclass(frozen=True)
class StepSums:
    """What the ranks add up at the head of every step, in one collective. Where ranks share their rows
    (`train.sequence_parallel`), rows count once."""

    weight: float  # units that the step divides its losses by: the method's
    trained_tokens: float
    tokens: float
    rows_sum: float  # of the fingerprints of the rows as read
    preemption_checks: float  # ranks for which it is time to ask whether a node is to be taken away
    stops: float  # ranks that want to end the run early
    written: float  # ranks that have written their part of a checkpoint
    published: float  # ranks that have published one
    num_rows: tuple[float, ...]  # to train on, by rank
    peak_bytes: tuple[float, ...]  # most memory held, by rank

    def over_ranks(self, context: Context) -> StepSums:
        """Collective. Of what is kept by rank, a rank gives its own value alone."""
        packed = self.pack(context)
        totals = iter(sum_over_ranks([number for numbers in packed.values() for number in numbers], context))
        summed: dict[str, Any] = {name: tuple(next(totals) for _ in numbers) for name, numbers in packed.items()}
        for name in packed.keys() - BY_RANK:
            (summed[name],) = summed[name]
        return StepSums(**summed | {name: summed[name] / context.sp_size for name in OF_ROWS})

    def pack(self, context: Context) -> dict[str, list[float]]:
        """Every field as the numbers that are added up, those by rank in this rank's own place."""
        places = range(context.world_size)
        return {
            name: [value[0] * (rank == context.rank) for rank in places] if isinstance(value, tuple) else [value]
            for name, value in vars(self).items()
        }


OF_ROWS = ("weight", "trained_tokens", "tokens", "rows_sum")
BY_RANK = {"num_rows", "peak_bytes"}


@dataclass(frozen=True)
class StepRows:
    """What one rank trains on in a step. `step` counts from 1; `numbers` are the packed rows that the batch came from."""

    step: int
    numbers: list[int]
    batch: Batch
    digest: str = ""  # of rows that the method made


@dataclass(frozen=True)
class PassSums:
    """One rank's sums over the passes of a step."""

    loss: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def plus(self, loss: float, metrics: Mapping[str, float]) -> PassSums:
        added = {name: self.metrics.get(name, 0.0) + value for name, value in metrics.items()}
        return PassSums(self.loss + loss, {**self.metrics, **added})


@dataclass(frozen=True)
class Steps:
    """What all steps of an attempt compute with."""

    method: Method
    engine: TrainEngine
    rows: Rows
    slices: Slices
    balance: Balance | None
    guards: AttemptGuards
    context: Context
    micro_batch_size: int

    def rows_of(self, read: ReadRows) -> StepRows:
        """Rows as read → rows to train on: those that are left out blank, the method's columns added or its rows made."""
        step, numbers, left_out, digest = read.step, read.numbers, self.guards.left_out.rows, ""
        arrays = with_columns(self.method, self.rows, numbers, read.arrays)
        blank(arrays, self.method, [lane for lane, row in enumerate(numbers) if left_out.get(row, step + 1) <= step])
        if self.method.make:
            derived = self.method.make(ReadRows(step, numbers, arrays), self.engine, self.context)
            numbers, arrays, digest = derived.numbers, derived.arrays, derived.digest
        return StepRows(step, numbers, tensors(arrays, self.method, self.context), digest)

    def update(self, rows: StepRows, sums: StepSums, lr: float) -> dict[str, Any]:
        """Passes and one optimizer step; returns the step's metrics. Without a finite result nothing changes, and it is
        computed once more from the same random state."""
        losses: list[float] = []
        random_state = checkpoint.rng_state()
        weight = max(sums.weight, 1.0)
        num_passes = self._num_passes(rows.step, sums)
        for _ in range(2):
            if losses:
                checkpoint.set_rng_state(random_state)
            totals = self._over_ranks(self.passes(rows, weight, num_passes, self._step_mean(rows, num_passes)))
            values = averages(totals, weight, self.method)
            loss, grad_norm = values.pop("loss"), self.engine.step(lr)
            if math.isfinite(loss) and grad_norm < math.inf:
                if losses:
                    self.guards.record("recovered", rows.step, first=str(losses[0]))
                return {"loss": loss, "grad_norm": grad_norm, **values}
            if grad_norm < math.inf:
                raise TrainingError(
                    f"step {rows.step}: loss={loss} with finite gradients (norm {grad_norm}): the weights cannot be trusted",
                    hint="this is a fault of the loss; the last checkpoint is from before this step",
                )
            losses.append(loss)
        self.guards.skipped(rows.step, *losses)
        return {"left_out": "not finite"}

    def _over_ranks(self, sums: PassSums) -> dict[str, float]:
        """Collective: the loss, the method's metrics and the routers' balance, summed by name."""
        named = {"loss": sums.loss, **dict(sorted(sums.metrics.items()))}
        if self.balance:
            named["router_balance"] = self.balance.take()
        return dict(zip(named, sum_over_ranks(list(named.values()), self.context), strict=True))

    def passes(self, rows: StepRows, weight: float, num_passes: int, whole: Batch) -> PassSums:
        """Forward and backward over this rank's rows; adds to the gradients. `whole`: columns that every pass has alike. The
        balance of routers is not part of the loss."""
        sums = PassSums()
        for number, (numbers, part) in enumerate(self._parts(rows, num_passes)):
            with self.guards.blaming(rows.step, numbers):
                pass_sums = self.method.loss(self.engine.forward, self.slices.cut(part) | whole)
                used, pass_weight = part["segment_ids"] > 0, self.method.weight(part)
                extra = self.balance.loss(used, pass_weight) if self.balance else 0.0
                self.engine.backward((pass_sums.loss + extra) / weight, is_last=number == num_passes - 1)
                sums = sums.plus(*pass_sums.fetch())
        return sums

    def _parts(self, rows: StepRows, num_passes: int) -> Iterator[tuple[list[int], Batch]]:
        """(packed rows, their batch) of each pass. Passes are collective, so every rank does `num_passes`: where its rows
        have run out, over a blank one."""
        size = self._rows_per_pass(rows.step)
        for number in range(num_passes):
            lanes = slice(number * size, (number + 1) * size)
            part = {name: value[lanes] for name, value in rows.batch.items()}
            yield rows.numbers[lanes], part if len(part["input_ids"]) else blank_row(rows.batch, self.method.columns)

    @torch.no_grad()
    def _step_mean(self, rows: StepRows, num_passes: int) -> Batch:
        """The column `STEP_MEAN` where the method has one; collective."""
        if not self.method.step_mean:
            return {}
        sums: list[tuple[Tensor, Tensor]] = []
        self.engine.model.eval()
        for numbers, part in self._parts(rows, num_passes):
            with self.guards.blaming(rows.step, numbers):
                sums.append(self.method.step_mean(self.engine.forward, self.slices.cut(part)))
        self.engine.model.train()
        return step_mean(sums, self.context)

    def _rows_per_pass(self, step: int) -> int:
        """One where a worker failed in this step before, so that the row at fault is known."""
        return 1 if step in self.guards.left_out.careful else self.micro_batch_size

    def _num_passes(self, step: int, sums: StepSums) -> int:
        return max(1, -(-int(max(sums.num_rows)) // self._rows_per_pass(step)))


def step_mean(sums: Sequence[tuple[Tensor, Tensor]], context: Context) -> Batch:
    """The column `STEP_MEAN` of (sum, count) of the passes of all ranks; 0 where nothing was counted."""
    totals = torch.stack([torch.stack(one).double() for one in sums]).sum(dim=0).tolist()
    total, count = sum_over_ranks(totals, context)
    return {STEP_MEAN: torch.tensor(total / count if count else 0.0, dtype=torch.float32, device=context.device)}


def averages(totals: Mapping[str, float], weight: float, method: Method) -> dict[str, float]:
    """Sums over all ranks → means: over the units of the method, or over what `Method.divisors` names. A mean over nothing
    is left out."""
    counts = {name: totals[method.divisors[name]] if name in method.divisors else weight for name in totals}
    return {name: total / counts[name] for name, total in totals.items() if counts[name]}


def tensors(arrays: Arrays, method: Method, context: Context) -> Batch:
    """The declared columns of some rows, on this rank's device. Raises `TrainingError` where others are there."""
    declared = [column.name for column in (*STORED, *method.columns)]
    if set(declared) != set(arrays):
        raise TrainingError(
            f"a batch has the columns {sorted(arrays)}, its training method declares {sorted(declared)}",
            hint="declare each column in `Method.columns`, with what reads it, or let `Method.make` return it",
        )
    return {name: torch.from_numpy(arrays[name]).to(context.device) for name in declared}


def with_columns(method: Method, rows: Rows, numbers: list[int], arrays: Arrays) -> Arrays:
    """Packed rows as read, and the columns that the method reads for them."""
    return arrays | {column.name: column.read(rows, numbers) for column in method.columns if column.read}


def blank(arrays: Arrays, method: Method, lanes: list[int]) -> None:
    """Make these rows into rows without a document: nothing in them is trained, nor seen. In place."""
    for column in (*STORED, *method.columns) if lanes else ():
        if column.name in arrays:  # one that `Method.make` brings is not there yet
            array = arrays[column.name]
            array[lanes] = np.arange(array.shape[1]) if column.name == "position_ids" else column.blank


def blank_row(batch: Batch, columns: tuple[Column, ...]) -> dict[str, Tensor]:
    """One row without a document, of a batch's shapes."""
    row = {
        column.name: batch[column.name].new_full((1, *batch[column.name].shape[1:]), column.blank)
        for column in (*STORED, *columns)
    }
    positions = row["position_ids"]
    return row | {"position_ids": torch.arange(positions.shape[1], device=positions.device)[None]}
