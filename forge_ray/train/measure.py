"""What is computed of packed rows by a frozen model: of each document its log probability, or what a method asks for.

Shapes: B rows, S documents of a row, K trained positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from forge_ray.train.loss import segment_sums, token_logps
from forge_ray.train.method import Batch, Forward
from forge_ray.train.shared_prompt import shared_prompts

PIECE_ROWS = 16  # packed rows that one worker computes between two writes
RowValues = dict[str, npt.NDArray[Any]]  # of one packed row: by column, one dimension


@dataclass(frozen=True)
class Measure:
    """What is computed of a packed row. `settings` decide the numbers, with weights, precision and rows. `compute` takes one
    row as a batch. `group_rows`: rows that are read together. `difference`: (how far two results for a row are apart, how
    large they are), both in nats."""

    settings: tuple[Any, ...]
    types: Mapping[str, pa.DataType]
    group_rows: int
    compute: Callable[[Forward, Batch], RowValues]
    difference: Callable[[RowValues, RowValues], tuple[float, float]]


def document_logps(in_pairs: bool) -> Measure:
    """Of each document of a row, the log p of its trained tokens. `in_pairs`: what two begin with alike is computed once."""
    return Measure((), {"logps": pa.float32()}, PIECE_ROWS, partial(_document_logps, in_pairs), largest_difference)


def _document_logps(in_pairs: bool, forward: Forward, batch: Batch) -> RowValues:
    logps_K, positions_K = token_logps(forward, batch, shared_prompts(batch) if in_pairs else None)
    sums_BS, _ = segment_sums(logps_K, positions_K, batch)
    return {"logps": sums_BS[0, : int(batch["segment_ids"].max())].float().cpu().numpy()}


def largest_difference(kept: RowValues, again: RowValues) -> tuple[float, float]:
    """Over all columns of two results for a row: how far they are apart, and how large they are."""
    differences = [np.abs(kept[name] - again[name]).max(initial=0.0) for name in kept]
    return float(max(differences)), float(max(np.abs(values).max(initial=0.0) for values in kept.values()))


def by_segment(values: list[list[float]], blank: float) -> npt.NDArray[np.float32]:
    """Numbers per document of each row as [B, S] fp32, S even as in `segment_sums`; `blank` where a row has fewer."""
    most = max(map(len, values), default=0)
    filled = np.full((len(values), most + most % 2), blank, np.float32)
    for lane, numbers in enumerate(values):
        filled[lane, : len(numbers)] = numbers
    return filled
