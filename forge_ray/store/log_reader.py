"""Reads the audit log as it grows: each line once, and only where it follows the line before it.

The log is the order of everything: `standing.py` folds its lines, in their places, into what holds. A reader keeps the hash
of the last line that it took; a log that does not hold that line any more was cut or rewritten, and is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from forge_ray.errors import NotFound, StoreError
from forge_ray.records import canonical_json
from forge_ray.store import paths, signing
from forge_ray.store.files import Store

LOG, HEAD, LINES = map(paths.audit, ("log.jsonl", "head.json", "lines"))
START = "0" * 64
FORMAT = 2  # of lines whose place says what their events may do; those before had none
REMOTE_READERS = 16
HEAD_TRIES = 5  # others may write meanwhile
MAX_LINE = 64 << 20  # bytes; the longest record is far below


@dataclass(frozen=True)
class Line:
    """One line of the log at its place `number`, counted from 1; `hash` is what the next line names as `previous`."""

    number: int
    raw: bytes
    hash: str
    key: str
    action: str
    subject: str
    path: str
    sha256: str
    format: int

    def body(self) -> Any:
        """The content of the file that the line tells of; None where it is not what the line's digest says."""
        body = json.loads(self.raw).get("body")
        return body if hash_of(canonical_json(body)) == self.sha256 else None

    def is_signed(self, public_key: signing.PublicKey) -> bool:
        """Whether `public_key` signed the line: its content at this place, behind all lines before it."""
        line = json.loads(self.raw)
        try:
            signature = base64.b64decode(line.pop("sig", ""), validate=True)
        except (ValueError, TypeError):
            return False
        return bool(signature) and signing.is_signed(canonical_json(line), signature, public_key)


def hash_of(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def parse(raw: bytes, number: int, previous: str) -> Line:
    """The line at place `number` behind the line of hash `previous`; `StoreError` where it is none or does not follow."""
    try:
        line = json.loads(raw)
        texts = {name: line.get(name, "") for name in ("key", "action", "subject", "path", "sha256")}
        if not all(isinstance(text, str) for text in texts.values()):
            raise TypeError
        place, behind, form = line["n"], line["previous"], line.get("format", 1)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _broken(f"line {number} is no line of a log") from None
    if place != number:
        raise _broken(f"line {number} calls itself {place!r}: lines are missing, added or moved")
    if behind != previous:
        raise _broken(f"line {number} does not follow the line before it: one of the two was changed")
    return Line(number=number, raw=raw, hash=hash_of(raw), format=form if isinstance(form, int) else 1, **texts)


def previous_of(line: bytes) -> str:
    """The hash that a line names; "" where it is no line."""
    try:
        return str(json.loads(line)["previous"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def object_name(number: int) -> str:
    return f"{LINES}/{number:012d}.json"


def object_of(store: Store, number: int) -> bytes | None:
    """Line `number` on an object store; None where there is none."""
    try:
        return store.read(object_name(number))
    except NotFound:
        return None
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"line {number} of the log cannot be read: {error}", hint="check the connection") from None


def _broken(what: str) -> StoreError:
    return StoreError(what, hint="`forge audit verify` says what else differs; restore audit/ from a backup")


class LogReader:
    """The lines of one store's log. `new` returns those since the last call; what it raised about is asked for again."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.number, self.hash = 0, START
        self.hashes: list[str] = []  # hash of line n at place n - 1
        self._last_at = 0  # where the last line begins in the file
        self._last_raw = b""
        self._seen: tuple[int, int, int] = (0, 0, 0)  # inode, size and time of the file when it was last read

    @property
    def head(self) -> str:
        """`<n>:<hash>` of the last line that was read; "" before any."""
        return f"{self.number}:{self.hash}" if self.number else ""

    def new(self) -> list[Line]:
        """The lines since the last call, in their order. Raises `StoreError` where the log was cut, rewritten or broken, and
        holds on to what was read before; lines in front of a broken one are returned first, by the call before that."""
        lines: list[Line] = []
        try:
            for raw in self._appended():
                line = parse(raw, self.number + 1, self.hash)
                self._take(line)
                lines.append(line)
        except StoreError:
            if not lines:
                raise
        return lines

    def all(self) -> list[Line]:
        """Every line, for whoever begins to read. Raises `StoreError` for a log that is broken, or that does not end where
        its head says: an older state is not taken for the present one."""
        lines = self.new()
        for _ in range(HEAD_TRIES):
            while more := self.new():
                lines += more
            head = self.store.read(HEAD) if self.store.exists(HEAD) else b""
            if self._is_whole(head):
                return lines
        where = f"not at line {self.number}, where the log ends" if head else "missing"
        raise _broken(f"the head of the audit log of {self.store.place} is {where}: its end was cut off or changed")

    def _is_whole(self, head: bytes) -> bool:
        """Whether the lines end where the head says. A file's head is written before its line, an object's behind it, where
        two hosts that write at once may leave it behind."""
        if not head:
            return self.number <= (0 if self.store.is_local else 1)
        is_behind = not self.store.is_local and hash_of(head) in self.hashes
        return is_behind or self.hash in (hash_of(head), previous_of(head))

    def _take(self, line: Line) -> None:
        if self.number:
            self._last_at += len(self._last_raw) + 1
        self.number, self.hash, self._last_raw = line.number, line.hash, line.raw
        self.hashes.append(line.hash)

    def _appended(self) -> Iterator[bytes]:
        return self._appended_to_file() if self.store.is_local else self._appended_objects()

    def _appended_to_file(self) -> Iterator[bytes]:
        try:
            with open(self.store.path(LOG), "rb") as stream:
                stat = os.fstat(stream.fileno())
                seen = stat.st_ino, stat.st_size, stat.st_mtime_ns
                if seen == self._seen:
                    return
                stream.seek(self._last_at)
                if self.number and stream.read(len(self._last_raw) + 1) != self._last_raw + b"\n":
                    raise self._cut()
                while (raw := stream.readline(MAX_LINE)).endswith(b"\n"):  # a line without its end is still being written
                    yield raw[:-1]
                if len(raw) == MAX_LINE:
                    raise _broken(f"line {self.number + 1} is longer than {MAX_LINE >> 20} MiB")
                self._seen = seen if not raw else (0, 0, 0)
        except StoreError:
            raise
        except FileNotFoundError:
            if self.number:
                raise self._cut() from None
        except OSError as error:
            raise StoreError(f"{LOG} cannot be read: {error.strerror}", hint="check the store's file system") from None

    def _appended_objects(self) -> Iterator[bytes]:
        """Object by object: listing thousands of names each time would take longer than the look itself."""
        if self.number and object_of(self.store, self.number) != self._last_raw:
            raise self._cut()
        if not self.number:
            count = len(self.store.list(LINES))
            with ThreadPoolExecutor(REMOTE_READERS) as pool:
                for raw in pool.map(partial(object_of, self.store), range(1, count + 1)):
                    if raw is None:
                        raise _broken(f"line {self.number + 1} is missing")
                    yield raw
        while (raw := object_of(self.store, self.number + 1)) is not None:
            yield raw

    def _cut(self) -> StoreError:
        return StoreError(
            f"the audit log of {self.store.place} does not hold line {self.number} any more, which this process has read:"
            " it was cut or rewritten",
            hint="restore audit/ from a backup; what was read before stays in force here until then",
        )
