"""A chunk of a source file → its rows, not yet parsed: what `parse_line` and `parse_record` take.

Any machine reads any chunk, so how the work is spread changes nothing. A row that cannot be had is a `Raw` with a reason. An
error is raised only where the file itself cannot be had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from forge_ray.data.read.csv_rows import read_csv
from forge_ray.data.read.documents import DOCUMENTS, MAX_FILE_BYTES, Unreadable, document_text, require_library
from forge_ray.data.read.json_rows import read_json
from forge_ray.data.read.lines import TOO_LONG, Damaged, Raw, blocks, filesystem_of, is_outage, lines, open_file
from forge_ray.data.read.strict_json import Reject

__all__ = ["Chunk", "Raw", "arrow_messages", "image_reader", "read_raw"]

BATCH_BYTES = 8 << 20  # decoded at a time
IMAGE_BYTES = 64 << 20

Batch: TypeAlias = pa.RecordBatch | int  # rows, or how many of them are lost


@dataclass(frozen=True)
class Chunk:
    """A part of a file that is read alone.

    `start` and `end` are bytes of a plain JSONL file (whole lines) or of an Arrow file (whole record batches), or the number
    of a Parquet row group. Files of other formats, and compressed ones, are one chunk.
    """

    path: str
    name: str
    format: str
    start: int
    end: int
    first_line: int
    source: int
    key: str  # digest of the bytes and of how they are read


def read_raw(chunk: Chunk, max_line_bytes: int) -> Iterator[Raw]:
    """Every row of the chunk, readable or not; empty lines are skipped."""
    if chunk.format == "jsonl":
        # without an end if compressed: the size on disk says nothing about the lines
        yield from lines(blocks(chunk.path, chunk.start, chunk.end), chunk.first_line, chunk.start, max_line_bytes)
    elif chunk.format == "json":
        yield from read_json(chunk.path, max_line_bytes)
    elif chunk.format == "csv":
        yield from read_csv(chunk.path, max_line_bytes)
    elif chunk.format in DOCUMENTS:
        yield _document(chunk, max_line_bytes)
    elif chunk.format in ("parquet", "arrow"):
        yield from _columnar(chunk)
    else:
        raise AssertionError(chunk.format)


def _document(chunk: Chunk, max_line_bytes: int) -> Raw:
    require_library(chunk.format, chunk.name)
    limit = MAX_FILE_BYTES if chunk.format in ("pdf", "docx") else max_line_bytes
    hasher, size, reason = hashlib.sha256(), 0, ""
    parts: list[bytes] = []
    try:
        for block in blocks(chunk.path):
            hasher.update(block)
            size += len(block)
            parts.append(block)
            if size > limit:
                parts.clear()
    except Damaged as kind:
        reason = f"the {kind} stream is damaged or cut off"
    if size > limit:
        reason = TOO_LONG if limit == max_line_bytes else f"{chunk.format.upper()} of more than {limit >> 20} MiB"
    text = ""
    if not reason:
        try:
            text = document_text(b"".join(parts), chunk.format)
        except Unreadable as error:
            reason = str(error)
        if len(text) > max_line_bytes:
            reason = TOO_LONG
    return Raw(1, 0, None, None if reason else {"text": text}, hasher.hexdigest(), reason)


def _columnar(chunk: Chunk) -> Iterator[Raw]:
    """Rows of Parquet and Arrow files have no byte offset of their own, and no bytes to digest."""
    line, batches = chunk.first_line, (_parquet_batches if chunk.format == "parquet" else _arrow_batches)(chunk)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError, EOFError) as error:
            if is_outage(error):
                raise
            yield Raw(line, -1, None, None, "", _unreadable(chunk, error))
            return
        if batch is None:
            return
        if isinstance(batch, int):
            yield Raw(line, -1, None, None, "", _unreadable(chunk, pa.ArrowInvalid()))
            line += batch
        else:
            yield from _rows(batch, line)
            line += batch.num_rows


def _unreadable(chunk: Chunk, error: Exception) -> str:
    if chunk.start == chunk.end:
        return f"unreadable {chunk.format.capitalize()} file"
    part = "row group" if chunk.format == "parquet" else "record batch"
    return f"unreadable {part}: {type(error).__name__}"


def _parquet_batches(chunk: Chunk) -> Iterator[Batch]:
    with open_file(chunk.path) as stream:
        file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)  # by pages, not by whole columns
        group = file.metadata.row_group(chunk.start)
        per_row = max(1, group.total_byte_size // max(1, group.num_rows))
        size = min(max(1, BATCH_BYTES // per_row), 4096)
        yield from file.iter_batches(size, row_groups=[chunk.start], use_threads=False)


def _arrow_batches(chunk: Chunk) -> Iterator[Batch]:
    with _mapped(chunk.path) as stream:
        if chunk.start == chunk.end:
            raise pa.ArrowInvalid("no schema")
        begin = arrow_start(stream)
        reader = pa.ipc.open_stream(stream)
        if chunk.start == begin:  # the only chunk, or the first; its dictionaries come before its batches
            batches = _until(reader, stream, chunk.end)
        else:
            stream.seek(chunk.start)
            batches = (pa.ipc.read_record_batch(m, reader.schema) for m in arrow_messages(stream, chunk.end))
        for batch in batches:
            if not all(_is_sound(column) for column in batch.columns):
                yield batch.num_rows
                continue
            size = min(max(1, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)), 4096)
            for row in range(0, batch.num_rows, size):
                yield batch.slice(row, size)


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
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    return kind


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
    return pa.memory_map(inner) if isinstance(filesystem, pafs.LocalFileSystem) else filesystem.open_input_file(inner)


def _rows(batch: pa.RecordBatch, line: int) -> Iterator[Raw]:
    try:
        values = batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, OverflowError, KeyError):  # one value of one row, most likely
        for number in range(batch.num_rows):
            yield _single(batch.slice(number, 1), line + number)
        return
    for number, value in enumerate(values):
        yield Raw(line + number, -1, None, _without_nulls(value), "")


def _single(batch: pa.RecordBatch, line: int) -> Raw:
    value = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value[name] = column.to_pylist(maps_as_pydicts="strict")[0]
        except UnicodeDecodeError:
            return Raw(line, -1, None, None, "", "not UTF-8")
        except (ValueError, OverflowError, KeyError):
            value[name] = column[0]  # such as a date that Python cannot hold: no JSON value, if the record should need it
    return Raw(line, -1, None, _without_nulls(value), "")


def _without_nulls(value: Any) -> Any:
    """Parquet gives every struct every key: a null there is a key that the row does not have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def image_reader(chunk: Chunk) -> Callable[[str], bytes]:
    """Reads the files that rows of this chunk name, from the folder of their own file."""
    filesystem, inner = filesystem_of(chunk.path)
    folder = inner.rpartition("/")[0]

    def read(name: str) -> bytes:
        with filesystem.open_input_file(f"{folder}/{name}") as stream:
            if stream.size() > IMAGE_BYTES:
                raise Reject(f"an image is larger than {IMAGE_BYTES >> 20} MiB")
            return bytes(stream.read())

    return read
