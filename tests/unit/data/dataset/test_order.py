"""The sample order: exactly once per epoch, the same global batches at every world size, no row left over."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.dataset.order import Order, order_of, permute, unpermute
from forge_ray.records import DatasetManifest, SplitStats

pytestmark = pytest.mark.unit
WORLD_SIZES = (1, 2, 3, 4, 6, 8)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_permute_is_a_bijection_and_unpermute_its_inverse(size: int, key: int) -> None:
    images = [permute(value, size, key) for value in range(size)]
    assert sorted(images) == list(range(size))
    assert [unpermute(image, size, key) for image in images] == list(range(size))


@given(
    num_rows=st.integers(1, 700),
    block_rows=st.integers(1, 80),
    batches_of_24=st.integers(1, 3),
    seed=st.integers(0, 5),
    epochs=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_every_row_once_per_epoch_and_equal_batches_at_any_world_size(
    num_rows: int, block_rows: int, batches_of_24: int, seed: int, epochs: int
) -> None:
    order = Order("ds_test", seed, num_rows, block_rows, global_batch=24 * batches_of_24)
    indices = [order.row(index) for index in range(epochs * num_rows)]
    for epoch in range(epochs):
        assert Counter(indices[epoch * num_rows : (epoch + 1) * num_rows]) == Counter(range(num_rows))

    num_steps = min(4, epochs * num_rows // order.global_batch)
    for step in range(num_steps):
        expected = indices[step * order.global_batch : (step + 1) * order.global_batch]
        for world_size in WORLD_SIZES:
            ranks = [order.rows_of(step, order.lanes(rank, world_size)) for rank in range(world_size)]
            assert [row for rank in ranks for row in rank] == expected


@given(
    num_rows=st.integers(1, 150),
    block_rows=st.integers(1, 40),
    global_batch=st.integers(1, 170),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_index_of_inverts_row(num_rows: int, block_rows: int, global_batch: int, seed: int) -> None:
    """For every row of three epochs, also where the batch is larger than the dataset and the last block is short."""
    order = Order("ds_test", seed, num_rows, block_rows, global_batch)
    for index in range(3 * num_rows):
        assert order.index_of(order.row(index), index // num_rows) == index
    with pytest.raises(ValueError, match="is none of"):
        order.index_of(num_rows, 0)


def test_order_depends_on_dataset_seed_and_epoch() -> None:
    def first(dataset: str = "ds_a", seed: int = 0, epoch: int = 0) -> list[int]:
        order = Order(dataset, seed, 500, 32, 8)
        return [order.row(epoch * 500 + index) for index in range(32)]

    assert first() == first()
    assert len({tuple(first()), tuple(first("ds_b")), tuple(first(seed=1)), tuple(first(epoch=1))}) == 4


def test_a_lane_walks_whole_blocks() -> None:
    """Locality: in 100 steps a lane touches at most the blocks that hold 100 consecutive rows, and one more."""
    order = Order("ds_a", 0, num_rows=100_000, block_rows=50, global_batch=16)
    for lane in range(16):
        blocks = [order.row(step * 16 + lane) // 50 for step in range(100)]
        assert len(set(blocks)) <= 3
        assert len(set(blocks[:50])) <= 2


def test_digest_is_over_the_rows_in_order() -> None:
    order = Order("ds_a", 0, 100, 8, 4)
    assert order.digest(10) == Order("ds_a", 0, 100, 8, 4).digest(10) == order.link(order.digest(9), 9)
    assert order.digest(10) != Order("ds_a", 1, 100, 8, 4).digest(10)


def test_uneven_lanes_are_spread_over_the_ranks() -> None:
    order = Order("ds_a", 0, 100, 8, 4)
    assert [order.lanes(rank, 3) for rank in range(3)] == [range(0, 1), range(1, 2), range(2, 4)]
    with pytest.raises(ValueError, match="leaves some of 5 ranks without a lane"):
        order.lanes(0, 5)


def test_order_depends_on_the_rows_not_on_the_dataset_id() -> None:
    """And a run that was made when the dataset's id was the key keeps its order."""
    stats = SplitStats(
        num_records=9,
        num_rows=100,
        num_tokens=9,
        num_trained_tokens=9,
        rows_digest="sha256:rows",
        block_rows=8,
        shard_rows=(100,),
    )
    fields = {"name": "x", "format": 2, "config": {}, "tokenizer_digest": "", "base_model": "", "sources": ()}
    fields |= {"num_duplicates": 0, "rejects": {}, "sequence_length": 8, "input_digest": ""}
    first, second = (DatasetManifest(id=name, splits={"train": stats}, **fields) for name in ("ds_a", "ds_b"))
    assert order_of(first, "train", 0, 4) == order_of(second, "train", 0, 4) == Order("sha256:rows", 0, 100, 8, 4)
    assert order_of(first, "train", 0, 4, key=first.id) == Order("ds_a", 0, 100, 8, 4)
