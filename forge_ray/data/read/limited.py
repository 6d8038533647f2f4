"""Asks a process with limits (`foreign`) to read what libraries of others' formats read, and gives its answers.

A process is kept for the next file, so that a file costs a few system calls; one that exceeded its limits is not.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from forge_ray.data.read import foreign
from forge_ray.data.read.columnar import Lost
from forge_ray.data.read.workbook import Row
from forge_ray.errors import DataError

WALL_S = 120.0  # without an answer, and several times the processor time allowed; a busy machine is slow
OVER = "needs more time or memory than a file of its size may"

_idle: list[_Process] = []
_lock = threading.Lock()


class OverLimit(Exception):
    """The file needs more than the limits; the message is the reason for the quarantine."""


class NotRead(Exception):
    """The file cannot be read; the message is the reason, or `!` and the name of an error."""


class _Process:
    """One process of `foreign` and its pipes."""

    def __init__(self) -> None:
        here = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
        environment = os.environ | {"PYTHONPATH": path, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
        # what is freed goes back at once: holes in the heap would count, by chance, against the next slice of ordinary rows
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
        command = [sys.executable, "-m", "forge_ray.data.read.foreign"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout.fileno()
        self.poll = select.poll()
        self.poll.register(self.answers, select.POLLIN)
        self.pid, self.buffer = os.getpid(), bytearray()
        if self.answer(WALL_S) is None:  # before any file: one that ends later exceeded its limits
            raise DataError(
                f"the process that reads documents and tables ended at its start, with code {self.process.wait()}",
                hint=f"see why on that node: {sys.executable} -m forge_ray.data.read.foreign < /dev/null",
            )

    def ask(self, request: dict[str, Any], data: bytes) -> None:
        body = json.dumps(request).encode()
        self.requests.write(foreign.HEAD.pack(foreign.REQUEST, len(body)) + body)
        self.requests.write(foreign.HEAD.pack(foreign.PAYLOAD, len(data)))
        self.requests.write(data)
        self.requests.flush()

    def answer(self, wall_s: float) -> foreign.Frame | None:
        """The next frame; None where the process ended. Raises `TimeoutError`."""
        head = self._take(foreign.HEAD.size, wall_s)
        if head is None:
            return None
        kind, length = foreign.HEAD.unpack(head)
        body = self._take(length, wall_s)
        return None if body is None else (kind, body)

    def _take(self, size: int, wall_s: float) -> bytes | None:
        while len(self.buffer) < size:
            if not self.poll.poll(wall_s * 1000):
                raise TimeoutError
            data = os.read(self.answers, 1 << 20)
            if not data:
                return None
            self.buffer += data
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


@atexit.register
def _end_all() -> None:
    while _idle:
        process = _idle.pop()
        if process.pid == os.getpid():
            process.end()


def _borrowed() -> _Process:
    with _lock:
        while _idle:
            process = _idle.pop()
            if process.pid == os.getpid() and process.process.poll() is None:
                return process
    return _Process()


def _frames(request: dict[str, Any], data: bytes = b"", stored: int = 0) -> Iterator[foreign.Frame]:
    wall_s = WALL_S + 4 * foreign.cpu_limit(max(stored, len(data)))
    process, sound = _borrowed(), False
    try:
        process.ask(request, data)
        while True:
            frame = process.answer(wall_s)
            if frame is None or frame[0] == foreign.LIMIT:
                raise OverLimit(OVER)
            if frame[0] == foreign.DONE:
                sound = True
                return
            yield frame
    except TimeoutError:
        raise DataError(
            f"data.sources: {request.get('path') or 'a document'} could not be read: no answer within {wall_s:.0f} s",
            hint="look at the disk or network that the file lies on, then start again",
        ) from None
    except BrokenPipeError:
        raise OverLimit(OVER) from None
    finally:
        if sound:
            with _lock:
                _idle.append(process)
        else:
            process.end()


def read_document(data: bytes, format: str) -> str:
    """The text of a document, read within limits; raises `NotRead` or `OverLimit`."""
    text = ""
    for kind, body in _frames({"kind": "document", "format": format}, data):
        if kind == foreign.REASON:
            reason = body.decode()
        else:
            text, reason = body.decode("utf-8", "surrogatepass"), ""
    if reason:
        raise NotRead(reason)
    return text


def read_value(request: dict[str, Any]) -> Any:
    """The answer of a request with one value; raises `NotRead` or `OverLimit`, and `OSError` for an outage."""
    (frame,) = list(_frames(request, stored=request.get("size", 0)))
    return json.loads(_sound(frame)[1])


def read_slices(request: dict[str, Any], stored: int) -> Iterator[pa.RecordBatch | Lost]:
    """Slices of a columnar file; raises as `read_value` does."""
    reason = ""
    for frame in _frames(request, stored=stored):
        if frame[0] == foreign.REASON:  # the last one; the process is used again once it is done
            reason = frame[1].decode()
            continue
        kind, body = _sound(frame)
        if kind == foreign.LOST:
            num_rows, why = json.loads(body)
            yield num_rows, why
        else:
            with pa.ipc.open_stream(body) as reader:
                yield from reader
    if reason:
        raise NotRead(reason)


def read_rows(request: dict[str, Any]) -> Iterator[Row]:
    """Rows of a sheet; raises as `read_value` does, behind the rows before."""
    for frame in _frames(request, stored=request["size"]):
        yield from json.loads(_sound(frame)[1])


def _sound(frame: foreign.Frame) -> foreign.Frame:
    kind, body = frame
    if kind == foreign.OUTAGE:
        number, message = json.loads(body)
        raise OSError(message) if number is None else OSError(number, message)
    if kind == foreign.REASON:
        raise NotRead(body.decode())
    return frame
