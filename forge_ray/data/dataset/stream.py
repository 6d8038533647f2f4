"""From a dataset version to one rank's batches, in the order that `order.py` says.

The order names the rows; this module only brings them near. The unit of reading is a *window*: `block_rows` steps of one
lane, which lie in one or two blocks. Under Ray, each worker reads its first window and runs a small Ray Data pipeline over
those that follow, so reading and decoding happen on idle CPUs, ahead of the step, bounded by Ray Data's back-pressure.
Without Ray a thread does the same with the same function. The whole state is the step: there is nothing to save and nothing
to skip.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.data.dataset.order import Order
from forge_ray.records import DatasetManifest
from forge_ray.store import paths
from forge_ray.store.files import Store

COLUMNS = ("input_ids", "loss_mask", "segment_ids")
READING = threading.Lock()  # two threads in one ParquetFile crash the process
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Rows:
    """One split of one dataset version, read by row number. Pickles to a few strings."""

    store: Store
    dataset: str
    split: str
    sequence_length: int
    num_rows: int
    block_rows: int
    shard_rows: tuple[int, ...]

    @classmethod
    def of(cls, store: Store, manifest: DatasetManifest, split: str) -> Rows:
        stats = manifest.splits[split]
        return cls(store, manifest.id, split, manifest.sequence_length, stats.num_rows, stats.block_rows, stats.shard_rows)

    def block(self, number: int) -> Arrays:
        """Every row of a block: int32 [rows, sequence_length] per column."""
        table = _read_block(self, number, COLUMNS)
        shape = (table.num_rows, self.sequence_length)
        flat = {name: table.column(name).combine_chunks().flatten().to_numpy() for name in COLUMNS}
        return {name: values.astype(np.int32).reshape(shape) for name, values in flat.items()}

    def take(self, rows: list[int]) -> Arrays:
        """Rows by number, in the order asked: int32 [len(rows), sequence_length] per column. Reads each block once."""
        result: Arrays = {name: np.empty((len(rows), self.sequence_length), np.int32) for name in COLUMNS}
        blocks = np.array(rows) // self.block_rows
        for number in dict.fromkeys(blocks.tolist()):
            where = np.flatnonzero(blocks == number)
            values = self.block(number)
            for name in COLUMNS:
                result[name][where] = values[name][np.array(rows)[where] - number * self.block_rows]
        return result

    def batch(self, rows: list[int]) -> Arrays:
        """`take`, as the model wants it: int64, with `position_ids`."""
        return model_inputs(self.take(rows))

    def records(self, rows: list[int]) -> list[list[str]]:
        """The record ids inside each of the rows, in segment order."""
        return self._of_documents(rows, "records")

    def _of_documents(self, rows: list[int], column: str) -> list[list[Any]]:
        """Reads each block once."""
        numbers = dict.fromkeys(row // self.block_rows for row in rows)
        blocks = {number: _read_block(self, number, (column,))[column].combine_chunks() for number in numbers}
        return [blocks[row // self.block_rows][row % self.block_rows].as_py() for row in rows]

    def grades(self, rows: list[int]) -> list[list[float]]:
        """The number of each document of the rows (`version.GRADED`), in segment order."""
        return self._of_documents(rows, "grades")

    def labels(self, rows: list[int]) -> list[list[str]]:
        """The label of each document of the rows (`version.LABELLED`), in segment order."""
        return self._of_documents(rows, "labels")

    def block_records(self, number: int) -> list[list[str]]:
        """The record ids inside each row of a block."""
        record_ids: list[list[str]] = _read_block(self, number, ("records",))["records"].to_pylist()
        return record_ids


def model_inputs(rows: Arrays) -> Arrays:
    """int64 copies of the columns, and position ids that restart with every document."""
    batch = {name: values.astype(np.int64) for name, values in rows.items()}
    return batch | {"position_ids": positions(batch["segment_ids"])}


def _read_block(rows: Rows, number: int, columns: tuple[str, ...]) -> pa.Table:
    starts = _shard_starts(rows)
    shard = bisect.bisect_right(starts, number) - 1
    with READING:
        return _shard(rows, shard).read_row_group(number - starts[shard], columns=list(columns))


@lru_cache(maxsize=16)
def _shard_starts(rows: Rows) -> list[int]:
    """The number of each shard's first block."""
    blocks = (-(-count // rows.block_rows) for count in rows.shard_rows)
    return list(itertools.accumulate(blocks, initial=0))[:-1]


@lru_cache(maxsize=64)
def _shard(rows: Rows, number: int) -> pq.ParquetFile:
    path = rows.store.path(paths.shard(rows.dataset, rows.split, number))
    return pq.ParquetFile(rows.store.filesystem.open_input_file(path))


@dataclass(frozen=True)
class Feed:
    """What one rank reads: `num_steps` steps from `first_step`, the lanes it owns."""

    rows: Rows
    order: Order
    lanes: range
    first_step: int
    num_steps: int

    @property
    def windows(self) -> range:
        """Numbers of the windows that hold this feed's steps."""
        size = self.order.block_rows
        return range(self.first_step // size, -(-(self.first_step + self.num_steps) // size))

    def steps(self, window: int) -> range:
        size = self.order.block_rows
        last = self.first_step + self.num_steps
        return range(max(self.first_step, window * size), min(last, (window + 1) * size))

    def read(self, item: int) -> Arrays:
        """Item i: the rows of lane i mod L in window i div L, as [steps, sequence_length]."""
        number, lane = divmod(item, len(self.lanes))
        steps = self.steps(self.windows[number])
        first = self.order.global_batch
        return self.rows.take([self.order.row(step * first + self.lanes[lane]) for step in steps])

    def batches(self, items: Iterator[Arrays]) -> Iterator[Arrays]:
        """Per step, this rank's rows in lane order: int64 [lanes, sequence_length], `position_ids` added."""
        for window in self.windows:
            lanes = list(itertools.islice(items, len(self.lanes)))
            for offset in range(len(self.steps(window))):
                yield model_inputs({name: np.stack([lane[name][offset] for lane in lanes]) for name in COLUMNS})


def local_batches(feed: Feed) -> Iterator[Arrays]:
    """Without Ray: one thread reads ahead by one round of lanes."""
    total = len(feed.windows) * len(feed.lanes)

    def ahead() -> Iterator[Arrays]:
        with ThreadPoolExecutor(1, thread_name_prefix="forge-read") as pool:
            waiting: list[Future[Arrays]] = []
            for item in range(total):
                waiting.append(pool.submit(feed.read, item))
                if len(waiting) > len(feed.lanes):
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()

    return feed.batches(ahead())


def ray_batches(feed: Feed) -> Iterator[Arrays]:
    """On Ray: the windows stream through Ray Data tasks, in order. The first is read here: it takes milliseconds, and the
    tasks seconds until they run, which the first steps take meanwhile."""
    import ray.data

    own, total = len(feed.lanes), len(feed.windows) * len(feed.lanes)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    left = max(total - own, 1)
    windows = ray.data.range(left, override_num_blocks=left).map_batches(partial(_read_items, feed=feed), batch_size=1)
    shape = (-1, feed.rows.sequence_length)

    def items() -> Iterator[Arrays]:
        rows: Iterator[dict[str, Any]] = iter(windows.iter_rows() if total > own else ())
        with ThreadPoolExecutor(1, thread_name_prefix="forge-read") as pool:
            starting = pool.submit(next, rows, None)
            yield from map(feed.read, range(own))
            row = starting.result()
        while row is not None:
            yield {name: np.frombuffer(row[name], np.int32).reshape(shape) for name in COLUMNS}
            row = next(rows, None)

    return feed.batches(items())


def _read_items(batch: dict[str, Any], feed: Feed) -> dict[str, Any]:
    """Windows differ in length, so they travel as bytes: no ragged tensors, no copies in Arrow. Ids count from the second
    window."""
    arrays = [feed.read(int(item) + len(feed.lanes)) for item in batch["id"]]
    return {name: [array[name].tobytes() for array in arrays] for name in COLUMNS}


def positions(segment_ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Position ids that restart with every segment, padding included; [..., sequence_length] like the input."""
    length = segment_ids.shape[-1]
    index = np.broadcast_to(np.arange(length), segment_ids.shape)
    starts = np.ones(segment_ids.shape, bool)
    starts[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
    positions: npt.NDArray[np.int64] = index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1)
    return positions
