"""A training method of the tests, as different from supervised fine-tuning as the loop allows: pairs of documents in one
packed row, columns per token, segment and row, rows that are made in the step, and metrics of its own.

`method_of` takes the place of the loop's own in a worker: `run(job, method="pairs")`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from forge_ray.data.dataset.stream import Rows
from forge_ray.train.context import Context
from forge_ray.train.engine import TrainEngine
from forge_ray.train.job import TrainJob
from forge_ray.train.loss import token_logps
from forge_ray.train.method import Batch, Column, DerivedRows, Forward, Method, ReadRows, Sums

NUM_SEGMENTS = 12


def pair_of_segments(rows: Rows, numbers: list[int]) -> npt.NDArray[Any]:
    """+p for the first document of pair p, -p for the second, 0 without one: int64 [B, NUM_SEGMENTS]."""
    pairs = np.zeros((len(numbers), NUM_SEGMENTS), np.int64)
    for row, records in enumerate(rows.records(numbers)):
        for segment in range(len(records) // 2 * 2):
            pairs[row, segment] = (segment // 2 + 1) * (-1) ** segment
    return pairs


def halves(rows: Rows, numbers: list[int]) -> npt.NDArray[Any]:
    return np.full((len(numbers), rows.sequence_length), 0.5, np.float32)


PAIR = Column("pair", "segment", blank=0, read=pair_of_segments)
STRENGTH = Column("strength", "token", blank=0.0, read=halves)
STEP = Column("made_in", "row", blank=-1)  # without `read`: it comes out of `repeated`


def weight(batch: Batch) -> Tensor:
    return (batch["pair"] > 0).sum()


def loss(forward: Forward, batch: Batch) -> Sums:
    """-log sigmoid of the difference of log probabilities, per pair."""
    logps_K, positions_K = token_logps(forward, batch)
    num_rows, length = batch["input_ids"].shape
    segments_K = batch["segment_ids"].flatten()[positions_K] + positions_K // length * (NUM_SEGMENTS + 1)
    values_K = logps_K * batch["strength"].flatten()[positions_K]
    sums_BS = torch.zeros(num_rows * (NUM_SEGMENTS + 1)).index_add(0, segments_K, values_K).view(num_rows, -1)[:, 1:]
    total, margin = torch.zeros(()), torch.zeros(())
    for pair in range(1, NUM_SEGMENTS // 2 + 1):
        chosen_B, rejected_B = ((sums_BS * (batch["pair"] == sign * pair)).sum(dim=1) for sign in (1, -1))
        there_B = (batch["pair"] == pair).any(dim=1)
        total = total - (F.logsigmoid(chosen_B - rejected_B) * there_B).sum()
        margin = margin + ((chosen_B - rejected_B) * there_B).sum()
    return Sums(total, {"margin": margin})


def repeated(read: ReadRows, engine: TrainEngine, context: Context) -> DerivedRows:
    """The first row once more in every second step, on the first rank alone: numbers of rows differ by step and rank."""
    order = [0] * (read.step % 2 and context.is_first) + list(range(len(read.numbers)))
    arrays = {name: array[order] for name, array in read.arrays.items()}
    arrays["made_in"] = np.full(len(order), read.step)
    digest = "sha256:" + hashlib.sha256(str(read.step).encode()).hexdigest()
    return DerivedRows([read.numbers[lane] for lane in order], arrays, digest)


def method_of(job: TrainJob) -> Method:
    """By the name of the run."""
    if "undeclared" in job.run:
        return Method(loss=loss, weight=weight, columns=(PAIR, STRENGTH), make=repeated)
    if "made" in job.run:
        return Method(loss=loss, weight=weight, columns=(PAIR, STRENGTH, STEP), make=repeated, watched="")
    return Method(loss=loss, weight=weight, columns=(PAIR, STRENGTH), watched="margin")
