"""Row groups and record batches → slices of plain columns, each small; runs in a reader's own process (`foreign`).

A few bytes of Parquet or Arrow can stand for any amount of data: a dictionary's value repeated, runs, compressed pages.
Limits therefore grow with the bytes that are stored (`Budget`), and what exceeds them is not handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from forge_ray.data.read.features import features_of, lossy_columns
from forge_ray.data.read.lines import TOO_LONG, filesystem_of, is_outage, open_file

BATCH_BYTES = 8 << 20  # decoded at a time
VALUE_BYTES = 32  # of a value as an object of Python
EXPANSION = 4096  # decoded bytes per stored byte; gzip reaches 1032
FREE_ROWS, ROWS_PER_BYTE = 50_000, 64
SMALLER = (64, 1)  # rows that are decoded at a time where more did not fit

Allow = Callable[[int], None]  # limits of time and memory for so many stored bytes
Lost = tuple[int, str]  # how many rows, and why


class Bomb(Exception):
    """A part of a file stands for more data than its size allows; the message is the reason for the quarantine."""


@dataclass
class Budget:
    """Decoded bytes that a part of a file may still yield."""

    left: int

    def take(self, num_bytes: int) -> None:
        self.left -= num_bytes
        if self.left < 0:
            raise Bomb(f"expands to more than {EXPANSION} times its size")


def parquet_rows(path: str) -> list[int]:
    """The number of rows of each row group."""
    with open_file(path) as stream:
        metadata = pq.ParquetFile(stream).metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def schema_notes(path: str, format: str) -> tuple[list[str], dict[str, Any]]:
    """The columns whose structs lose nulls that mean something; and what `datasets` noted of the columns."""
    with open_file(path) as stream:
        if format == "parquet":
            schema = pq.ParquetFile(stream).schema_arrow
        else:
            stream.seek(arrow_start(stream))
            schema = pa.ipc.open_stream(stream).schema
        return list(lossy_columns(schema)), features_of(schema.metadata or {})


def parquet_slices(path: str, number: int, limit: int, allow: Allow) -> Iterator[pa.RecordBatch | Lost]:
    """The rows of one row group."""
    with open_file(path) as stream:
        allow(stream.size())
        file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)  # by pages, not by whole columns
        group = file.metadata.row_group(number)
        columns = [group.column(column) for column in range(group.num_columns)]
        stored = min(sum(max(0, column.total_compressed_size) for column in columns), stream.size())
        allow(stored)
        _check_rows(group.num_rows, stored)
        per_row = max(1, group.total_byte_size // max(1, group.num_rows))
        size = min(max(1, BATCH_BYTES // per_row), 4096)
        budget, num_emitted = Budget(max(limit, EXPANSION * stored)), 0
        try:
            for batch in file.iter_batches(size, row_groups=[number], use_threads=False):
                num_rows = batch.num_rows
                yield from _slices(batch, limit, budget)
                num_emitted += num_rows
            return
        except MemoryError:  # long values, repeated by a dictionary
            pass
        size = _size_that_fits(file, number, size, max(limit, EXPANSION * stored))
        budget, skip = Budget(max(limit, EXPANSION * stored)), num_emitted
        for batch in file.iter_batches(size, row_groups=[number], use_threads=False):
            rest = batch.slice(min(skip, batch.num_rows))
            skip -= batch.num_rows - rest.num_rows
            if rest.num_rows:
                yield from _slices(rest, limit, budget)


def _size_that_fits(file: Any, number: int, size: int, most: int) -> int:
    """How many rows can be decoded at once; raises `Bomb` where all of them together are too many bytes."""
    for smaller in SMALLER:
        try:
            budget = Budget(most)
            for batch in file.iter_batches(min(size, smaller), row_groups=[number], use_threads=False):
                budget.take(_weight(batch))
            return min(size, smaller)
        except MemoryError:
            continue
    raise MemoryError


def arrow_cuts(path: str, size: int, chunk_bytes: int) -> tuple[list[tuple[int, int]], bool]:
    """Places (byte, line) between record batches, the end included, not where a dictionary before one chunk would be needed
    by the next; and whether all of the file was readable."""
    with open_file(path) as stream:
        start = arrow_start(stream)
        schema = pa.ipc.open_stream(stream).schema
        stream.seek(start)
        cuts, line, end = [(start, 1)], 1, start
        whole = "dictionary<" in str(schema)
        batches = pa.ipc.open_stream(stream) if whole else _record_batches(stream, schema, size)
        try:
            for batch in batches:
                end = stream.tell()
                line += batch.num_rows
                if not whole and end - cuts[-1][0] >= chunk_bytes:
                    cuts.append((end, line))
        except (pa.ArrowException, OSError, EOFError, MemoryError) as error:
            if is_outage(error):
                raise
            return [*cuts, (size, line + 1)], False  # the last chunk ends in a row that says so
    if cuts[-1][0] < end:
        cuts.append((end, line))
    return cuts, True


def _record_batches(stream: Any, schema: pa.Schema, end: int) -> Iterator[pa.RecordBatch]:
    for message in arrow_messages(stream, end):
        if message.type == "record batch":
            yield pa.ipc.read_record_batch(message, schema)


def arrow_slices(path: str, start: int, end: int, limit: int, allow: Allow) -> Iterator[pa.RecordBatch | Lost]:
    """The rows of the record batches between two bytes."""
    with _mapped(path) as stream:
        if start == end:
            raise pa.ArrowInvalid("no schema")
        allow(min(end, stream.size()) - start)
        begin = arrow_start(stream)
        reader = pa.ipc.open_stream(stream)
        if start == begin:  # the only chunk, or the first; its dictionaries come before its batches
            batches = _until(reader, stream, end)
        else:
            stream.seek(start)
            batches = (pa.ipc.read_record_batch(m, reader.schema) for m in arrow_messages(stream, end))
        budget = Budget(max(limit, EXPANSION * (end - start)))
        for batch in batches:
            _check_rows(batch.num_rows, end - start)
            if all(_is_sound(column) for column in batch.columns):
                yield from _slices(batch, limit, budget)
            else:
                yield batch.num_rows, ""


def _check_rows(num_rows: int, stored: int) -> None:
    if num_rows > FREE_ROWS + ROWS_PER_BYTE * stored:
        raise Bomb(f"{num_rows} rows in {stored} bytes")


def _slices(batch: pa.RecordBatch, limit: int, budget: Budget) -> Iterator[pa.RecordBatch | Lost]:
    """Parts of the batch that are small once they are decoded, without dictionaries."""
    weight = _weight(batch)
    budget.take(weight)
    waiting = [(batch, weight)]
    while waiting:
        part, weight = waiting.pop()
        if part.num_rows > 4096 or (part.num_rows > 1 and weight > BATCH_BYTES):
            half = part.num_rows // 2
            for piece in (part.slice(half), part.slice(0, half)):
                waiting.append((piece, _weight(piece)))
        elif weight > max(limit, BATCH_BYTES):
            yield 1, TOO_LONG
        else:
            yield _plain(part)


def _weight(batch: pa.RecordBatch) -> int:
    return sum(_weight_of(column) for column in batch.columns)


def _weight_of(array: pa.Array) -> int:
    """Roughly the bytes of the values once each stands by itself."""
    kind = array.type
    if len(array) == 0:
        return 0
    if isinstance(array, pa.ExtensionArray):
        return _weight_of(array.storage)
    if pa.types.is_dictionary(kind):
        if _is_text(kind.value_type):
            lengths = pc.binary_length(array.dictionary).take(array.indices)
            return int(pc.sum(lengths.cast(pa.int64())).as_py() or 0) + VALUE_BYTES * len(array)
        return len(array) * _weight_of(array.dictionary)
    if pa.types.is_run_end_encoded(kind):
        return len(array) * _weight_of(array.values)
    if _is_text(kind):
        return int(pc.sum(pc.binary_length(array).cast(pa.int64())).as_py() or 0)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):  # several views may show the same bytes
        return int(pc.sum(pc.binary_length(array.cast(pa.large_binary())).cast(pa.int64())).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(_weight_of(child) for child in array.flatten())
    if pa.types.is_map(kind):  # whose children are those of the whole array, not of the slice
        start, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return sum(_nested(child.slice(start, end - start)) for child in (array.keys, array.items)) + 8 * len(array)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _nested(array.flatten()) + 8 * len(array)
    if pa.types.is_fixed_size_list(kind):
        return _nested(array.flatten())
    return int(array.nbytes)


def _nested(values: pa.Array) -> int:
    """Values inside a row: each becomes an object of its own."""
    return _weight_of(values) + VALUE_BYTES * len(values)


def _is_text(kind: pa.DataType) -> bool:
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(is_string or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same values without dictionaries, which each slice would carry whole."""
    if "dictionary<" not in str(batch.schema):
        return batch
    schema = pa.schema([f.with_type(_without_dictionary(f.type)) for f in batch.schema], metadata=batch.schema.metadata)
    arrays = [
        column if column.type == field.type else column.cast(field.type)
        for column, field in zip(batch.columns, schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _without_dictionary(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _without_dictionary(kind.value_type)
    return _mapped_type(kind, _without_dictionary)


def _mapped_type(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with `change` applied to the types of its parts."""
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(change(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(change(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(change(field.type)) for field in kind])
    return kind


def _is_sound(column: pa.Array) -> bool:
    """Arrow takes a file's offsets on trust, and a wrong one would read anywhere. Text that is not UTF-8 is found later."""
    try:
        column.view(_as_bytes(column.type)).validate(full=True)
    except pa.ArrowException:
        return False
    return True


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    return _mapped_type(kind, _as_bytes)


def _until(reader: Any, stream: Any, end: int) -> Iterator[pa.RecordBatch]:
    while stream.tell() < end:
        try:
            yield reader.read_next_batch()
        except StopIteration:
            return


def arrow_messages(stream: Any, end: int) -> Iterator[Any]:
    """The messages of Arrow's stream format from here to the byte `end`."""
    reader = pa.ipc.MessageReader.open_stream(stream)
    while stream.tell() < end:
        try:
            message = reader.read_next_message()
        except StopIteration:
            return
        yield message


def arrow_start(stream: Any) -> int:
    """Moves to the first message: Arrow's file format is its stream format between a mark and an index."""
    start = 8 if stream.read(6) == b"ARROW1" else 0
    stream.seek(start)
    return start


def _mapped(path: str) -> Any:
    """A record batch is as large as its writer wanted: of a local file only the pages in use are in memory."""
    filesystem, inner = filesystem_of(path)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return filesystem.open_input_file(inner)
    open_file(path).close()  # refuses what is not a regular file
    return pa.memory_map(inner)
