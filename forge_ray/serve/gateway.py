"""A reverse proxy that retries a request when the replica that had it died (no torch, no ray).

    asyncio.run(run(GatewayConfig(to=("http://127.0.0.1:8000",)), announce=print))

Requests are safe to retry: generating has no side effects. The gateway holds a request as a whole, and an answer until it is
complete unless it streams. A stream that has begun cannot be retried; it ends with an error event.

Its memory is bounded: `max_held_bytes` of bodies, and 64 KiB of a head and two reads for each of `max_connections`.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.streams import StreamReader
from multidict import CIMultiDict
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from yarl import URL

from forge_ray.serve.connections import BoundedServer, Buffer, CheckedKeys, ConnectionLimits, Held
from forge_ray.serve.gateway_config import GatewayConfig, tls_context
from forge_ray.serve.hop_headers import CREDENTIALS, caller_of, end_to_end, upstream_headers
from forge_ray.serve.request_ids import request_id_of
from forge_ray.serve.statuses import CLIENT_CLOSED

REPLICA_HEADER = "x-forge-deployment"  # every answer of a replica has it; a 5xx without it comes from a proxy in between
CLOSING = (400, 401, 408, 413, 429)  # the rest of the body is not read
RETRIED = frozenset({500, 502, 503, 504})
MAX_HELD = 8 << 20  # bytes of an answer that are held until it is complete; a larger one is passed on as it arrives
UNCHECKED = 64 << 10  # bytes of a body that are read before its key is checked
LARGE = 1 << 20  # bytes from which aiohttp writes a body in pieces
CONNECT_S = 5.0
BODY_S = 60.0  # within which a client must have sent its request
IDLE_UPSTREAM_S = (
    60.0  # below the 90 s after which an endpoint closes an idle connection: it must not be closed under a request
)
IDLE_CLIENT_S = 90.0
DOWN_S = 10.0  # for this long, an address that could not be reached is tried last
FIRST_PAUSE_S, MOST_PAUSE_S = 0.05, 2.0
LAST_WRITE_S = 5.0
LINGER_S = 0.5  # after a refusal, the rest of a body is discarded for so long, then the connection is closed
__all__ = ["Gateway", "GatewayConfig", "listening", "run"]
log = logging.getLogger(__name__)


class TryFailed(Exception):
    """One try failed before anything reached the client; the text is the reason, a label of the metrics."""


class Refused(Exception):
    """An error that the gateway itself answers, in OpenAI's format."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return json.dumps({"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}).encode()


class Gateway:
    """Handles requests; one per process."""

    def __init__(self, config: GatewayConfig, session: aiohttp.ClientSession) -> None:
        self.config = config
        self.session = session
        self.draining = False
        self.buffer = Buffer(config.max_held_bytes)
        self._checked = CheckedKeys()
        self._down_until = [0.0] * len(config.to)
        self._registry = CollectorRegistry()
        registry = self._registry
        self.running = Gauge("forge_gateway_requests_running", "Requests without a complete answer", registry=registry)
        self.connections = Gauge("forge_gateway_connections", "Connections of clients, handshakes too", registry=registry)
        self.refused = Gauge("forge_gateway_connections_refused", "Connections beyond the limits", registry=registry)
        self.server: BoundedServer | None = None
        self._requests = Counter("forge_gateway_requests", "Requests by the status sent", ["status"], registry=registry)
        self._retries = Counter("forge_gateway_retries", "Tries after a request's first", ["reason"], registry=registry)
        self._failures = Counter("forge_gateway_failures", "Requests that failed", ["reason"], registry=registry)
        self.num_running = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The answer to any request."""
        path = request.raw_path.partition("?")[0]
        if path == "/-/gateway/health":
            state = {"status": "draining" if self.draining else "ok", "running": self.num_running}
            return web.json_response(state, status=503 if self.draining else 200)
        if path == "/-/gateway/metrics":
            self.running.set(self.num_running)
            if self.server is not None:
                self.connections.set(self.server.num_open)
                self.refused.set(self.server.num_refused)
            return web.Response(body=generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})
        status = CLIENT_CLOSED
        request_id = request_id_of(request.headers.get("x-request-id", ""))
        self.num_running += 1
        try:
            response = await self._answer(request, request_id)
            status = response.status
        except Refused as error:
            status = error.status
            headers = {"content-type": "application/json", "x-request-id": request_id}
            response = web.Response(status=status, body=error.body(), headers=headers)
            if status in CLOSING:  # announced in the header; a client must not notice by losing its next request
                response.force_close()
        finally:
            self.num_running -= 1
            self._requests.labels(str(status)).inc()
        if self.draining and not response.prepared:
            response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        """The first final answer; `Refused` if there is none in time."""
        if not request.raw_path.startswith("/"):
            raise Refused(400, "the request's target is not a path; this is not a forward proxy", "invalid_target")
        try:
            "".join((request.raw_path, *request.headers.values())).encode()
        except UnicodeEncodeError:
            raise Refused(400, "the request's head is not UTF-8", "invalid_header") from None
        if len(request.headers.getall("authorization", ())) > 1:
            raise Refused(400, "the request has two Authorization headers: send one", "invalid_header")
        headers, caller = upstream_headers(request, request_id), caller_of(request)
        held = Held(self.buffer, caller)
        try:
            body = await self._read_body(request, headers, held)
            return await self._first_answer(request, request_id, headers, body, held)
        finally:
            held.release()

    async def _first_answer(
        self, request: web.BaseRequest, request_id: str, headers: CIMultiDict[str], body: bytes, held: Held
    ) -> web.StreamResponse:
        num_tries = [0] * len(self.config.to)
        first_failure = 0.0
        while True:
            number = min(range(len(num_tries)), key=lambda i: (num_tries[i], self._down_until[i] > time.monotonic(), i))
            num_tries[number] += 1
            try:
                return await self._try(request, number, headers, body, held)
            except TryFailed as failure:
                now = time.monotonic()
                first_failure = first_failure or now
                reason = str(failure)
            pause = _pause(min(num_tries))
            if sum(num_tries) >= self.config.tries or now + pause - first_failure > self.config.retry_s:
                self._failures.labels(reason).inc()
                log.error("request %s failed after %d tries, last: %s", request_id, sum(num_tries), reason)
                raise Refused(
                    502,
                    f"no replica answered after {sum(num_tries)} tries over {now - first_failure:.1f} s (last: {reason}); "
                    "send it again later, or see `forge deploy --status`",
                    "no_replica",
                )
            self._retries.labels(reason).inc()
            log.warning("request %s is retried: %s of %s", request_id, reason, self.config.to[number])
            await asyncio.sleep(pause)

    async def _try(
        self, request: web.BaseRequest, number: int, headers: CIMultiDict[str], body: bytes, held: Held
    ) -> web.StreamResponse:
        url = URL(self.config.to[number].rstrip("/") + request.raw_path, encoded=True)
        data = io.BytesIO(body) if len(body) > LARGE else body or None
        try:
            with _failing():
                answer = await self.session.request(request.method, url, headers=headers, data=data, allow_redirects=False)
        except TryFailed as failure:
            if str(failure) == "unreachable":
                self._down_until[number] = time.monotonic() + DOWN_S
            raise
        async with answer:  # leaving it before its end closes the connection, which cancels the request upstream
            if answer.status in RETRIED and REPLICA_HEADER not in answer.headers:
                raise TryFailed(f"status_{answer.status}")
            streams = answer.content_type == "text/event-stream"
            with _failing():
                head, complete = await _read_up_to(answer.content, 1 if streams else MAX_HELD, held)
            if answer.status == 503 and b'"adapter_unavailable"' in head:
                raise TryFailed("adapter_unavailable")
            if complete:
                headers = end_to_end(answer.headers, "" if request.method == "HEAD" else "content-length")
                return web.Response(status=answer.status, reason=answer.reason, headers=headers, body=head or None)
            return await self._pass_on(request, answer, head, streams)

    async def _read_body(self, request: web.BaseRequest, headers: CIMultiDict[str], held: Held) -> bytes:
        """The whole body, counted while it is read; a large one only for a key that an endpoint accepts."""
        max_bytes, is_checked = self.config.max_body_bytes, False
        too_large = Refused(413, f"the body exceeds the gateway's {max_bytes} bytes", "request_too_large")
        if (declared := request.content_length or 0) > max_bytes:
            raise too_large
        if declared > UNCHECKED:
            await self._check_key(headers, held.caller)
            is_checked = True
        if request.headers.get("expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                while piece := await request.content.readany():
                    if not held.add(len(piece)):
                        raise Refused(429, "the gateway holds as many bytes of requests as it may: try again", "overloaded")
                    body += piece
                    if len(body) > max_bytes:
                        raise too_large
                    if len(body) > UNCHECKED and not is_checked:
                        await self._check_key(headers, held.caller)
                        is_checked = True
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {BODY_S:.0f} s", "request_timeout") from None
        except web.RequestPayloadError:
            raise Refused(400, "the body does not match its headers", "invalid_body") from None
        return bytes(body)

    async def _check_key(self, headers: CIMultiDict[str], caller: str) -> None:
        """401 where an endpoint says that the caller's key is not valid; 502 where none can say so."""
        if caller in self._checked:
            return
        names, begun = {name: headers[name] for name in CREDENTIALS if name in headers}, time.monotonic()
        for number in range(self.config.tries):
            address = self.config.to[number % len(self.config.to)]
            try:
                with _failing():
                    async with asyncio.timeout(CONNECT_S):
                        url = URL(address.rstrip("/") + "/health", encoded=True)
                        async with self.session.get(url, headers=names, allow_redirects=False) as answer:
                            status, is_own = answer.status, REPLICA_HEADER in answer.headers
            except (TryFailed, TimeoutError):
                status, is_own = 502, False
            if status == 401:
                raise Refused(401, "the API key is not valid here", "invalid_api_key")
            if is_own or status not in RETRIED:
                self._checked.add(caller)
                return
            pause = _pause(number // len(self.config.to))
            if time.monotonic() + pause - begun > self.config.retry_s:
                break
            await asyncio.sleep(pause)
        raise Refused(502, "no replica could check the API key; send the request again later", "no_replica")

    async def _pass_on(
        self, request: web.BaseRequest, answer: aiohttp.ClientResponse, head: bytes, streams: bool
    ) -> web.StreamResponse:
        """The rest of an answer as it arrives. A stream is sent in whole lines, so that an error can follow at any time."""
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=end_to_end(answer.headers))
        if self.draining:
            response.force_close()
        await response.prepare(request)
        held = b""
        while head:
            end = head.rfind(b"\n") + 1 if streams else len(head)
            if end:
                await response.write(held + head[:end])
                held = b""
            held += head[end:]
            try:
                with _failing():
                    head = await answer.content.readany()
            except TryFailed as failure:
                self._failures.labels(f"begun_{failure}").inc()
                log.error("an answer broke after it had begun: %s of %s", failure, answer.url.origin())
                if streams:  # end it cleanly: closing the connection would lose the client's next request on it
                    broken = Refused(
                        502, "the replica died in the middle of its answer; send the request again", "broken_stream"
                    )
                    await response.write(b"\ndata: " + broken.body() + b"\n\n")
                elif request.transport is not None:
                    request.transport.abort()  # a clean end would look like a complete answer
                return response
        if held:
            await response.write(held)
        return response


async def _read_up_to(content: StreamReader, size: int, held: Held) -> tuple[bytes, bool]:
    """(bytes, whether they are all): at least `size` bytes, fewer if the content ends before, or none more may be held."""
    head = bytearray()
    while len(head) < size:
        piece = await content.readany()
        if not piece:
            return bytes(head), True
        head += piece
        if not held.add(len(piece)):
            break
    return bytes(head), False


@contextmanager
def _failing() -> Iterator[None]:
    """Translate failures of the connection upstream to `TryFailed`."""
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as error:
        raise TryFailed("unreachable") from error
    except aiohttp.ServerDisconnectedError as error:
        raise TryFailed("closed") from error
    except aiohttp.ClientPayloadError as error:
        raise TryFailed("cut") from error
    except OSError as error:  # aiohttp's ClientOSError too
        raise TryFailed("reset") from error
    except aiohttp.ClientError as error:
        raise TryFailed("garbled") from error


def _pause(rounds: int) -> float:
    """Seconds before the next try: none until every address was tried once, then twice as long each time, with jitter."""
    if not rounds:
        return 0.0
    return min(MOST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(rounds - 1, 16)) * random.uniform(0.5, 1)


def _socket(address: Any) -> socket.socket:
    """The socket of a connection upstream, with keep-alive: a machine that vanished is noticed within half a minute."""
    family, kind, protocol = address[:3]
    connection = socket.socket(family, kind, protocol)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


@asynccontextmanager
async def listening(config: GatewayConfig) -> AsyncIterator[tuple[str, Gateway]]:
    """A listening gateway and its URL. On exit it drains: no new connections, at most `drain_s` for running requests."""
    tls = tls_context(config)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_UPSTREAM_S, socket_factory=_socket)
    async with aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),  # an answer takes as long as it takes
        skip_auto_headers=("accept", "accept-encoding", "user-agent", "content-type"),
    ) as session:
        gateway = Gateway(config, session)
        # handler_cancellation: a client that leaves ends its handler, and so the request upstream
        server = BoundedServer(
            gateway.handle,
            ConnectionLimits(config.max_connections, config.max_connections_per_address),
            tls,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            keepalive_timeout=IDLE_CLIENT_S,
            lingering_time=LINGER_S,
        )
        gateway.server = server
        listener, sweeping = await server.listen(config.host, config.port), asyncio.create_task(server.sweep())
        try:
            host, port = listener.sockets[0].getsockname()[:2]
            yield f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}", gateway
            gateway.draining = True
            listener.close()
            deadline = time.monotonic() + config.drain_s
            while gateway.num_running and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
        finally:
            listener.close()
            sweeping.cancel()
            server.pre_shutdown()
            await server.shutdown(LAST_WRITE_S)


async def run(config: GatewayConfig, announce: Callable[[str], None]) -> None:
    """Run until SIGTERM or SIGINT, then drain; a second signal ends it at once. `announce` receives the URL."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    async with listening(config) as (url, _):
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        announce(url)
        await stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
