"""Which files of a store hold erased rows: read from the files themselves, whatever folder they lie in.

Parquet and Arrow files are searched by the columns that datasets and builds have (ids, subjects, texts), lines of JSON by
the record that they name. Weights, metrics and facts hold no rows in a form that could be searched; `leftovers.py` decides
which weights may be there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from forge_ray.data.build.tombstones import Erased
from forge_ray.data.record.schema import DataRecord
from forge_ray.store.files import Store

COLUMNS = ("record", "records", "subject", "content")


@dataclass(frozen=True)
class Examined:
    """`holding`: file → number of erased rows in it; `unreadable`: files that are torn, or not what their name says."""

    num_files: int
    num_bytes: int
    holding: dict[str, int]
    unreadable: tuple[str, ...]


def examine(store: Store, files: Iterable[tuple[str, int]], tombstones: Erased) -> Examined:
    """Search the files (path, bytes) that can be searched; one that is removed meanwhile counts as without rows."""
    num_files, num_bytes, holding, unreadable = 0, 0, {}, []
    judge = Judge(tombstones)
    for path, size in files:
        search = next((search for suffix, search in SEARCHES.items() if path.endswith(suffix)), None)
        if search is None:
            continue
        num_files, num_bytes = num_files + 1, num_bytes + size
        try:
            if num_rows := search(store, path, judge):
                holding[path] = num_rows
        except FileNotFoundError:
            continue
        except (OSError, ValueError, pa.ArrowException):
            if store.exists(path):
                unreadable.append(path)
    return Examined(num_files, num_bytes, holding, tuple(unreadable))


class Judge:
    """Whether a row is erased; every id, subject and text is judged once, in however many files it lies."""

    def __init__(self, tombstones: Erased) -> None:
        self.tombstones = tombstones
        self._values: dict[str, bool] = {}
        self._texts: dict[str, bool] = {}

    def has(self, value: str | None) -> bool:
        if not value:
            return False
        if value not in self._values:
            self._values[value] = self.tombstones.has(value)
        return self._values[value]

    def has_text(self, record: str | None, content: str | None) -> bool:
        if not record or not content or not self.tombstones.texts:
            return False
        if record not in self._texts:
            self._texts[record] = self.tombstones.has_text(DataRecord(json.loads(content)))
        return self._texts[record]

    def count(self, table: pa.Table) -> int:
        """Rows of a table that are erased, or hold erased records."""
        columns: dict[str, list[Any]] = {name: table.column(name).to_pylist() for name in table.column_names}
        empty = [None] * table.num_rows
        rows = zip(*(columns.get(name, empty) for name in COLUMNS), strict=True)
        return sum(
            self.has(_id(record))
            or self.has(subject)
            or any(map(self.has, inside or ()))
            or self.has_text(_id(record), text)
            for record, inside, subject, text in rows
        )


def _id(record: str | bytes | None) -> str | None:
    """Pieces of builds hold ids as their bytes."""
    return "rec_" + record.hex() if isinstance(record, bytes) else record


def _of_parquet(store: Store, path: str, judge: Judge) -> int:
    with store.filesystem.open_input_file(store.path(path)) as stream:
        file = pq.ParquetFile(stream)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        if not columns:
            return 0
        return sum(judge.count(file.read_row_group(group, columns=columns)) for group in range(file.num_row_groups))


def _of_arrow(store: Store, path: str, judge: Judge) -> int:
    with store.filesystem.open_input_file(store.path(path)) as stream:
        file = ipc.open_file(stream)
        columns = [name for name in COLUMNS if name in file.schema.names]
        batches = (file.get_batch(number).select(columns) for number in range(file.num_record_batches))
        return sum(judge.count(pa.Table.from_batches([batch])) for batch in batches) if columns else 0


def _of_lines(store: Store, path: str, judge: Judge) -> int:
    return sum(judge.has(record) for record in _named(store.read(path)))


def _named(lines: bytes) -> Iterator[str]:
    for line in lines.splitlines():
        if line.strip() and isinstance(value := json.loads(line), dict):
            yield str(value.get("record", ""))


SEARCHES: dict[str, Callable[[Store, str, Judge], int]] = {
    ".parquet": _of_parquet,
    ".arrow": _of_arrow,
    ".jsonl": _of_lines,
}
