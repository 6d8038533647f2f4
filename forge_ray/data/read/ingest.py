"""Source files, and where their rows can be cut.

`index_file` reads a file once: its sha256, and the exact ranges of chunks, which `readers.read_raw` reads on any machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from forge_ray.config.encodings import UTF_8
from forge_ray.data.read.documents import DOCUMENTS, require_library
from forge_ray.data.read.features import conflict
from forge_ray.data.read.first_bytes import ENCODED, HEAD_BYTES, NOT_UTF_8, TextForm, is_other_encoding, text_form, why_not
from forge_ray.data.read.limited import NotRead, OverLimit, read_value
from forge_ray.data.read.lines import Damaged, blocks, compression_of, is_outage, open_file, unpacked
from forge_ray.data.read.readers import Chunk, read_raw
from forge_ray.data.read.sources import ListedFile, expand
from forge_ray.errors import DataError

__all__ = ["CHUNK_BYTES", "Chunk", "IndexedFile", "expand", "index_file", "index_listed"]

CHUNK_BYTES = 4 << 20
MAX_LINE_BYTES = 16 << 20
READ_BYTES = 4 << 20
EMPTY = "the file is empty (0 bytes): remove it, or copy it again if it should hold rows"
NO_ROWS = "the file holds no row: remove it, or write it again if it should hold some"
SAMPLE_BYTES = 4 << 20  # from which rows are estimated where only reading them all would count them


@dataclass(frozen=True)
class IndexedFile:
    """`size` is on disk, `text_bytes` (roughly) uncompressed; `num_lines` of compressed, JSON and CSV files is estimated."""

    name: str
    size: int
    text_bytes: int
    sha256: str
    num_lines: int
    chunks: tuple[Chunk, ...]
    source: int
    notes: tuple[str, ...] = ()  # what whoever builds from it should know; whole sentences without the file's name
    columns: str = ""  # JSON of what is known of its columns from elsewhere, and decides its rows too
    version: str = ""  # of the table that it is of


@dataclass(frozen=True)
class _Cut:
    """Where a chunk begins: byte (or row group), and number of its first line or row."""

    start: int
    line: int


def index_listed(file: ListedFile, max_line_bytes: int = MAX_LINE_BYTES) -> IndexedFile:
    """`index_file` of a file as its source says that it is read."""
    indexed = index_file(
        file.path,
        file.name,
        file.format,
        file.source,
        file.sha256,
        max_line_bytes=max_line_bytes,
        folder=file.folder,
        encoding=file.encoding,
        sheet=file.sheet,
        columns=file.columns,
    )
    return replace(indexed, version=file.version)


def index_file(
    path: str,
    name: str,
    format: str,
    source: int = 0,
    expected: str = "",
    chunk_bytes: int = CHUNK_BYTES,
    max_line_bytes: int = MAX_LINE_BYTES,
    folder: str = "",
    encoding: str = UTF_8,
    sheet: str = "",
    columns: str = "",
) -> IndexedFile:
    """One sequential read: digest (which must be `expected`, if given), lines, and where the chunks begin."""
    require_library(format, name)
    kind = compression_of(path) or ""
    by_line = format == "jsonl" and not kind
    size, sha256, cuts, head = _scan(path, chunk_bytes if by_line else 0)
    if expected and sha256 != expected:
        raise DataError(
            f"data.sources: {name} has sha256 {sha256}, but its checksums file says {expected}",
            hint="restore the file, or write the checksums again if the change is meant",
        )
    if size == 0:
        return IndexedFile(name, 0, 0, sha256, 0, (), source, (EMPTY,))
    form = TextForm(format, reason=why_not(format, kind, head))
    notes: list[str] = []
    if not form.reason and format in ENCODED:
        text, is_cut = _unpacked(path) if kind else (head, size > len(head))
        form = text_form(format, encoding, text, is_cut)
        is_json = form.format in ("jsonl", "json") and form.encoding == UTF_8  # whose rows in ASCII are read all the same
        notes += [NOT_UTF_8] if is_json and is_other_encoding(form.format, text, is_cut) else []
    if form.reason:
        key = _key(sha256, format, kind, form.reason)
        chunk = Chunk(path, name, format, 0, size, 1, source, key, folder, form.reason)
        return IndexedFile(name, size, size, sha256, 1, (chunk,), source)
    by_line = by_line and form == TextForm(format)
    how = (form.format, kind) if form == TextForm(form.format) else (form.format, kind, form.encoding, form.cr_ends)
    if format == "parquet":
        cuts = _parquet_cuts(path, size)
    elif format == "arrow":
        cuts = _arrow_cuts(path, size, chunk_bytes)
    elif format == "xlsx":
        cuts, sheet = _sheet_cuts(path, name, size, sheet)
    elif not by_line:
        cuts = [_Cut(0, 1), _Cut(size, 1)]
    how = (*how, *filter(None, (sheet, columns)))
    whole = Chunk(path, name, form.format, 0, size, 1, source, "", folder, "", form.encoding, form.cr_ends, sheet, columns)
    chunks = tuple(
        replace(whole, start=a.start, end=b.start, first_line=a.line, key=_key(sha256, *how, a.start, b.start))
        for a, b in pairwise(cuts)
    )
    text_bytes = _uncompressed_size(path, kind, size) if kind else size
    num_lines = cuts[-1].line - 1
    is_counted = num_lines > 0 and (not by_line or size > len(head) or bool(head.strip()))
    if chunks and num_lines <= 0:
        num_lines = 1 if format in DOCUMENTS else _estimate(chunks[0], text_bytes, max_line_bytes)
        is_counted = num_lines > 0
    if not is_counted:
        notes.append(NO_ROWS)
    if format in ("parquet", "arrow"):
        lossy, features = _schema_notes(path, format, size)
        notes += lossy
        if column := conflict(features, json.loads(columns or "{}").get("labels", {})):
            raise DataError(
                f"data.sources: the classes of `{column}` have other names in {name} than in the README.md of its dataset",
                hint="remove the names from one of them",
            )
    num_lines = max(num_lines, bool(chunks))
    return IndexedFile(name, size, text_bytes, sha256, num_lines, chunks, source, tuple(notes), columns)


def _unpacked(path: str) -> tuple[bytes, bool]:
    """The first bytes that a compressed file stands for, and whether more follow; those before the damage where it is
    damaged."""
    head = b""
    try:
        for block in blocks(path):
            head += block
            if len(head) > HEAD_BYTES:
                return head[:HEAD_BYTES], True
    except Damaged:
        return head, True
    return head, False


def _schema_notes(path: str, format: str, size: int) -> tuple[list[str], dict[str, Any]]:
    """Notes on columns that lose nulls, and what `datasets` noted of the columns."""
    try:
        columns, features = read_value({"kind": "schema_notes", "path": path, "format": format, "size": size})
    except (NotRead, OverLimit):
        return [], {}
    notes = [
        f"`{column}` is a struct, in which a null cannot be told from an absent key: nulls in it are left out; a column of"
        " JSON text keeps them"
        for column in columns
    ]
    return notes, features


def _key(*parts: str | int) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _scan(path: str, chunk_bytes: int) -> tuple[int, str, list[_Cut], bytes]:
    """Size, digest, the cuts between lines (unless `chunk_bytes` is 0), the file's end included, and its first bytes."""
    hasher = hashlib.sha256()
    size, newlines, last, head = 0, 0, b"\n", b""
    cuts = [_Cut(0, 1)]
    with open_file(path) as stream:
        while data := stream.read(READ_BYTES):
            hasher.update(data)
            head = head or data[:HEAD_BYTES]
            if chunk_bytes:
                counted = 0
                while (at := data.find(b"\n", max(0, cuts[-1].start + chunk_bytes - 1 - size))) >= 0:
                    newlines += _newlines(data, counted, at + 1)
                    counted = at + 1
                    cuts.append(_Cut(size + counted, newlines + 1))
                newlines += _newlines(data, counted, len(data))
            last = data[-1:]
            size += len(data)
    if cuts[-1].start < size:
        cuts.append(_Cut(size, newlines + 1 + (last != b"\n")))
    return size, hasher.hexdigest(), cuts, head


def _newlines(data: bytes, start: int, end: int) -> int:
    """Several times as fast as `bytes.count` where lines are short."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8, end - start, start) == 10)) if start < end else 0


def _parquet_cuts(path: str, size: int) -> list[_Cut]:
    try:
        rows = read_value({"kind": "parquet_rows", "path": path, "size": size})
    except (NotRead, OverLimit):
        return [_Cut(0, 1), _Cut(0, 2)]  # one chunk without a row group: one row, which says so
    cuts = [_Cut(0, 1)]
    for number, num_rows in enumerate(rows, start=1):
        cuts.append(_Cut(number, cuts[-1].line + num_rows))
    return cuts


def _arrow_cuts(path: str, size: int, chunk_bytes: int) -> list[_Cut]:
    try:
        cuts, _ = read_value({"kind": "arrow_cuts", "path": path, "size": size, "chunk_bytes": chunk_bytes})
    except (NotRead, OverLimit):
        return [_Cut(0, 1), _Cut(0, 2)]
    return [_Cut(start, line) for start, line in cuts]


def _sheet_cuts(path: str, name: str, size: int, sheet: str) -> tuple[list[_Cut], str]:
    """One chunk of about as many rows as the sheet has, and its name; `DataError` where it has to be chosen."""
    try:
        answer = read_value({"kind": "sheets", "path": path, "size": size})
    except (NotRead, OverLimit):
        return [_Cut(0, 1), _Cut(size, 2)], sheet  # reading it says so
    names, visible = answer["names"], answer["visible"]
    listed = ", ".join(repr(item) for item in names[:20]) + (", …" if len(names) > 20 else "")
    if sheet and sheet not in names:
        raise DataError(f"data.sources: {name!r} has no sheet {sheet!r}", hint=f"its sheets are: {listed}")
    if not sheet and len(visible) > 1:
        raise DataError(
            f"data.sources: {name!r} holds several sheets with rows ({listed})",
            hint=f"choose one with `sheet: {visible[0]}`; a source of its own reads another one",
        )
    sheet = sheet or next(iter(visible or names), "")
    return [_Cut(0, 1), _Cut(size, 1 + answer["num_rows"].get(sheet, 0))], sheet


def _uncompressed_size(path: str, kind: str, size: int) -> int:
    """From how far the first bytes spread."""
    if kind in ("bz2", "xz"):
        sample = 0
        with open_file(path) as file, contextlib.suppress(Damaged):
            for block in unpacked(file, kind):
                sample += len(block)
                if sample >= SAMPLE_BYTES:
                    return max(size, sample * size // max(1, int(file.tell())))
        return sample or size
    with open_file(path) as file, pa.CompressedInputStream(file, kind) as stream:
        try:
            sample = len(stream.read(SAMPLE_BYTES))
        except OSError as error:
            if is_outage(error):
                raise
            return size
        return sample if sample < SAMPLE_BYTES else max(size, sample * size // max(1, file.tell()))


def _estimate(chunk: Chunk, text_bytes: int, max_line_bytes: int) -> int:
    """Rows of a file, by reading the first of them; exact in a small one."""
    rows = 0
    for raw in read_raw(chunk, max_line_bytes):
        rows += 1
        if raw.offset >= SAMPLE_BYTES:
            return max(rows, rows * text_bytes // raw.offset)
    return rows
