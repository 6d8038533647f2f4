"""Files → rows with their place (file, line, byte offset), one bad line never costing a good one (level 2).

Two passes. `index_file` reads a file once: sha256, and the exact byte ranges of chunks of whole lines. `read_chunk` then
decodes any chunk on any machine, so the parallelism changes nothing.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from forge_ray.config.data import DataConfig, Source
from forge_ray.data.schema import DataRecord, Reject, parse_line, parse_record
from forge_ray.errors import ConfigError, DataError, NotFound

CHUNK_BYTES = 8 << 20
COLUMNS = ("messages", "tools", "text")


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a JSONL file (byte range), or one row group of a Parquet file (`start` is its number)."""

    path: str
    name: str
    format: str
    start: int
    end: int
    first_line: int


@dataclass(frozen=True)
class IndexedFile:
    name: str
    size: int
    sha256: str
    num_lines: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Row:
    """One input row where it was found: a record, or the reason why not. Lines count from 1."""

    file: str
    line: int
    offset: int
    raw_sha256: str
    record: DataRecord | None
    reason: str = ""


def expand(config: DataConfig) -> list[tuple[str, str, str]]:
    """(path, name, format) of every source file, sorted; `name` is what the user wrote, for the record."""
    found: dict[str, tuple[str, str, str]] = {}
    for source in config.sources:
        for path in _matches(source):
            found[path] = (path, _name(path), _format(path, source))
    return [found[path] for path in sorted(found)]


def _matches(source: Source) -> list[str]:
    if "://" not in source.path:
        paths = sorted(str(Path(match).absolute()) for match in glob.glob(source.path, recursive=True))
        paths = [path for path in paths if Path(path).is_file()]
    elif "@" in source.path.split("://")[1].split("/")[0]:
        raise ConfigError(
            "data.sources: a URI carries a user name or password, and sources are recorded with the dataset",
            hint="set them in the environment, for S3 as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    else:
        filesystem, path = pafs.FileSystem.from_uri(source.path)
        found = filesystem.get_file_info(path).type == pafs.FileType.File
        paths = [source.path] if found else []
    if not paths:
        raise NotFound(f"data.sources: no file matches {source.path!r}", hint="globs are relative to the current folder")
    return paths


def _name(path: str) -> str:
    folder = str(Path.cwd()) + "/"
    return path.removeprefix(folder)


def _format(path: str, source: Source) -> str:
    if source.format != "auto":
        return source.format
    for ending, name in ((".jsonl", "jsonl"), (".ndjson", "jsonl"), (".parquet", "parquet")):
        if path.endswith(ending):
            return name
    raise DataError(f"data.sources: {path!r} ends neither in .jsonl nor in .parquet", hint="say which with `format: jsonl`")


def open_file(path: str) -> Any:
    if "://" in path:
        filesystem, inner = pafs.FileSystem.from_uri(path)
        return filesystem.open_input_file(inner)
    return pafs.LocalFileSystem().open_input_file(path)


def index_file(path: str, name: str, format: str, chunk_bytes: int = CHUNK_BYTES) -> IndexedFile:
    """One sequential read: digest, lines, and where the chunks begin."""
    hasher = hashlib.sha256()
    size, lines, line_start = 0, 0, 0
    cuts = [(0, 1)]  # (byte offset, line number) of each chunk's first line
    with open_file(path) as stream:
        while data := stream.read(1 << 20):
            hasher.update(data)
            if format == "jsonl":
                position = data.find(b"\n")
                while position >= 0:
                    lines += 1
                    line_start = size + position + 1
                    if line_start - cuts[-1][0] >= chunk_bytes:
                        cuts.append((line_start, lines + 1))
                    position = data.find(b"\n", position + 1)
            size += len(data)
    if format == "parquet":
        return _index_parquet(path, name, size, hasher.hexdigest())
    if line_start < size:
        lines += 1  # the last line has no newline
    cuts.append((size, lines + 1))
    chunks = tuple(Chunk(path, name, format, a, b, line) for (a, line), (b, _) in pairwise(cuts) if a < b)
    return IndexedFile(name, size, hasher.hexdigest(), lines, chunks)


def _index_parquet(path: str, name: str, size: int, sha256: str) -> IndexedFile:
    try:
        with open_file(path) as stream:
            metadata = pq.ParquetFile(stream).metadata
    except (pa.ArrowException, OSError):
        return IndexedFile(name, size, sha256, 1, (Chunk(path, name, "unreadable", 0, 0, 1),))
    chunks, line = [], 1
    for group in range(metadata.num_row_groups):
        chunks.append(Chunk(path, name, "parquet", group, group + 1, line))
        line += metadata.row_group(group).num_rows
    return IndexedFile(name, size, sha256, metadata.num_rows, tuple(chunks))


def read_chunk(chunk: Chunk) -> Iterator[Row]:
    """Every row of the chunk, good or rejected; empty lines are skipped."""
    if chunk.format == "unreadable":
        yield Row(chunk.name, 1, 0, "", None, "unreadable Parquet file")
    elif chunk.format == "parquet":
        yield from _read_row_group(chunk)
    else:
        with open_file(chunk.path) as stream:
            stream.seek(chunk.start)
            data = stream.read(chunk.end - chunk.start)
        offset = chunk.start
        for number, raw in enumerate(data.split(b"\n")):
            if raw.strip():
                yield _row(chunk, chunk.first_line + number, offset, raw)
            offset += len(raw) + 1


def _row(chunk: Chunk, line: int, offset: int, raw: bytes) -> Row:
    sha256 = hashlib.sha256(raw).hexdigest()
    try:
        return Row(chunk.name, line, offset, sha256, parse_line(raw))
    except Reject as reason:
        return Row(chunk.name, line, offset, sha256, None, str(reason))


def _read_row_group(chunk: Chunk) -> Iterator[Row]:
    """Rows of a Parquet file have no byte offset of their own: `offset` is -1. Only the columns that count are decoded."""
    try:
        with open_file(chunk.path) as stream:
            file = pq.ParquetFile(stream)
            num_rows = file.metadata.row_group(chunk.start).num_rows
            table = file.read_row_group(chunk.start, columns=[c for c in file.schema_arrow.names if c in COLUMNS])
    except (pa.ArrowException, OSError) as error:
        yield Row(chunk.name, chunk.first_line, -1, "", None, f"unreadable row group: {type(error).__name__}")
        return
    columns = list(zip(table.column_names, table.columns, strict=True))
    for number in range(num_rows):
        try:
            record = parse_record({name: _without_nulls(column[number].as_py()) for name, column in columns})
            yield Row(chunk.name, chunk.first_line + number, -1, "", record)
        except Reject as reason:
            yield Row(chunk.name, chunk.first_line + number, -1, "", None, str(reason))
        except UnicodeDecodeError:
            yield Row(chunk.name, chunk.first_line + number, -1, "", None, "not UTF-8")
        except (ValueError, OverflowError):  # a date that Python cannot hold
            yield Row(chunk.name, chunk.first_line + number, -1, "", None, "unreadable value")


def _without_nulls(value: Any) -> Any:
    """Parquet gives every struct every key: a null there is a key that the row does not have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
