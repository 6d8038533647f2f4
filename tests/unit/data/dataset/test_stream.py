"""Reading: what the ranks get together is what the order says, at any world size and from any step."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.data.build.pack import Document, PackedRow, PackedRows, pack
from forge_ray.data.build.reduce import packed_table
from forge_ray.data.dataset import stream
from forge_ray.data.dataset.order import Order
from forge_ray.data.dataset.stream import Arrays, Feed, Rows, local_batches
from forge_ray.data.dataset.version import content_digest
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit
LENGTH, BLOCK_ROWS, GLOBAL_BATCH = 8, 3, 24
WORLD_SIZES = (1, 2, 3, 4, 6, 8)
SHARD_ROWS = (64 * BLOCK_ROWS, 2 * BLOCK_ROWS, 40)  # shards differ in length; only the last ends in a short block


def table_of(rows: list[PackedRow]) -> pa.Table:
    columns = (np.stack([getattr(row, name) for row in rows]) for name in ("input_ids", "loss_mask", "segment_ids"))
    return packed_table(PackedRows(*columns, []), [row.records for row in rows], [[0] * len(row.records) for row in rows])


@pytest.fixture(scope="module")
def packed() -> list[PackedRow]:
    """More blocks than one shard holds, and a short last one; no two rows are equal."""
    count = sum(SHARD_ROWS)
    documents = [
        Document(f"rec_{i}_{part}", [i + 1] * (LENGTH // 2), [1] * (LENGTH // 2)) for i in range(count) for part in "ab"
    ]
    rows = pack(documents, LENGTH, pad_id=0)
    assert len(rows) == count
    assert count % BLOCK_ROWS
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, packed: list[PackedRow]) -> Rows:
    store = Store(str(tmp_path_factory.mktemp("store")))
    folder = Path(store.root) / "datasets/ds_x/packed/train"
    folder.mkdir(parents=True)
    for number, start in enumerate(itertools.accumulate(SHARD_ROWS[:-1], initial=0)):
        table = table_of(packed[start : start + SHARD_ROWS[number]])
        pq.write_table(table, folder / f"shard-{number:05d}.parquet", row_group_size=BLOCK_ROWS)
    return Rows(store, "ds_x", "train", LENGTH, len(packed), BLOCK_ROWS, SHARD_ROWS)


def feed(rows: Rows, rank: int, world_size: int, first_step: int, num_steps: int) -> Feed:
    order = Order("ds_x", 7, rows.num_rows, rows.block_rows, GLOBAL_BATCH)
    return Feed(rows, order, order.lanes(rank, world_size), first_step, num_steps)


def equal(left: Arrays, right: Arrays) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_take_gives_the_rows_asked_for(rows: Rows, packed: list[PackedRow]) -> None:
    numbers = [len(packed) - 1, 0, 1, SHARD_ROWS[0], 0, 5]
    batch = rows.take(numbers)
    for place, number in enumerate(numbers):
        for name in ("input_ids", "loss_mask", "segment_ids"):
            assert (batch[name][place] == getattr(packed[number], name)).all()


def test_records_lists_the_record_ids_of_each_row(rows: Rows, packed: list[PackedRow]) -> None:
    numbers = [len(packed) - 1, 0, SHARD_ROWS[0]]
    assert rows.records(numbers) == [packed[number].records for number in numbers]
    assert all(len(record_ids) == 2 for record_ids in rows.records(numbers))


def test_blocks_are_read_once_for_all_their_rows(
    rows: Rows, packed: list[PackedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, read = [1, 0, 1, *range(2 * BLOCK_ROWS), len(packed) - 1], []
    monkeypatch.setattr(
        stream, "_read_block", lambda *values, plain=stream._read_block: read.append(values) or plain(*values)
    )
    assert rows.records(numbers) == [packed[number].records for number in numbers]
    assert [number for _, number, _ in read] == [0, 1, (len(packed) - 1) // BLOCK_ROWS]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_ranks_together_read_the_global_batch(rows: Rows, world_size: int) -> None:
    """Over two epochs and into the third, lane by lane in the order's own sequence."""
    num_steps = 2 * rows.num_rows // GLOBAL_BATCH + 2
    order = feed(rows, 0, 1, 0, 1).order
    ranks = [local_batches(feed(rows, rank, world_size, 0, num_steps)) for rank in range(world_size)]
    steps = 0
    for step, parts in enumerate(zip(*ranks, strict=True)):
        expected = rows.batch(order.rows_of(step, range(GLOBAL_BATCH)))
        assert equal({name: np.concatenate([part[name] for part in parts]) for name in expected}, expected)
        steps += 1
    assert steps == num_steps


@pytest.mark.parametrize("first_step", [0, 1, 2, 3, 7, 11])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_starting_at_a_step_equals_skipping_to_it(rows: Rows, first_step: int, num_steps: int) -> None:
    whole = itertools.islice(local_batches(feed(rows, 1, 4, 0, 20)), first_step, first_step + num_steps)
    started = local_batches(feed(rows, 1, 4, first_step, num_steps))
    for expected, batch in zip(whole, started, strict=True):
        assert equal(expected, batch)


def test_no_steps_no_batches(rows: Rows) -> None:
    assert [list(local_batches(feed(rows, 0, 2, step, 0))) for step in (0, 1, 3)] == [[], [], []]


def test_batches_are_model_inputs(rows: Rows) -> None:
    batch = next(local_batches(feed(rows, 0, 2, 0, 1)))
    assert set(batch) == {"input_ids", "loss_mask", "segment_ids", "position_ids"}
    for values in batch.values():
        assert values.dtype == np.int64
        assert values.shape == (GLOBAL_BATCH // 2, LENGTH)
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3] * 2


def test_a_lane_reads_each_block_of_its_window_once(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    block = Rows.block

    def counted(self: Rows, number: int) -> Arrays:
        read.append(number)
        return block(self, number)

    monkeypatch.setattr(Rows, "block", counted)
    window = feed(rows, 0, 24, 0, BLOCK_ROWS)
    assert len(window.lanes) == 1
    window.read(0)
    assert len(read) == len(set(read)) <= 2


@pytest.mark.parametrize("share", [2, 4])
def test_sequence_parallel_ranks_read_equal_batches(rows: Rows, share: int) -> None:
    """Groups of sequence or tensor parallelism: equal inside, and together what the order says."""
    import torch

    from forge_ray.train.context import Context

    world = [Context(rank, 8, 0, torch.device("cpu"), False, share) for rank in range(8)]
    batches = [next(local_batches(feed(rows, one.data_rank, one.data_size, 5, 1))) for one in world]
    for first in range(0, 8, share):
        assert [one.data_rank for one in world[first : first + share]] == [first // share] * share
        assert [one.sp_rank for one in world[first : first + share]] == list(range(share))
        assert all(equal(batches[first], other) for other in batches[first : first + share])
    whole = next(local_batches(feed(rows, 0, 1, 5, 1)))
    together = np.concatenate([batches[first]["input_ids"] for first in range(0, 8, share)])
    assert np.array_equal(together, whole["input_ids"])


def test_the_digest_of_a_shard_is_over_its_values(packed: list[PackedRow]) -> None:
    """However a reader batches the table, and whatever the Parquet file looks like."""
    table = table_of(packed[:50])
    batched = table.from_batches(table.to_batches(max_chunksize=7))
    assert batched.column(0).num_chunks > 1
    assert content_digest(batched) == content_digest(table) == content_digest(table_of(packed)[:50])
    swapped = table_of([packed[1], packed[0], *packed[2:50]])
    other_records = [PackedRow(r.input_ids, r.loss_mask, r.segment_ids, ["rec_x", *r.records[1:]]) for r in packed[:50]]
    assert len({content_digest(t) for t in (table, swapped, table_of(other_records))}) == 3


def test_segment_ids_exceed_sixteen_bits() -> None:
    """A row of 128k tokens can hold more than 32,767 short texts."""
    count = 40_000
    (row,) = pack([Document("rec", [1, 2], [0, 1])] * count, 2 * count, pad_id=0)
    segments = table_of([row]).column("segment_ids")[0].as_py()
    assert (segments[0], segments[-1]) == (1, count)
