"""The files of what a frozen model says of packed rows: pieces while they are computed, then larger ones, read by row."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.data.dataset.stream import READING
from forge_ray.errors import StoreError
from forge_ray.records import DatasetManifest
from forge_ray.store.files import Store
from forge_ray.train.measure import PIECE_ROWS, Measure, RowValues

SPLITS = ("train", "validation")
FILE_ROWS = 1024  # packed rows of a published file


@dataclass(frozen=True)
class RowRange:
    """Some neighbouring packed rows of a split."""

    split: str
    first: int
    num_rows: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.first:09d}.parquet"


def pieces(dataset: DatasetManifest) -> list[RowRange]:
    """Of the splits that training looks at."""
    return [piece for _, parts in files_of(dataset) for piece in parts]


def files_of(dataset: DatasetManifest) -> Iterator[tuple[RowRange, list[RowRange]]]:
    """The files that are published, and the pieces of each."""
    for split in SPLITS:
        stats = dataset.splits.get(split)
        for first in range(0, stats.num_rows if stats else 0, FILE_ROWS):
            assert stats
            size = min(FILE_ROWS, stats.num_rows - first)
            starts = range(first, first + size, PIECE_ROWS)
            parts = [RowRange(split, start, min(PIECE_ROWS, first + size - start)) for start in starts]
            yield RowRange(split, first, size), parts


@lru_cache(maxsize=64)
def group_of(store: Store, folder: str, file: RowRange, number: int) -> list[RowValues]:
    """The rows of a group of a published file."""
    with READING:
        table = _file(store, folder, file).read_row_group(number)
    lists = {name: table.column(name).combine_chunks() for name in table.column_names}
    return [
        {name: values[row].values.to_numpy(zero_copy_only=False) for name, values in lists.items()}
        for row in range(table.num_rows)
    ]


@lru_cache(maxsize=64)
def _file(store: Store, folder: str, file: RowRange) -> pq.ParquetFile:
    path = fetched(store, folder) / file.name
    opened = pq.ParquetFile(path) if path.is_file() else None
    num_rows = opened.metadata.num_rows if opened else 0
    if opened is None or num_rows != file.num_rows:
        raise StoreError(
            f"{folder}/{file.name} has {num_rows} rows and the dataset {file.num_rows}",
            hint=f"remove {folder}: the next run computes it again",
        )
    return opened


@lru_cache(maxsize=4)
def fetched(store: Store, folder: str) -> Path:
    """The folder on this machine, each file verified against its manifest."""
    return store.fetch_dir(folder)


def schema_of(measure: Measure) -> pa.Schema:
    return pa.schema([(name, pa.list_(kind)) for name, kind in measure.types.items()])


def parquet(values: list[RowValues], measure: Measure) -> bytes:
    columns = {
        name: pa.array([row[name] for row in values], pa.list_(kind), size=len(values))
        for name, kind in measure.types.items()
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema_of(measure)), sink, compression="zstd")
    return sink.getvalue()
