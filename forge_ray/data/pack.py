"""Documents → rows of a fixed length, each document isolated by its segment id (level 2, no torch)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Document:
    """One tokenised document of a record."""

    record: str
    ids: Sequence[int]
    loss_mask: Sequence[int]


@dataclass(frozen=True)
class PackedRow:
    """`input_ids`, `loss_mask`, `segment_ids`: int32 [sequence_length]; segment 0 is padding; `records` in segment order."""

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.int32]
    segment_ids: npt.NDArray[np.int32]
    records: list[str]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices: longest first, each into the fullest bin that still takes it (ties: the older bin)."""
    bins: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free, bin), sorted: the first that fits is the fullest
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(space, (lengths[index], -1))
        if place == len(space):
            bins.append([index])
            free, number = capacity - lengths[index], len(bins) - 1
        else:
            free, number = space.pop(place)
            bins[number].append(index)
            free -= lengths[index]
        bisect.insort(space, (free, number))
    return bins


def pack(documents: Sequence[Document], sequence_length: int, pad_id: int) -> list[PackedRow]:
    """Rows in a fixed order: the same documents in the same order give the same rows."""
    rows = []
    for members in best_fit_decreasing([len(document.ids) for document in documents], sequence_length):
        ids = np.full(sequence_length, pad_id, np.int32)
        mask = np.zeros(sequence_length, np.int32)
        segments = np.zeros(sequence_length, np.int32)
        start = 0
        for segment, index in enumerate(members, start=1):
            document = documents[index]
            end = start + len(document.ids)
            ids[start:end] = document.ids
            mask[start:end] = document.loss_mask
            mask[start] = 0  # nothing before it inside its own document
            segments[start:end] = segment
            start = end
        rows.append(PackedRow(ids, mask, segments, [documents[index].record for index in members]))
    return rows


def positions(segment_ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Position ids that restart with every segment, padding included; [..., sequence_length] like the input."""
    length = segment_ids.shape[-1]
    index = np.broadcast_to(np.arange(length), segment_ids.shape)
    starts = np.ones(segment_ids.shape, bool)
    starts[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1)
