"""The order of samples: a pure function of (key, seed, epoch, global index), O(1) memory per index.

The global batch has a fixed number G of packed rows and is made of G *lanes*. In an epoch of n rows, position p belongs
to column p mod G; the columns laid end to end are one walk over all blocks in shuffled order, so a lane reads whole blocks
one after another and nothing is materialised. Epochs run into each other: no row is dropped, each appears once per epoch.
A rank owns a contiguous N-th of the lanes, so another world size moves lanes between ranks and changes no global batch.
The key is the digest of the split's packed rows (`order_of`): datasets with equal rows are used in the same order, whatever
files they came from.

    order = Order(key="sha256:…", seed=0, num_rows=1000, block_rows=64, global_batch=8)
    [order.row(8 * step + lane) for lane in range(8)]      # the rows of one optimizer step
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from forge_ray.records import DatasetManifest

MASK64 = (1 << 64) - 1
FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class Order:
    """`num_rows` rows in blocks of `block_rows` (the last may be shorter), `global_batch` rows per step."""

    key: str
    seed: int
    num_rows: int
    block_rows: int
    global_batch: int

    def __post_init__(self) -> None:
        if min(self.num_rows, self.block_rows, self.global_batch) < 1:
            raise ValueError(f"an order needs at least one row, block row and lane: {self}")

    @property
    def num_blocks(self) -> int:
        return -(-self.num_rows // self.block_rows)

    def row(self, index: int) -> int:
        """The dataset row at global index `index` (step * global_batch + lane, epochs concatenated)."""
        epoch, position = divmod(index, self.num_rows)
        length, longer = divmod(self.num_rows, self.global_batch)
        walk_position, column = divmod(position, self.global_batch)
        return self._walk(epoch, column * length + min(column, longer) + walk_position)

    def index_of(self, row: int, epoch: int) -> int:
        """The global index at which `row` comes in an epoch: `row(index_of(r, e)) == r`, with `index // num_rows == e`."""
        if not 0 <= row < self.num_rows or epoch < 0:
            raise ValueError(f"row {row} of epoch {epoch} is none of {self}")
        length, longer = divmod(self.num_rows, self.global_batch)
        place, wide = self._place(epoch, row), longer * (length + 1)
        if place < wide:
            column, walk_position = divmod(place, length + 1)
        else:
            column, walk_position = divmod(place - wide, length)
            column += longer
        return epoch * self.num_rows + walk_position * self.global_batch + column

    def _place(self, epoch: int, row: int) -> int:
        """The inverse of `_walk`."""
        last = self.num_blocks - 1
        last_rows = self.num_rows - last * self.block_rows
        block, inside = divmod(row, self.block_rows)
        rows = last_rows if block == last else self.block_rows
        offset = unpermute(inside, rows, self._key(epoch, block))
        ordinal, last_ordinal = (unpermute(b, self.num_blocks, self._key(epoch, -1)) for b in (block, last))
        if ordinal <= last_ordinal:
            return ordinal * self.block_rows + offset
        return (ordinal - 1) * self.block_rows + last_rows + offset

    def _walk(self, epoch: int, place: int) -> int:
        """The row at `place` of the epoch's walk: blocks shuffled, and the rows inside each block shuffled."""
        last = self.num_blocks - 1
        last_rows = self.num_rows - last * self.block_rows
        last_ordinal = unpermute(last, self.num_blocks, self._key(epoch, -1))
        boundary = last_ordinal * self.block_rows
        if place < boundary:
            ordinal, offset = divmod(place, self.block_rows)
        elif place < boundary + last_rows:
            ordinal, offset = last_ordinal, place - boundary
        else:
            ordinal, offset = divmod(place - last_rows, self.block_rows)
            ordinal += 1
        block = permute(ordinal, self.num_blocks, self._key(epoch, -1))
        rows = last_rows if block == last else self.block_rows
        return block * self.block_rows + permute(offset, rows, self._key(epoch, block))

    def _key(self, epoch: int, block: int) -> int:
        return _key(self.key, self.seed, epoch, block)

    def lanes(self, rank: int, world_size: int) -> range:
        """The lanes that `rank` owns: contiguous; where they do not divide evenly some ranks own one more."""
        if self.global_batch < world_size:
            raise ValueError(f"global_batch={self.global_batch} leaves some of {world_size} ranks without a lane")
        return range(rank * self.global_batch // world_size, (rank + 1) * self.global_batch // world_size)

    def rows_of(self, step: int, lanes: range) -> list[int]:
        return [self.row(step * self.global_batch + lane) for lane in lanes]

    def link(self, before: str, step: int, derived: str = "") -> str:
        """The chain's digest behind `step`, from the one before it ("" before step 0): equal for every world size. `derived`
        is the digest of the rows that a training method made of those read."""
        rows = self.rows_of(step, range(self.global_batch))
        linked = before.encode() + b"".join(row.to_bytes(8, "little") for row in rows) + derived.encode()
        return "sha256:" + hashlib.sha256(linked).hexdigest()

    def digest(self, num_steps: int, derived: Mapping[int, str] = MappingProxyType({})) -> str:
        """The chain over the first `num_steps` steps: which rows were used, in which order. `derived`: by step, from 0."""
        chain = ""
        for step in range(num_steps):
            chain = self.link(chain, step, derived.get(step, ""))
        return chain


def order_of(manifest: DatasetManifest, split: str, seed: int, global_batch: int, key: str = "") -> Order:
    """The order of a split's packed rows. `key` is given for a run that was made when the dataset's id was the key."""
    stats = manifest.splits[split]
    return Order(key or stats.rows_digest, seed, stats.num_rows, stats.block_rows, global_batch)


@lru_cache(maxsize=4096)
def _key(key: str, seed: int, epoch: int, block: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{key}/{seed}/{epoch}/{block}".encode()).digest()[:8], "little")


def permute(value: int, size: int, key: int) -> int:
    """A keyed bijection of range(size): a balanced Feistel network with cycle walking (Black and Rogaway 2002)."""
    half = _half_bits(size)
    while True:
        value = _feistel(value, half, key, range(FEISTEL_ROUNDS))
        if value < size:
            return value


def unpermute(value: int, size: int, key: int) -> int:
    """The inverse of `permute`."""
    half = _half_bits(size)
    mask = (1 << half) - 1
    while True:
        left, right = value >> half, value & mask
        for round_number in reversed(range(FEISTEL_ROUNDS)):
            left, right = right ^ (_mix(left, key, round_number) & mask), left
        value = left << half | right
        if value < size:
            return value


def _feistel(value: int, half: int, key: int, rounds: range) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for round_number in rounds:
        left, right = right, left ^ (_mix(right, key, round_number) & mask)
    return left << half | right


def _half_bits(size: int) -> int:
    return max(1, ((size - 1).bit_length() + 1) // 2)


def _mix(value: int, key: int, round_number: int) -> int:
    """splitmix64's finaliser (Steele, Lea, Flood 2014) over value, key and round."""
    x = (value * 0x9E3779B97F4A7C15 + key + round_number * 0xD1B54A32D192ED03) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)
