"""TLS handshakes of a gateway's clients: counted as connections from the first moment, limited in time (no torch, no ray).

asyncio's own TLS server announces a connection when its handshake is complete; until then nobody counts it.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Protocol, cast

HANDSHAKE_S = 10.0  # within which a handshake must be complete


class Entrance(Protocol):
    """Counts connections by the address of their client."""

    handshakes: set[asyncio.Task[None]]

    def enter(self, address: str) -> bool:
        """Count one; False where it is one too many."""

    def leave(self, address: str) -> None:
        """Count it no longer."""

    def connection(self) -> asyncio.Protocol:
        """What a connection speaks once its handshake is complete."""


def address_of(transport: asyncio.BaseTransport) -> str:
    return str((transport.get_extra_info("peername") or ("",))[0])


class Handshake(asyncio.Protocol):
    """A connection until its handshake is complete; then what it speaks takes over. One too many is closed at once: before
    TLS there is no answer."""

    def __init__(self, entrance: Entrance, context: ssl.SSLContext) -> None:
        self._entrance, self._context = entrance, context
        self._address = ""
        self._is_counted = self._is_lost = self._has_ended = False
        self._early = bytearray()  # what came in the same packet as the end of the handshake

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._address, self._is_counted = address_of(transport), True
        plain = cast(asyncio.Transport, transport)
        if not self._entrance.enter(self._address):
            plain.abort()
            return
        plain.pause_reading()  # the first byte is for TLS
        task = asyncio.get_running_loop().create_task(self._secure(plain))
        self._entrance.handshakes.add(task)
        task.add_done_callback(self._entrance.handshakes.discard)

    def data_received(self, data: bytes) -> None:
        self._early += data

    def eof_received(self) -> None:
        self._has_ended = True

    def connection_lost(self, exc: BaseException | None) -> None:
        self._is_lost = True
        self._leave()

    async def _secure(self, plain: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        try:
            secured = await loop.start_tls(plain, self, self._context, server_side=True, ssl_handshake_timeout=HANDSHAKE_S)
        except OSError:  # TLS's own errors and the time-out are among them; the transport is closed
            secured = None
        finally:
            self._leave()
        if secured is None or self._is_lost:
            return
        inner = self._entrance.connection()
        secured.set_protocol(inner)
        inner.connection_made(secured)
        if self._early:
            inner.data_received(bytes(self._early))
        if self._has_ended:
            inner.eof_received()

    def _leave(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self._entrance.leave(self._address)
