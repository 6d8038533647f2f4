"""What a training method is to the loop: one frozen value of functions. It knows no store, no checkpoint, no guard.

Shapes: B packed rows, T tokens, S segments (documents) of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt
import torch
from torch import Tensor

from forge_ray.data.dataset.stream import Arrays, Rows
from forge_ray.models.architecture import LM, Head
from forge_ray.train.context import Context
from forge_ray.train.engine import TrainEngine

Batch = dict[str, Tensor]  # the columns of `STORED`, int64 [B, T] each, and the method's own
Expect = Callable[[str, int], None]  # (phase, step): the watchdog waits for the next call
Forward = Callable[..., Any]  # the model's forward pass; returns what a transformers model returns


@dataclass(frozen=True)
class Column:
    """A column of a batch: [B, T] per token, [B, S] per segment, [B] per row; more dimensions may follow.

    `blank` is the value that means "nothing here": of padding, and of rows that are left out. `read` gives the column for
    packed rows by number, first dimension B; a column without it comes out of `Method.make`.
    """

    name: str
    per: Literal["token", "segment", "row"]
    blank: float = 0
    read: Callable[[Rows, list[int]], npt.NDArray[Any]] | None = None


STORED = tuple(Column(name, "token") for name in ("input_ids", "position_ids", "segment_ids", "loss_mask"))


STEP_MEAN = "step_mean"  # a column of every pass where `Method.step_mean` is set


@dataclass(frozen=True)
class Sums:
    """Of one pass over some rows. The loop divides each once, by the weight of the whole step over all ranks."""

    loss: Tensor  # fp32 [], differentiable
    # [] each, left on the device; the same names in every pass and on every rank
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def fetch(self) -> tuple[float, dict[str, float]]:
        """Loss and metrics as numbers: one transfer from the device, which waits for the pass once."""
        values = torch.stack([value.detach().double() for value in (self.loss, *self.metrics.values())]).tolist()
        return values[0], dict(zip(self.metrics, values[1:], strict=True))


@dataclass(frozen=True)
class ReadRows:
    """What one rank reads for a step (from 1): packed rows by number, and their columns, [B, ...] each."""

    step: int
    numbers: list[int]
    arrays: Arrays


@dataclass(frozen=True)
class DerivedRows:
    """The rows that a step trains on where a method makes them: `numbers` names, for each, the packed row it came from."""

    numbers: list[int]
    arrays: Arrays
    digest: str  # of them ("" where they follow from the rows read alone): linked into the chain of the order


@dataclass(frozen=True)
class Method:
    """`weight` counts a batch's units (tokens, pairs, examples) before any forward pass: [], 0 for a blank row. Losses and
    metrics are divided by its sum over the step; a metric that `divisors` names, by another metric's sum. Two are collective
    and called at the start of every attempt: `prepare` before the model is loaded, `begin` with the weights that the run
    starts from. `make` is collective: (rows as read, engine, context) → rows to train on, whose number may differ between
    steps and ranks. `step_mean` gives (sum, count) of a pass, fp32 [] each, without a gradient: those of all passes of a
    step (or of a validation) give the mean that every loss reads as the column `STEP_MEAN`, fp32 []."""

    loss: Callable[[Forward, Batch], Sums]
    weight: Callable[[Batch], Tensor]
    columns: tuple[Column, ...] = ()  # beside `STORED`
    make: Callable[[ReadRows, TrainEngine, Context], DerivedRows] | None = None
    prepare: Callable[[Context, Expect], None] | None = None
    begin: Callable[[TrainEngine, Context, Expect], None] | None = None
    step_mean: Callable[[Forward, Batch], tuple[Tensor, Tensor]] | None = None
    divisors: Mapping[str, str] = field(default_factory=dict)  # metric → the metric that counts what it is a mean over
    watched: str = "loss"  # the metric that the spike guard watches; "" where none says that training diverges
    head: Head = LM
