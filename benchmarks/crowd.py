"""Many clients that cost next to nothing: each sends prepared bytes over a connection that it keeps, and reads no more of an
answer than how it begins and where it ends. What they take of a small machine's cores is taken from the server that they
measure.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

HEAD_END = b"\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
TAIL = 256  # bytes kept of an answer: its last event and the end of its last chunk


@dataclass(frozen=True)
class Outcome:
    """One request; seconds since its bytes were written. `is_whole`: whether all of it came, of a 200 its `[DONE]` too."""

    status: int
    first_s: float  # until the status line was read
    total_s: float
    is_whole: bool


def request_bytes(url: str, path: str, body: dict[str, Any]) -> bytes:
    """A POST with this body in JSON, as it goes over the wire."""
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


class Connection(asyncio.Protocol):
    """One connection, one request at a time. A lost one is an outcome with status 0."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Outcome] | None = None
        self._head, self._tail = b"", b""
        self._status, self._missing = 0, -1  # bytes of the body to come; -1: it is in chunks
        self._sent_at = self._first_s = 0.0

    def send(self, request: bytes) -> asyncio.Future[Outcome]:
        """Writes the request; what is returned has its outcome when all of the answer is here."""
        assert self._transport is not None
        assert self._answer is None
        self._answer = asyncio.get_running_loop().create_future()
        self._head = self._tail = b""
        self._status, self._first_s = 0, 0.0
        self._sent_at = time.perf_counter()
        self._transport.write(request)
        return self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.is_open = transport, True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._end(is_cut=True)

    def data_received(self, data: bytes) -> None:
        if not self._status:
            self._head += data
            if b"\r\n" not in self._head:
                return
            self._first_s = self._first_s or time.perf_counter() - self._sent_at
            head, end, data = self._head.partition(HEAD_END)
            if not end:
                return
            self._status = int(head.split(b" ", 2)[1])
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            self._missing = int(length) if length else -1
        if self._missing >= 0:
            self._missing -= len(data)
            if self._missing <= 0:
                self._end()
            return
        self._tail = (self._tail + data)[-TAIL:]
        if self._tail.endswith(LAST_CHUNK):
            self._end()

    def _end(self, is_cut: bool = False) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            is_whole = not is_cut and (self._status != 200 or DONE in self._tail)
            total_s = time.perf_counter() - self._sent_at
            answer.set_result(Outcome(self._status, self._first_s, total_s, is_whole))


async def press(url: str, new_request: Callable[[], bytes], clients: int, seconds: float, back_s: float) -> list[Outcome]:
    """So many clients that ask one thing after the other for so long, each `back_s` after it was refused: with the same
    bytes then, which no engine has seen."""
    outcomes: list[Outcome] = []
    loop = asyncio.get_running_loop()
    host, _, port = urlsplit(url).netloc.rpartition(":")
    end = time.perf_counter() + seconds

    async def client(request: bytes) -> None:
        connection = Connection()
        while time.perf_counter() < end:
            if not connection.is_open:
                _, connection = await loop.create_connection(Connection, host, int(port))
            outcome = await connection.send(request)
            outcomes.append(outcome)
            if outcome.status == 200:
                request = new_request()
            else:
                await asyncio.sleep(back_s)
        connection.close()

    requests = [new_request() for _ in range(clients)]  # before the clock: all come at once
    await asyncio.gather(*map(client, requests))
    return outcomes
