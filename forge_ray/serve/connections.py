"""What the connections of a gateway's clients may cost: their number, their handshakes, the size and time of heads, the
bytes of bodies (no torch, no ray)."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from forge_ray.errors import ConfigError
from forge_ray.serve.entry import Entry, address_of

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 100
HEAD_S = 10.0  # within which a head must have arrived
SWEEP_S = 1.0
ACCEPTED_AT_ONCE, MAX_QUEUED = 16, 4096  # connections
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConnectionLimits:
    """`most` connections in all, and `most_by_one` of one address."""

    most: int
    most_by_one: int


class BoundedServer(web.Server):
    """aiohttp's server, with limits on its connections and heads; with `tls`, on handshakes as well."""

    def __init__(self, handler: Any, limits: ConnectionLimits, tls: ssl.SSLContext | None = None, **settings: Any) -> None:
        super().__init__(handler, **settings)
        self.limits = limits
        self.tls = tls
        self.by_address: Counter[str] = Counter()
        self.num_open = self.num_refused = 0
        self.handshakes: set[asyncio.Task[None]] = set()

    def __call__(self) -> asyncio.Protocol:  # type: ignore[override]
        return Entry(self)

    def connection(self) -> BoundedConnection:
        """What an admitted connection speaks; it leaves when it is lost."""
        return BoundedConnection(self, loop=self._loop, max_headers=MAX_HEADERS, **self._kwargs)

    def enter(self, address: str) -> bool:
        """Count one more connection of this address; False, and none is counted, where it would be one too many."""
        if self.num_open >= self.limits.most or self.by_address[address] >= self.limits.most_by_one:
            self.num_refused += 1
            return False
        self.num_open += 1
        self.by_address[address] += 1
        return True

    def leave(self, address: str) -> None:
        """Count one connection less."""
        self.num_open -= 1
        self.by_address[address] -= 1
        if self.by_address[address] <= 0:
            del self.by_address[address]

    async def listen(self, host: str, port: int) -> asyncio.Server:
        """asyncio accepts as many connections at once as may wait in the queue: few at once here, so that running requests
        have their turn, and many may wait. Raises `ConfigError` where the address cannot be had."""
        try:
            listener = await asyncio.get_running_loop().create_server(self, host, port, backlog=ACCEPTED_AT_ONCE)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}", hint="another --port or --host") from None
        for transport_socket in listener.sockets:
            with transport_socket.dup() as same:
                same.listen(MAX_QUEUED)
        return listener

    async def sweep(self) -> None:
        """Close connections whose head does not arrive, until cancelled; then the handshakes that are under way too."""
        try:
            while True:
                await asyncio.sleep(SWEEP_S)
                now = time.monotonic()
                for connection in list(self.connections):
                    if isinstance(connection, BoundedConnection):
                        connection.close_if_late(now)
        finally:
            for handshake in list(self.handshakes):
                handshake.cancel()


class BoundedConnection(RequestHandler):
    """One client's connection."""

    def __init__(self, server: BoundedServer, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._server = server
        self._address = ""
        self._head_since: float | None = None
        self._head_bytes = 0
        self._last_body: Any = None  # of the last request whose head is complete

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._address, self._head_since = address_of(transport), time.monotonic()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._server.leave(self._address)

    def data_received(self, data: bytes) -> None:
        seen = self._request_count
        is_head = self._last_body is None or self._last_body.is_eof()
        super().data_received(data)
        if self._request_count != seen:  # a head is complete
            self._head_since, self._head_bytes = None, 0
            if self._messages:
                self._last_body = self._messages[-1][1]
        elif is_head:
            if self._head_since is None:
                self._head_since = time.monotonic()
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._end(431, "Request Header Fields Too Large", "head_too_large")

    def close_if_late(self, now: float) -> None:
        """End the connection if a head began too long ago and nothing is being answered."""
        since, is_idle = self._head_since, self._current_request is None and not self._messages
        if since is not None and is_idle and now - since > HEAD_S:
            if self._head_bytes:
                self._end(408, "Request Timeout", "request_timeout")
            else:  # nothing was asked, so there is nothing to answer
                self.force_close()

    def log_exception(self, *words: Any, **more: Any) -> None:
        """A head that is not HTTP is the client's doing: one line, without its bytes."""
        error = more.get("exc_info")
        if type(error).__module__.startswith("aiohttp.http"):
            log.warning("a request of %s was refused: %s", self._address, type(error).__name__)
        else:
            super().log_exception(*words, **more)

    def _end(self, status: int, reason: str, code: str) -> None:
        """A short answer if none is under way, and the end of the connection."""
        transport = self.transport
        if transport is None:
            return
        if self._current_request is None:
            body = b'{"error":{"message":"%b","type":"invalid_request_error","param":null,"code":"%b"}}' % (
                reason.lower().encode(),
                code.encode(),
            )
            head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            transport.write(head.encode() + body)
        self.force_close()


@dataclass
class Buffer:
    """Bytes that the gateway holds for requests: `most` in all, and a quarter of it for one caller."""

    most: int
    held: int = 0
    by_caller: Counter[str] = field(default_factory=Counter)

    def has_room(self, caller: str, size: int) -> bool:
        """Whether `size` more bytes may be held for the caller."""
        return self.held + size <= self.most and self.by_caller[caller] + size <= self.most // 4

    def add(self, caller: str, size: int) -> None:
        """Count bytes as held."""
        self.held += size
        self.by_caller[caller] += size

    def release(self, caller: str, size: int) -> None:
        """Count them as let go."""
        self.held -= size
        self.by_caller[caller] -= size
        if self.by_caller[caller] <= 0:
            del self.by_caller[caller]


@dataclass
class Held:
    """The share of one request in a buffer."""

    buffer: Buffer
    caller: str
    size: int = 0

    def add(self, size: int) -> bool:
        """Count `size` more bytes, which are there already; False where no more should be read."""
        has_room = self.buffer.has_room(self.caller, size)
        self.buffer.add(self.caller, size)
        self.size += size
        return has_room

    def release(self) -> None:
        """Let go of all of it."""
        self.buffer.release(self.caller, self.size)


@dataclass
class CheckedKeys:
    """Callers whose key an endpoint has accepted a moment ago."""

    valid_s: float = 10.0
    most: int = 4096
    clock: Callable[[], float] = time.monotonic
    _until: dict[str, float] = field(default_factory=dict)

    def add(self, caller: str) -> None:
        """Remember the caller; the oldest is forgotten."""
        self._until.pop(caller, None)
        self._until[caller] = self.clock() + self.valid_s
        if len(self._until) > self.most:
            del self._until[next(iter(self._until))]

    def __contains__(self, caller: str) -> bool:
        return self._until.get(caller, 0.0) > self.clock()
