"""Packing: every document once, unchanged, alone in its segment; rows nearly full; the same rows every time."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.build.pack import Document, PackedRow, best_fit_decreasing, pack
from forge_ray.data.dataset.stream import positions

pytestmark = pytest.mark.unit
PAD = 0


def documents(lengths: list[int], seed: int = 0) -> list[Document]:
    chosen = random.Random(seed)
    return [
        Document(f"rec_{i}", [chosen.randrange(1, 500) for _ in range(n)], [chosen.randrange(2) for _ in range(n)])
        for i, n in enumerate(lengths)
    ]


def unpack(row: PackedRow) -> list[tuple[str, list[int], list[int]]]:
    """(record, ids, mask) per segment; checks that segments are 1, 2, … laid end to end, then padding."""
    count = len(row.records)
    filled = int((row.segment_ids > 0).sum())
    assert sorted(set(row.segment_ids[:filled].tolist())) == list(range(1, count + 1))
    assert (np.diff(row.segment_ids[:filled]) >= 0).all()
    assert (row.segment_ids[filled:] == 0).all()
    assert (row.input_ids[filled:] == PAD).all()
    assert (row.loss_mask[filled:] == 0).all()
    segments = []
    for segment, record in enumerate(row.records, start=1):
        inside = row.segment_ids == segment
        segments.append((record, row.input_ids[inside].tolist(), row.loss_mask[inside].tolist()))
    return segments


@given(st.data(), st.integers(8, 64))
@settings(max_examples=100, deadline=None)
def test_every_document_is_packed_once_unchanged(data: st.DataObject, sequence_length: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, sequence_length), max_size=60))
    given_documents = documents(lengths)
    rows = pack(given_documents, sequence_length, PAD)
    for row in rows:
        for column in (row.input_ids, row.loss_mask, row.segment_ids):
            assert column.shape == (sequence_length,)
            assert column.dtype == np.int32
    unpacked = {record: (ids, mask) for row in rows for record, ids, mask in unpack(row)}
    assert sum(len(row.records) for row in rows) == len(given_documents)
    assert unpacked == {d.record: (list(d.ids), [0, *d.loss_mask[1:]]) for d in given_documents}


@given(st.lists(st.integers(1, 100), max_size=120), st.integers(100, 200))
@settings(max_examples=100, deadline=None)
def test_bins_hold_every_index_once_within_capacity(lengths: list[int], capacity: int) -> None:
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= capacity for members in bins)
    assert bins == best_fit_decreasing(list(lengths), capacity)
    # two bins that fit into one would mean that a document was given a new bin without need
    fill = sorted(sum(lengths[index] for index in members) for members in bins)
    assert len(fill) < 2 or fill[0] + fill[1] > capacity


def test_best_fit_uses_the_fullest_bin() -> None:
    assert best_fit_decreasing([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit_decreasing([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert best_fit_decreasing([5, 5, 5], 10) == [[0, 1], [2]]
    assert best_fit_decreasing([], 10) == []


@pytest.mark.parametrize(("mean", "spread"), [(4.5, 0.6), (5.0, 1.0)])
def test_rows_are_at_least_98_percent_full(mean: float, spread: float) -> None:
    """Lengths of chats are close to log-normal; a partition holds up to 8,192 records."""
    chosen = random.Random(0)
    lengths = [max(8, min(512, int(chosen.lognormvariate(mean, spread)))) for _ in range(4000)]
    bins = best_fit_decreasing(lengths, 512)
    assert sum(lengths) / (512 * len(bins)) >= 0.98


def test_the_same_documents_give_the_same_rows() -> None:
    lengths = [random.Random(1).randrange(1, 33) for _ in range(200)]
    first, second = (pack(documents(lengths), 32, PAD) for _ in range(2))
    assert [row.records for row in first] == [row.records for row in second]
    for a, b in zip(first, second, strict=True):
        assert (a.input_ids == b.input_ids).all()
        assert (a.segment_ids == b.segment_ids).all()


def test_positions_restart_with_every_document_and_in_the_padding() -> None:
    assert positions(np.array([1, 1, 1, 2, 3, 3, 0, 0])).tolist() == [0, 1, 2, 0, 0, 1, 0, 1]
    assert positions(np.array([[1, 1, 2, 2], [1, 2, 2, 2]])).tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    for row in pack(documents([5, 9, 3, 14, 1]), 16, PAD):
        where = positions(row.segment_ids)
        for segment in range(1, len(row.records) + 1):
            inside = where[row.segment_ids == segment]
            assert inside.tolist() == list(range(len(inside)))


def test_documents_of_a_unit_stand_in_one_row_one_behind_the_other() -> None:
    chooser = random.Random(3)
    lengths = [chooser.randint(1, 12) for _ in range(80)]
    documents = [Document(f"rec_{number // 2}", [number] * size, [1] * size) for number, size in enumerate(lengths)]
    rows = pack(documents, 32, -1, unit_size=2)
    seen = []
    for row in rows:
        numbers = [int(row.input_ids[row.segment_ids == segment][0]) for segment in range(1, int(row.segment_ids.max()) + 1)]
        assert [number + 1 for number in numbers[0::2]] == numbers[1::2]
        assert row.records[0::2] == row.records[1::2]
        seen += numbers
    assert sorted(seen) == list(range(80))
