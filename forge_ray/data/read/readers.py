"""A chunk of a source file → its rows, not yet parsed: what `parse_line` and `parse_record` take.

Any machine reads any chunk, so how the work is spread changes nothing. A row that cannot be had is a `Raw` with a reason. An
error is raised only where the file itself cannot be had.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from forge_ray.config.encodings import UTF_8
from forge_ray.data.read.csv_rows import read_csv
from forge_ray.data.read.documents import DOCUMENTS, MAX_FILE_BYTES, Unreadable, document_text, require_library
from forge_ray.data.read.features import Decode, row_decoder
from forge_ray.data.read.json_rows import read_json
from forge_ray.data.read.limited import NotRead, OverLimit, read_document, read_rows, read_slices
from forge_ray.data.read.lines import TOO_LONG, Damaged, Raw, blocks, filesystem_of, is_inside, lines
from forge_ray.data.read.recode import Recoded, line_feeds
from forge_ray.data.read.strict_json import Reject

__all__ = ["Chunk", "Raw", "image_reader", "read_raw"]

IMAGE_BYTES = 64 << 20


@dataclass(frozen=True)
class Chunk:
    """A part of a file that is read alone.

    `start` and `end` are bytes of a plain JSONL file in UTF-8 (whole lines) or of an Arrow file (whole record batches), or
    the number of a Parquet row group. Files of other formats, and compressed ones, are one chunk.
    """

    path: str
    name: str
    format: str
    start: int
    end: int
    first_line: int
    source: int
    key: str  # digest of the bytes and of how they are read
    folder: str = ""  # of the source, on a local file system: images lie in it; "" for the folder of the file
    reason: str = ""  # why no row of the file can be read, for the file as a whole
    encoding: str = UTF_8  # of its bytes; of another one the file is one chunk
    cr_ends: bool = False  # whether its lines end in CR alone; such a file is one chunk
    sheet: str = ""  # of a workbook
    columns: str = ""  # JSON of what is known of its columns from elsewhere: `features.row_decoder`


def read_raw(chunk: Chunk, max_line_bytes: int) -> Iterator[Raw]:
    """Every row of the chunk, readable or not; empty lines are skipped."""
    if chunk.reason:
        yield Raw(1, 0, None, None, "", chunk.reason)
    elif chunk.format in ("parquet", "arrow"):
        yield from _columnar(chunk, max_line_bytes)
    elif chunk.format == "xlsx":
        yield from _sheet(chunk, max_line_bytes)
    else:
        source = blocks(chunk.path, chunk.start, chunk.end)
        if chunk.encoding == UTF_8:
            yield from _rows_of_bytes(chunk, source, max_line_bytes)
        else:
            recoded = Recoded(source, chunk.encoding)
            yield from map(recoded.placed, _rows_of_bytes(chunk, iter(recoded), max_line_bytes))


def _rows_of_bytes(chunk: Chunk, source: Iterator[bytes], max_line_bytes: int) -> Iterator[Raw]:
    source = line_feeds(source) if chunk.cr_ends else source
    if chunk.format == "jsonl":
        yield from lines(source, chunk.first_line, chunk.start, max_line_bytes)
    elif chunk.format == "json":
        yield from read_json(source, max_line_bytes)
    elif chunk.format == "csv":
        yield from read_csv(source, max_line_bytes)
    elif chunk.format in DOCUMENTS:
        yield _document(chunk, source, max_line_bytes)
    else:
        raise AssertionError(chunk.format)


def _document(chunk: Chunk, source: Iterator[bytes], max_line_bytes: int) -> Raw:
    require_library(chunk.format, chunk.name)
    limit = MAX_FILE_BYTES if chunk.format in ("pdf", "docx") else max_line_bytes
    hasher, size, reason = hashlib.sha256(), 0, ""
    parts: list[bytes] = []
    try:
        for block in source:
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
            data = b"".join(parts)
            text = document_text(data, "text") if chunk.format == "text" else read_document(data, chunk.format)
        except OverLimit as error:
            reason = f"unreadable {chunk.format.upper()}: {error}"
        except (Unreadable, NotRead) as error:
            reason = str(error)
        if len(text) > max_line_bytes:
            reason = TOO_LONG
    return Raw(1, 0, None, None if reason else {"text": text}, hasher.hexdigest(), reason)


def _columnar(chunk: Chunk, max_line_bytes: int) -> Iterator[Raw]:
    """Rows of Parquet and Arrow files have no byte offset of their own, and no bytes to digest."""
    line, error = chunk.first_line, ""
    if chunk.start == chunk.end:
        yield Raw(line, -1, None, None, "", _unreadable(chunk, error))
        return
    request = {"kind": chunk.format, "path": chunk.path, "start": chunk.start, "end": chunk.end, "limit": max_line_bytes}
    try:
        for part in read_slices(request, max(0, chunk.end - chunk.start)):
            if isinstance(part, tuple):
                num_rows, reason = part
                yield Raw(line, -1, None, None, "", reason or _unreadable(chunk, "ArrowInvalid"))
            else:
                num_rows = part.num_rows
                yield from _rows(part, line, chunk.columns)
            line += num_rows
    except NotRead as reason:
        why = str(reason)
        error = _unreadable(chunk, why[1:]) if why.startswith("!") else f"{_part(chunk)} {why}"
    except OverLimit as reason:
        error = f"{_part(chunk)} {reason}"
    if error:
        yield Raw(line, -1, None, None, "", error)


def _sheet(chunk: Chunk, max_line_bytes: int) -> Iterator[Raw]:
    """Rows of a workbook have the number of their row, and no bytes of their own."""
    require_library(chunk.format, chunk.name)
    line, error = 0, ""
    request = {"kind": "sheet", "path": chunk.path, "sheet": chunk.sheet, "size": chunk.end, "limit": max_line_bytes}
    try:
        for line, value, reason in read_rows(request):
            yield Raw(line, -1, None, value, "", reason)
    except NotRead as reason:
        error = f"unreadable XLSX: {str(reason).removeprefix('!')}"
    except OverLimit as reason:
        error = f"unreadable XLSX: {reason}"
    if error:
        yield Raw(line + 1, -1, None, None, "", error)


def _part(chunk: Chunk) -> str:
    return "row group" if chunk.format == "parquet" else "record batch"


def _unreadable(chunk: Chunk, error: str) -> str:
    if chunk.start == chunk.end:
        return f"unreadable {chunk.format.capitalize()} file"
    return f"unreadable {_part(chunk)}: {error}"


def _rows(batch: pa.RecordBatch, line: int, columns: str) -> Iterator[Raw]:
    decode = row_decoder(batch.schema, columns)
    try:
        values = batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, OverflowError, KeyError):  # one value of one row, most likely
        for number in range(batch.num_rows):
            yield _single(batch.slice(number, 1), line + number, decode)
        return
    for number, value in enumerate(values):
        yield _decoded(value, line + number, decode)


def _single(batch: pa.RecordBatch, line: int, decode: Decode) -> Raw:
    value = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value[name] = column.to_pylist(maps_as_pydicts="strict")[0]
        except UnicodeDecodeError:
            return Raw(line, -1, None, None, "", "not UTF-8")
        except (ValueError, OverflowError, KeyError):
            value[name] = column[0]  # such as a date that Python cannot hold: no JSON value, if the record should need it
    return _decoded(value, line, decode)


def _decoded(value: dict[str, Any], line: int, decode: Decode) -> Raw:
    try:
        return Raw(line, -1, None, decode(value), "")
    except Reject as reason:
        return Raw(line, -1, None, None, "", str(reason))


def image_reader(chunk: Chunk) -> Callable[[str], bytes]:
    """Reads the files that rows of this chunk name, from the folder of their own file."""
    filesystem, inner = filesystem_of(chunk.path)
    folder = inner.rpartition("/")[0]

    def read(name: str) -> bytes:
        if isinstance(filesystem, pafs.LocalFileSystem):
            return _local_image(folder, name, chunk.folder or folder)
        with filesystem.open_input_file(f"{folder}/{name}") as stream:
            if stream.size() > IMAGE_BYTES:
                raise Reject(f"an image is larger than {IMAGE_BYTES >> 20} MiB")
            return bytes(stream.read())

    return read


def _local_image(folder: str, name: str, inside: str) -> bytes:
    """The bytes of a regular file in the folder of its source; a link may lead to one, and nothing waits for a pipe."""
    target = os.path.realpath(os.path.join(folder, name))
    if not is_inside(target, inside):
        raise Reject("an image is a link out of the folder of its source")
    handle = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(handle, "rb") as stream:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise Reject("an image is not a regular file")
        if status.st_size > IMAGE_BYTES:
            raise Reject(f"an image is larger than {IMAGE_BYTES >> 20} MiB")
        return stream.read(IMAGE_BYTES)
