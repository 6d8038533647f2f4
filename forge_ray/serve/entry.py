"""A connection of the gateway until it is admitted: counted from its first moment, TLS handshakes limited in time (no torch,
no ray).

asyncio's own TLS server announces a connection when its handshake is complete; until then nobody counts it. What is refused
is refused before anything is built for it, for an address beyond its limit may come back at once, again and again.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Protocol, cast

HANDSHAKE_S = 10.0  # within which a handshake must be complete
BODY = (
    b'{"error":{"message":"too many connections","type":"invalid_request_error","param":null,"code":"too_many_connections"}}'
)
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


class Entrance(Protocol):
    """Counts connections by the address of their client."""

    tls: ssl.SSLContext | None
    handshakes: set[asyncio.Task[None]]

    def enter(self, address: str) -> bool:
        """Count one; False, and none is counted, where it would be one too many."""

    def leave(self, address: str) -> None:
        """Count it no longer."""

    def connection(self) -> asyncio.Protocol:
        """What an admitted connection speaks; it leaves when it is lost."""


def address_of(transport: asyncio.BaseTransport) -> str:
    """The address of the client."""
    return str((transport.get_extra_info("peername") or ("",))[0])


class Entry(asyncio.Protocol):
    """What a connection speaks until it is admitted. One too many is answered 503, or closed where TLS would come first."""

    def __init__(self, entrance: Entrance) -> None:
        self._entrance = entrance
        self._address = ""
        self._is_counted = self._is_lost = self._has_ended = False
        self._early = bytearray()  # what came in the same packet as the end of the handshake

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        plain, tls = cast(asyncio.Transport, transport), self._entrance.tls
        self._address = address_of(plain)
        self._is_counted = self._entrance.enter(self._address)
        if not self._is_counted:
            if tls is None:
                plain.write(REFUSAL)
                plain.close()
            else:
                plain.abort()
        elif tls is None:
            self._admit(plain)
        else:
            plain.pause_reading()  # the first byte is for TLS
            task = asyncio.get_running_loop().create_task(self._secure(plain, tls))
            self._entrance.handshakes.add(task)
            task.add_done_callback(self._entrance.handshakes.discard)

    def data_received(self, data: bytes) -> None:
        if self._is_counted:
            self._early += data

    def eof_received(self) -> None:
        self._has_ended = True

    def connection_lost(self, exc: BaseException | None) -> None:
        self._is_lost = True
        self._leave()

    async def _secure(self, plain: asyncio.Transport, tls: ssl.SSLContext) -> None:
        loop, secured = asyncio.get_running_loop(), None
        try:
            secured = await loop.start_tls(plain, self, tls, server_side=True, ssl_handshake_timeout=HANDSHAKE_S)
        except OSError:  # TLS's own errors and the time-out are among them; the transport is closed
            return
        finally:
            if secured is None:  # cancelled too
                self._leave()
        if secured is None or self._is_lost:
            return
        self._admit(secured)

    def _admit(self, transport: asyncio.Transport) -> None:
        """Let the connection speak what it is here for, with what has come already."""
        inner = self._entrance.connection()
        transport.set_protocol(inner)
        inner.connection_made(transport)
        if self._early:
            inner.data_received(bytes(self._early))
        if self._has_ended:
            inner.eof_received()

    def _leave(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self._entrance.leave(self._address)
