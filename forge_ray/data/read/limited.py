"""Asks a process with limits (`foreign`) to read what libraries of others' formats read, and gives its answers.

A process is kept for the next file, so that a file costs a few system calls; one that exceeded its limits is not.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from forge_ray.data.read import foreign
from forge_ray.data.read.columnar import Lost
from forge_ray.data.read.workbook import Row
from forge_ray.errors import DataError
from forge_ray.machine.limited import DONE, LIMIT, REASON, ROOT, WALL_S, Frame, LimitedProcess

OVER = "needs more time or memory than a file of its size may"

_idle: list[LimitedProcess] = []
_lock = threading.Lock()


class OverLimit(Exception):
    """The file needs more than the limits; the message is the reason for the quarantine."""


class NotRead(Exception):
    """The file cannot be read; the message is the reason, or `!` and the name of an error."""


def _process() -> LimitedProcess:
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH", ""))))
    environment = os.environ | {"PYTHONPATH": path, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    # what is freed goes back at once: holes in the heap would count, by chance, against the next slice of ordinary rows
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
    try:
        return LimitedProcess(foreign.__name__, environment, WALL_S)
    except EOFError as error:
        raise DataError(
            f"the process that reads documents and tables {error}",
            hint=f"see why on that node: {sys.executable} -m {foreign.__name__} < /dev/null",
        ) from None


@atexit.register
def _end_all() -> None:
    while _idle:
        process = _idle.pop()
        if process.pid == os.getpid():
            process.end()


def _borrowed() -> LimitedProcess:
    with _lock:
        while _idle:
            process = _idle.pop()
            if process.pid == os.getpid() and process.process.poll() is None:
                return process
    return _process()


def _frames(request: dict[str, Any], data: bytes = b"", stored: int = 0) -> Iterator[Frame]:
    wall_s = WALL_S + 4 * foreign.cpu_limit(max(stored, len(data)))
    process, sound = _borrowed(), False
    try:
        process.ask(request, data)
        while True:
            frame = process.answer(wall_s)
            if frame is None or frame[0] == LIMIT:
                raise OverLimit(OVER)
            if frame[0] == DONE:
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
        if kind == REASON:
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
        if frame[0] == REASON:  # the last one; the process is used again once it is done
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


def _sound(frame: Frame) -> Frame:
    kind, body = frame
    if kind == foreign.OUTAGE:
        number, message = json.loads(body)
        raise OSError(message) if number is None else OSError(number, message)
    if kind == REASON:
        raise NotRead(body.decode())
    return frame
