"""Bytes of a source file, plain or compressed, to lines with their place; in memory are one block and one line."""

from __future__ import annotations

import bz2
import hashlib
import lzma
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from forge_ray.errors import DataError

BLOCK = 1 << 20
TOO_LONG = "longer than max_line_bytes"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
XZ_MEMORY = 256 << 20  # of a stream's dictionary, which its head may ask for at will; `xz -9` needs 65 MiB
# How Arrow words a compressed stream that is wrong. Any other OSError is the disk's or the network's.
DAMAGE = ("zlib inflate", "ZSTD decompress", "ZSTD init", "Truncated compressed")


@dataclass(frozen=True, slots=True)
class Raw:
    """One row where it was found, not yet parsed: bytes of JSON (`raw`), a decoded `value`, or the `reason` why neither."""

    line: int  # line, or number of the row; a document has 1; from 1
    offset: int  # bytes before it in the uncompressed file; -1 where rows have no place of their own (Parquet, Arrow)
    raw: bytes | None
    value: Any
    sha256: str  # of the bytes of the line or document; "" where there are none
    reason: str = ""


class Damaged(Exception):
    """A compressed file cannot be read beyond this point; everything before it was handed out."""


def filesystem_of(path: str) -> tuple[pafs.FileSystem, str]:
    """Where a path or URI lies, and its name there."""
    if "://" in path:
        filesystem, inner = pafs.FileSystem.from_uri(path)
        return filesystem, inner
    return pafs.LocalFileSystem(), path


def open_file(path: str) -> Any:
    """A stream of the file; only of a regular one, for a pipe or a device has no end and no size."""
    filesystem, inner = filesystem_of(path)
    if isinstance(filesystem, pafs.LocalFileSystem) and not stat.S_ISREG(os.stat(inner).st_mode):
        raise DataError(f"{path!r} is not a regular file", hint="write its content to a file, and name that")
    return filesystem.open_input_file(inner)


def is_inside(path: str, folder: str) -> bool:
    """Whether a local path, its links followed, is one of the folder's."""
    target, root = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([target, root]) == root


def without_query(path: str) -> str:
    """A URI without its options."""
    return path.partition("?")[0] if "://" in path else path


def compression_of(path: str) -> str | None:
    name = without_query(path).lower()
    return next((kind for ending, kind in COMPRESSIONS.items() if name.endswith(ending)), None)


def is_outage(error: Exception) -> bool:
    """Whether the file could not be had, rather than not be understood: that must stop the stage, not cost rows."""
    return getattr(error, "errno", None) is not None or "AWS Error" in str(error) or "HDFS" in str(error)


def blocks(path: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The bytes start..end of a file, or all that a compressed one holds; raises `Damaged` behind the last readable byte."""
    if kind := compression_of(path):
        yield from _decompressed(path, kind)
        return
    with open_file(path) as stream:
        end = stream.size() if end is None else end
        stream.seek(start)
        while start < end:
            data = stream.read(min(BLOCK, end - start))
            if not data:
                raise DataError(
                    f"data.sources: {without_query(path)} ends at byte {start}, but had {end} bytes when it was indexed",
                    hint="let nobody write to source files while they are read, then start again",
                )
            yield data
            start += len(data)


def _decompressed(path: str, kind: str) -> Iterator[bytes]:
    if kind in ("bz2", "xz"):
        with open_file(path) as file:
            yield from unpacked(file, kind)
        return
    position = 0
    with open_file(path) as file, pa.CompressedInputStream(file, kind) as stream:
        while (data := _read(stream, BLOCK)) is not None:
            if not data:
                return
            position += len(data)
            yield data
    # A read fails as a whole: what it could have given is had byte by byte, for the lines in it are good ones.
    with open_file(path) as file, pa.CompressedInputStream(file, kind) as stream:
        while position:
            position -= len(stream.read(min(BLOCK, position)))
        last = bytearray()
        while data := _read(stream, 1):
            last += data
    yield bytes(last)
    if kind != "gzip" or not _is_padded(path):
        raise Damaged(kind)


def unpacked(file: Any, kind: str) -> Iterator[bytes]:
    """What the bz2 or xz streams of a file stand for, one behind the other, at most `BLOCK` bytes at a time."""
    decoder, start, handed = _decoder(kind), 0, 0  # of the stream: its first byte, and how many bytes of it were handed out
    data = file.read(BLOCK)
    piece = 0  # where `data` begins
    while True:
        try:
            block = decoder.decompress(data, BLOCK)
        except (OSError, lzma.LZMAError, EOFError):
            yield from _before_damage(file, kind, start, piece, handed)
            raise Damaged(kind) from None
        handed += len(block)
        if block:
            yield block
        if decoder.eof:
            data = decoder.unused_data.lstrip(b"\0")  # padding
            while not data:
                if not (data := file.read(BLOCK)):
                    return
                data = data.lstrip(b"\0")
            decoder, handed = _decoder(kind), 0
            start = piece = file.tell() - len(data)
        elif decoder.needs_input:
            piece = file.tell()
            if not (data := file.read(BLOCK)):
                raise Damaged(kind)
        else:
            data = b""


def _before_damage(file: Any, kind: str, start: int, piece: int, handed: int) -> Iterator[bytes]:
    """The rest of a stream up to the byte that cannot be read. A call fails as a whole: the last piece goes in by bytes."""
    decoder = _decoder(kind)
    file.seek(start)
    while True:
        size = min(BLOCK, max(1, piece - file.tell()))
        try:
            block = decoder.decompress(file.read(size) if decoder.needs_input else b"", BLOCK)
        except (OSError, lzma.LZMAError, EOFError):
            return
        if len(block) > handed:
            yield block[handed:]
        handed = max(0, handed - len(block))


def _decoder(kind: str) -> Any:
    return bz2.BZ2Decompressor() if kind == "bz2" else lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)


def _is_padded(path: str) -> bool:
    """Whether nothing but zero bytes is behind the last gzip stream of a file, as tapes and block devices leave them."""
    decoder, data = None, b""
    with open_file(path) as file:
        while data := data or file.read(BLOCK):
            if decoder is None or decoder.eof:
                if not data.startswith(b"\x1f"):
                    break
                decoder = zlib.decompressobj(wbits=31)
            try:
                decoder.decompress(data, BLOCK)
            except zlib.error:
                return False
            data = decoder.unconsumed_tail or decoder.unused_data
        while data and not data.strip(b"\0"):
            data = file.read(BLOCK)
    return decoder is not None and decoder.eof and not data


def _read(stream: Any, size: int) -> bytes | None:
    try:
        return bytes(stream.read(size))
    except OSError as error:
        if not str(error).startswith(DAMAGE):
            raise
        return None


class HeldBytes:
    """The bytes of one line or element, of which at most `limit` stay in memory; the digest is of all of them."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.parts: list[bytes] = []
        self.hasher: Any = None

    def add(self, data: bytes) -> None:
        self.size += len(data)
        if self.hasher is not None:
            self.hasher.update(data)
            return
        self.parts.append(data)
        if self.size > self.limit:
            self.hasher = hashlib.sha256(b"".join(self.parts))
            self.parts = []

    def take(self, line: int, offset: int) -> Raw:
        """What was collected, as a row; then empty again."""
        if self.hasher is not None:
            row = Raw(line, offset, None, None, self.hasher.hexdigest(), TOO_LONG)
        else:
            raw = b"".join(self.parts)
            row = Raw(line, offset, raw, None, hashlib.sha256(raw).hexdigest())
        self.parts, self.size, self.hasher = [], 0, None
        return row


def lines(source: Iterable[bytes], number: int, offset: int, limit: int, blank: bool = False) -> Iterator[Raw]:
    """Every line, without its newline; empty ones only if `blank`. `number` and `offset` are those of the first."""
    held = HeldBytes(limit)
    damaged = ""
    try:
        for block in source:
            *ended, rest = block.split(b"\n")
            for part in ended:
                if held.size or len(part) > limit:
                    held.add(part)
                    size = held.size
                    row = held.take(number, offset)
                    if blank or row.raw is None or row.raw.strip():
                        yield row
                else:
                    size = len(part)
                    if blank or part.strip():
                        yield Raw(number, offset, part, None, hashlib.sha256(part).hexdigest())
                number += 1
                offset += size + 1
            if rest:
                held.add(rest)
    except Damaged as kind:
        damaged = f"the {kind} stream is damaged or cut off here"
    if damaged:
        yield Raw(number, offset, None, None, "", damaged)
    elif held.size:
        row = held.take(number, offset)
        if blank or row.raw is None or row.raw.strip():
            yield row
