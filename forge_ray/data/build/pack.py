"""Documents → rows of a fixed length, each document isolated by its segment id (no torch)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Documents:
    """n tokenised documents laid end to end: `ids` and `loss_mask` are [sum(lengths)], `lengths` is [n]."""

    ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.int8]
    lengths: npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackedRows:
    """`input_ids` int32, `loss_mask` int8, `segment_ids` int32, all [rows, sequence_length]; segment 0 is padding.

    `members` lists the documents of each row in segment order.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.int8]
    segment_ids: npt.NDArray[np.int32]
    members: list[list[int]]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices: longest first, each into the fullest bin that still takes it (ties: the older bin).

    Bins are kept by their free space; the next larger space that has a bin is found in a sorted list of at most
    `capacity` + 1 entries, so the cost grows with the documents alone.
    """
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens → bins, the oldest last
    spaces: list[int] = []  # sorted, those of `by_space` that have a bin
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        place = bisect.bisect_left(spaces, length)
        if place == len(spaces):
            number, free = len(bins), capacity - length
            bins.append([index])
        else:
            space = spaces[place]
            waiting = by_space[space]
            number, free = waiting.pop(), space - length
            if not waiting:
                del spaces[place]
            bins[number].append(index)
        waiting = by_space[free]
        if not waiting:
            bisect.insort(spaces, free)
        bisect.insort(waiting, number, key=lambda bin_number: -bin_number)
    return bins


def pack(documents: Sequence[Document], sequence_length: int, pad_id: int, unit_size: int = 1) -> list[PackedRow]:
    """`pack_flat` for a few documents that are not arrays yet, in units of one size."""
    flat = Documents(
        np.array([token for document in documents for token in document.ids], np.int32),
        np.array([bit for document in documents for bit in document.loss_mask], np.int8),
        np.array([len(document.ids) for document in documents], np.int64),
    )
    units = np.full(len(documents) // unit_size, unit_size, np.int64)
    rows = pack_flat(flat, sequence_length, pad_id, units)
    return [
        PackedRow(ids, mask.astype(np.int32), segments, [documents[index].record for index in members])
        for ids, mask, segments, members in zip(rows.input_ids, rows.loss_mask, rows.segment_ids, rows.members, strict=True)
    ]


def pack_flat(
    documents: Documents, sequence_length: int, pad_id: int, unit_sizes: npt.NDArray[np.int64] | None = None
) -> PackedRows:
    """Rows in a fixed order: the same documents in the same order give the same rows. `unit_sizes`: numbers of neighbouring
    documents that stand in one row, one behind the other; None: each by itself."""
    if unit_sizes is None:
        members = best_fit_decreasing(documents.lengths.tolist(), sequence_length)
    else:
        firsts = np.cumsum(unit_sizes) - unit_sizes
        sums = np.add.reduceat(documents.lengths, firsts) if len(firsts) else documents.lengths
        units = best_fit_decreasing(sums.tolist(), sequence_length)
        members = [[int(firsts[unit]) + n for unit in row for n in range(unit_sizes[unit])] for row in units]
    shape = (len(members), sequence_length)
    ids, mask = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int8)
    segments = np.zeros(shape, np.int32)
    if not members:
        return PackedRows(ids, mask, segments, members)
    order = np.concatenate([np.array(row) for row in members])
    counts = np.array([len(row) for row in members])
    lengths = documents.lengths[order]
    starts = np.concatenate([[0], np.cumsum(documents.lengths)])[order]
    packed = np.concatenate([[0], np.cumsum(lengths)])  # documents laid end to end in the new order
    first_of_row = np.concatenate([[0], np.cumsum(counts)])[:-1]
    row_start = np.repeat(packed[first_of_row], counts)
    to = np.repeat(np.arange(len(members)), counts) * sequence_length + packed[:-1] - row_start
    step = np.arange(packed[-1])
    source = np.repeat(starts - packed[:-1], lengths) + step
    target = np.repeat(to - packed[:-1], lengths) + step
    segment = np.arange(len(order)) - np.repeat(first_of_row, counts) + 1
    ids.reshape(-1)[target] = documents.ids[source]
    mask.reshape(-1)[target] = documents.loss_mask[source]
    mask.reshape(-1)[to] = 0  # nothing before it inside its own document
    segments.reshape(-1)[target] = np.repeat(segment, lengths)
    return PackedRows(ids, mask, segments, members)
