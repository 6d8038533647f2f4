"""A process of this Python that works on what is not trusted, with limits, and the frames in which it is asked and answers.

Requests go to its stdin, answers come from its stdout, both in frames: a letter, the length, the bytes. A request that
exceeds its limits ends the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

HEAD = struct.Struct(">cQ")
REQUEST, PAYLOAD, READY, VALUE, REASON, LIMIT, DONE = b"Q", b"P", b"R", b"J", b"E", b"L", b"D"
WALL_S = 120.0  # without an answer, and several times the processor time allowed; a busy machine is slow
ROOT = str(Path(__file__).parents[2])  # where this package is imported from

Frame = tuple[bytes, bytes]


class LimitedProcess:
    """A process of `python -m module` and its pipes. Raises `EOFError` where it ends at its start, or does not come to it
    within `wall_s` seconds: one that ends later exceeded its limits."""

    def __init__(self, module: str, environment: Mapping[str, str], wall_s: float, *options: str) -> None:
        command = [sys.executable, *options, "-m", module]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout.fileno()
        self.poll = select.poll()
        self.poll.register(self.answers, select.POLLIN)
        self.pid, self.buffer = os.getpid(), bytearray()
        try:
            if self.answer(wall_s) is None:
                raise EOFError(f"ended at its start, with code {self.process.wait()}")
        except TimeoutError:
            self.end()
            raise EOFError(f"did not start within {wall_s:.0f} s") from None
        except BaseException:
            self.end()
            raise

    def ask(self, request: dict[str, Any], data: bytes) -> None:
        body = json.dumps(request).encode()
        self.requests.write(HEAD.pack(REQUEST, len(body)) + body)
        self.requests.write(HEAD.pack(PAYLOAD, len(data)))
        self.requests.write(data)
        self.requests.flush()

    def answer(self, wall_s: float) -> Frame | None:
        """The next frame; None where the process ended. Raises `TimeoutError`."""
        head = self._take(HEAD.size, wall_s)
        if head is None:
            return None
        kind, length = HEAD.unpack(head)
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


# ---------------------------------------------------------------- inside the process


def set_memory(num_bytes: int) -> None:
    """Limit what no file backs."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes if hard < 0 else min(num_bytes, hard), hard))


def set_processor_time(seconds: float) -> None:
    """From now on; 0: no limit. SIGPROF ends the process."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def used_memory() -> int | None:
    """Bytes of memory of this process that no file backs; None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.partition("VmData:")[2].split()[0]) << 10


def read_frame(stream: BinaryIO) -> Frame | None:
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    kind, length = HEAD.unpack(head)
    return kind, stream.read(length)


def own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """(requests, answers), which no library reads or prints to; no core is dumped."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not an answer
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return requests, answers


def pairs(requests: BinaryIO) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Requests with their payloads, until the pipe is closed."""
    while (frame := read_frame(requests)) is not None:
        payload = read_frame(requests)
        assert payload is not None
        yield json.loads(frame[1]), payload[1]


def write(answers: BinaryIO, frames: Iterable[Frame]) -> None:
    for kind, body in frames:
        answers.write(HEAD.pack(kind, len(body)))
        answers.write(body)
    answers.flush()
