"""The gateway against an endpoint that fails in every way that a dying replica has, each on demand."""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from forge_ray.errors import ConfigError
from forge_ray.serve.gateway import Gateway, GatewayConfig, _pause, listening
from tests.certificates import write_certificate

pytestmark = pytest.mark.unit

CHAT = {"model": "bot", "messages": [{"role": "user", "content": "Hi"}]}
OWN = "x-forge-deployment: dep_1\r\n"


@dataclass
class Exchange:
    """One request as the endpoint saw it, and its connection."""

    head: str
    body: bytes
    writer: asyncio.StreamWriter
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def headers(self) -> dict[str, str]:
        lines = (line.partition(": ") for line in self.head.split("\r\n")[1:] if line)
        return {name.lower(): value for name, _, value in lines}


Act = Callable[[Exchange], Awaitable[None]]


class Endpoint:
    """Does the acts in order, one a request; the last again and again."""

    def __init__(self, *acts: Act) -> None:
        self.acts = list(acts)
        self.seen: list[Exchange] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ahead = b""
        try:
            while not writer.is_closing():
                head = (ahead + await reader.readuntil(b"\r\n\r\n")).decode()
                exchange = Exchange(head, b"", writer)
                exchange.body = await reader.readexactly(int(exchange.headers.get("content-length", 0)))
                self.seen.append(exchange)
                act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
                acting, disconnect = asyncio.create_task(act(exchange)), asyncio.create_task(reader.read(1))
                await asyncio.wait({acting, disconnect}, return_when=asyncio.FIRST_COMPLETED)
                if not acting.done():  # the client left
                    exchange.ended.set()
                acting.cancel()
                disconnect.cancel()
                _, ahead = await asyncio.gather(acting, disconnect, return_exceptions=True)
                if not isinstance(ahead, bytes):
                    ahead = b""
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Endpoint]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()


def reply(status: int = 200, body: bytes = b'{"ok":true}', head: str = OWN, kind: str = "application/json") -> Act:
    async def act(exchange: Exchange) -> None:
        text = f"HTTP/1.1 {status} Said\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{head}\r\n"
        exchange.writer.write(text.encode() + body)
        await exchange.writer.drain()

    return act


async def reset(exchange: Exchange) -> None:
    """RST in place of an answer."""
    connection = exchange.writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.writer.transport.abort()


async def close(exchange: Exchange) -> None:
    """FIN in place of an answer."""
    exchange.writer.close()


async def rubbish(exchange: Exchange) -> None:
    exchange.writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
    await exchange.writer.drain()
    exchange.writer.close()


async def half(exchange: Exchange) -> None:
    """A JSON answer whose connection is reset in the middle."""
    exchange.writer.write(
        f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n{OWN}\r\n{{".encode()
    )
    await exchange.writer.drain()
    await asyncio.sleep(0.02)
    await reset(exchange)


def events(*pieces: bytes, end: Act | None = None, pause: float = 0.02) -> Act:
    async def act(exchange: Exchange) -> None:
        head = (
            f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n{OWN}\r\n"
        )
        exchange.writer.write(head.encode())
        for piece in pieces:
            exchange.writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await exchange.writer.drain()
            await asyncio.sleep(pause)
        if end is not None:
            await end(exchange)
        else:
            exchange.writer.write(b"0\r\n\r\n")

    return act


async def never(exchange: Exchange) -> None:
    await asyncio.sleep(60)


def later(seconds: float, act: Act) -> Act:
    async def waited(exchange: Exchange) -> None:
        await asyncio.sleep(seconds)
        await act(exchange)

    return waited


@asynccontextmanager
async def between(
    *endpoints: Endpoint, before: str = "", **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Gateway]]:
    """A client of a gateway in front of the endpoints, and of the address `before` them."""
    async with AsyncExitStack() as open_:
        for endpoint in endpoints:
            await open_.enter_async_context(endpoint.listening())
        to = tuple(filter(None, (before, *(endpoint.url for endpoint in endpoints))))
        url, gateway = await open_.enter_async_context(listening(GatewayConfig(to=to, port=0, **settings)))
        yield await open_.enter_async_context(httpx.AsyncClient(base_url=url, trust_env=False, timeout=20)), gateway


def nobody() -> str:
    """An address that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def count(gateway: Gateway, family: str, **labels: str) -> float:
    return gateway._registry.get_sample_value(f"forge_gateway_{family}_total", labels) or 0.0


# ---------------------------------------------------------------- sent again


FAILURES: dict[str, Act] = {
    "reset": reset,
    "closed": close,
    "garbled": rubbish,
    "cut": half,
    "status_500": reply(500, b"Internal Server Error", head="", kind="text/plain"),
    "status_502": reply(502, b"", head=""),
    "status_503": reply(503, b"no server", head=""),
    "status_504": reply(504, b"", head=""),
    "adapter_unavailable": reply(503, b'{"error":{"code":"adapter_unavailable"}}'),
}


@pytest.mark.parametrize("reason", FAILURES)
def test_a_request_whose_replica_died_is_sent_again(reason: str) -> None:
    async def check() -> None:
        endpoint = Endpoint(FAILURES[reason], FAILURES[reason], reply(200, b'{"good":1}'))
        async with between(endpoint) as (client, gateway):
            answer = await client.post("/v1/chat/completions?a=b%2Fc", json=CHAT, headers={"authorization": "Bearer k"})
            assert (answer.status_code, answer.json()) == (200, {"good": 1})
            first, *others = endpoint.seen
            assert len(others) == 2
            assert first.head.startswith("POST /v1/chat/completions?a=b%2Fc HTTP/1.1")
            assert first.headers["authorization"] == "Bearer k"
            assert first.headers["x-request-id"].startswith("req_")
            for other in others:  # the same request, so that one id names all tries
                assert (other.head, json.loads(other.body)) == (first.head, CHAT)
            assert count(gateway, "retries", reason=reason) == 2
            assert count(gateway, "requests", status="200") == 1

    asyncio.run(check())


def test_unreachable_address_is_tried_last_for_a_while() -> None:
    async def check() -> None:
        alive = Endpoint(reply())
        async with between(alive, before=nobody()) as (client, gateway):
            for _ in range(3):
                assert (await client.get("/v1/models")).status_code == 200
            assert count(gateway, "retries", reason="unreachable") == 1
            assert len(alive.seen) == 3

        flawed, good = Endpoint(FAILURES["status_503"]), Endpoint(reply())
        async with between(flawed, good) as (client, _):
            started = time.monotonic()
            for _ in range(2):
                assert (await client.get("/v1/models")).status_code == 200
            assert (len(flawed.seen), len(good.seen)) == (2, 2)  # it answers, so it is asked first again
            assert time.monotonic() - started < 1

    asyncio.run(check())


def test_a_request_that_nobody_answers_ends_in_openais_shape() -> None:
    async def check() -> None:
        async with between(Endpoint(close), tries=3) as (client, gateway):
            answer = await client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "mine"})
            assert answer.status_code == 502
            error = answer.json()["error"]
            assert error["message"].startswith("no replica answered after 3 tries over 0.")
            assert "last: closed" in error["message"]
            assert (error["type"], error["code"]) == ("server_error", "no_replica")
            assert answer.headers["x-request-id"] == "mine"
            assert count(gateway, "failures", reason="closed") == 1
            assert count(gateway, "requests", status="502") == 1
        async with between(before=nobody(), tries=1000, retry_s=0.3) as (client, _):
            started = time.monotonic()
            assert "last: unreachable" in (await client.get("/v1/models")).json()["error"]["message"]
            assert time.monotonic() - started < 1

    asyncio.run(check())


def test_the_time_for_tries_begins_with_the_first_failure() -> None:
    async def check() -> None:
        endpoint = Endpoint(later(0.4, reset), reply())
        async with between(endpoint, retry_s=0.2) as (client, _):
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200

    asyncio.run(check())


def test_pauses_grow_and_differ() -> None:
    assert _pause(0) == 0
    assert all(0.025 <= _pause(1) <= 0.05 for _ in range(50))
    assert len({_pause(3) for _ in range(10)}) > 1
    assert 1 <= _pause(1000) <= 2


# ---------------------------------------------------------------- passed through


@pytest.mark.parametrize(
    "act",
    [
        reply(429, b'{"error":{"code":"overloaded"}}', head=OWN + "retry-after: 7\r\n"),
        reply(500, b'{"error":{"code":"internal_error"}}'),
        reply(503, b'{"error":{"code":"engine"}}'),
        reply(404, b"not here", head="", kind="text/plain"),
        reply(200, gzip.compress(b"{}"), head=OWN + "content-encoding: gzip\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n"),
    ],
    ids=["429", "our 500", "our 503", "404", "compressed"],
)
def test_an_answer_is_passed_on_as_it_is(act: Act) -> None:
    async def check() -> None:
        endpoint, direct = Endpoint(act), Endpoint(act)
        async with between(endpoint) as (client, gateway), direct.listening():
            through = await client.post("/v1/x", json=CHAT)
            plain = httpx.AsyncClient(base_url=direct.url, trust_env=False)
            expected = await plain.post("/v1/x", json=CHAT)
            await plain.aclose()
            assert len(endpoint.seen) == 1
            assert (through.status_code, through.reason_phrase) == (expected.status_code, "Said")
            assert through.content == expected.content
            kept = [item for item in through.headers.multi_items() if item[0] not in ("date", "server")]
            assert sorted(kept) == sorted(expected.headers.multi_items())
            assert count(gateway, "requests", status=str(expected.status_code)) == 1

    asyncio.run(check())


def test_headers_of_the_hop_stay_behind() -> None:
    async def check() -> None:
        endpoint = Endpoint(reply(head=OWN + "connection: x-hop\r\nx-hop: 1\r\n"))
        async with between(endpoint) as (client, _):
            sent = {"connection": "close, x-private", "x-private": "1", "te": "trailers", "upgrade": "h2c"}
            more = {"x-forwarded-for": "10.0.0.9", "x-request-id": "abc", "accept-encoding": "br", "user-agent": "mine"}
            answer = await client.get("/v1/models", headers=sent | more)
            seen = endpoint.seen[0].headers
            assert not {"x-private", "te", "upgrade", "content-type"} & set(seen)
            assert seen["x-forwarded-for"] == "10.0.0.9, 127.0.0.1"
            assert seen["x-forwarded-proto"] == "http"
            assert seen["x-forwarded-host"] == str(client.base_url).removeprefix("http://").rstrip("/")
            assert (seen["x-request-id"], seen["accept-encoding"], seen["user-agent"]) == ("abc", "br", "mine")
            assert "x-hop" not in answer.headers

    asyncio.run(check())


def test_head_and_empty_answers() -> None:
    async def head_only(exchange: Exchange) -> None:
        exchange.writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: 77\r\n{OWN}\r\n".encode())

    async def none(exchange: Exchange) -> None:
        exchange.writer.write(f"HTTP/1.1 204 No Content\r\n{OWN}\r\n".encode())

    async def check() -> None:
        async with between(Endpoint(head_only, none, reply())) as (client, _):
            answer = await client.head("/v1/models")
            assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "77", b"")
            assert (await client.delete("/v1/x")).status_code == 204
            assert (await client.get("/v1/x")).json() == {"ok": True}

    asyncio.run(check())


def test_an_answer_too_large_to_hold_is_passed_on_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_late(head: str, body: bytes) -> Act:
        async def act(exchange: Exchange) -> None:
            exchange.writer.write(f"HTTP/1.1 200 OK\r\n{head}\r\n{OWN}\r\n".encode() + body)
            await exchange.writer.drain()
            await asyncio.sleep(0.05)
            await reset(exchange)

        return act

    async def check() -> None:
        counted = broken_late("content-length: 5000", b"x" * 3000)
        chunked = broken_late("transfer-encoding: chunked", b"bb8\r\n" + b"x" * 3000 + b"\r\n")
        endpoint = Endpoint(reply(body=b"y" * 5000), counted, chunked)
        async with between(endpoint) as (client, gateway):
            assert (await client.get("/v1/x")).content == b"y" * 5000
            for _ in range(2):
                with pytest.raises(httpx.TransportError):  # no end that looks like one
                    await client.get("/v1/x")
            assert len(endpoint.seen) == 3
            assert count(gateway, "failures", reason="begun_cut") == 2

    monkeypatch.setattr("forge_ray.serve.gateway.MAX_HELD", 1000)
    asyncio.run(check())


# ---------------------------------------------------------------- streams


def test_a_stream_is_passed_on_as_it_comes() -> None:
    async def check() -> None:
        pieces = [b"data: %d\n\n" % number for number in range(3)] + [b"data: [DO", b"NE]\n\n"]
        async with (
            between(Endpoint(events(*pieces, pause=0.15))) as (client, _),
            client.stream("POST", "/v1/chat/completions", json=CHAT) as answer,
        ):
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            times, content = [], b""
            async for piece in answer.aiter_raw():
                times.append(time.monotonic())
                content += piece
            assert content == b"".join(pieces)
            assert len(times) >= 4
            assert times[-1] - times[0] > 0.4  # not held until its end

    asyncio.run(check())


def test_a_stream_that_has_not_begun_is_sent_again() -> None:
    async def check() -> None:
        endpoint = Endpoint(events(end=reset), events(b"data: [DONE]\n\n"))
        async with between(endpoint) as (client, _):
            assert (await client.post("/v1/chat/completions", json=CHAT)).text == "data: [DONE]\n\n"
            assert len(endpoint.seen) == 2

    asyncio.run(check())


@pytest.mark.parametrize("end", [reset, close], ids=["reset", "closed"])
def test_a_stream_that_breaks_ends_with_an_error_and_is_not_sent_again(end: Act) -> None:
    async def check() -> None:
        endpoint = Endpoint(events(b'data: {"n":1}\n\n', b'data: {"n":', end=end), reply())
        async with between(endpoint) as (client, gateway):
            answer = await client.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 200
            lines = [line for line in answer.text.split("\n") if line]
            assert lines[0] == 'data: {"n":1}'
            (error,) = [json.loads(line.removeprefix("data: "))["error"] for line in lines[1:]]  # and no half an event
            assert error["code"] == "broken_stream"
            assert len(endpoint.seen) == 1
            follow = await client.get("/v1/models")  # what a client sends next is not lost
            ours, before = (
                response.extensions["network_stream"].get_extra_info("client_addr") for response in (follow, answer)
            )
            assert ours == before
            assert sum(count(gateway, "failures", reason=f"begun_{kind}") for kind in ("cut", "reset")) == 1

    asyncio.run(check())


@pytest.mark.parametrize("begun", [False, True], ids=["before", "during"])
def test_a_client_that_leaves_cancels_the_request_upstream(begun: bool) -> None:
    async def check() -> None:
        endpoint = Endpoint(events(b"data: 1\n\n", end=never) if begun else never)
        async with between(endpoint) as (client, gateway):
            if begun:
                async with client.stream("POST", "/v1/chat/completions", json=CHAT) as answer:
                    await anext(answer.aiter_raw())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    await client.post("/v1/chat/completions", json=CHAT, timeout=0.2)
            await asyncio.wait_for(endpoint.seen[0].ended.wait(), 1)
            assert len(endpoint.seen) == 1
            assert count(gateway, "requests", status="499") == 1
            assert gateway.num_running == 0

    asyncio.run(check())


# ---------------------------------------------------------------- the gateway's own answers


def test_a_body_is_read_up_to_a_bound() -> None:
    async def check() -> None:
        endpoint = Endpoint(reply())

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(40):
                yield b"x" * 1000

        async with between(endpoint, max_body_bytes=30_000) as (client, _):
            for content in (b"x" * 40_000, pieces()):  # declared, and not
                answer = await client.post("/v1/x", content=content)
                assert answer.status_code == 413
                assert answer.json()["error"]["code"] == "request_too_large"
                assert "30000" in answer.json()["error"]["message"]
            assert all(one.head.startswith("GET /health ") for one in endpoint.seen)  # whether the key is valid
        large = b"z" * 3_000_000
        async with between(endpoint) as (client, _):
            answer = await client.post("/v1/x", content=large, headers={"content-encoding": "gzip"})  # no matter what it is
            assert answer.status_code == 200
            assert endpoint.seen[-1].body == large

    asyncio.run(check())


def test_expect_100_continue_is_answered() -> None:
    async def check() -> None:
        endpoint = Endpoint(reply())
        async with between(endpoint) as (client, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            writer.write(b"POST /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")
            assert await asyncio.wait_for(reader.readline(), 2) == b"HTTP/1.1 100 Continue\r\n"
            writer.write(b"{}")
            assert b"200 Said" in await asyncio.wait_for(reader.readuntil(b"ok"), 2)
            assert "expect" not in endpoint.seen[0].headers
            writer.close()

    asyncio.run(check())


def test_malformed_requests_are_refused() -> None:
    async def check() -> None:
        endpoint = Endpoint(reply())
        async with between(endpoint) as (client, _):
            for head in (b"GET http://elsewhere/ HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nx-name: Ren\xe9\r\n"):
                reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
                writer.write(head + b"host: a\r\nconnection: close\r\n\r\n")
                answer = await asyncio.wait_for(reader.read(), 2)
                assert answer.startswith(b"HTTP/1.1 400"), answer
                assert b'"invalid_request_error"' in answer
                writer.close()
            assert not endpoint.seen

    asyncio.run(check())


def test_health_and_metrics_are_its_own() -> None:
    async def check() -> None:
        endpoint = Endpoint(close, reply())
        async with between(endpoint) as (client, gateway):
            await client.post("/v1/chat/completions", json=CHAT)
            assert (await client.get("/-/gateway/health")).json() == {"status": "ok", "running": 0}
            metrics = (await client.get("/-/gateway/metrics")).text
            assert 'forge_gateway_retries_total{reason="closed"} 1.0' in metrics
            assert 'forge_gateway_requests_total{status="200"} 1.0' in metrics
            assert len(endpoint.seen) == 2
            assert (await client.get("/-/healthz")).json() == {"ok": True}  # all else is the endpoint's
            gateway.draining = True
            assert (await client.get("/-/gateway/health")).status_code == 503

    asyncio.run(check())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": ()}, "no endpoint"),
        ({"to": ("127.0.0.1:8000",)}, "is not a base URL"),
        ({"to": ("ftp://a",)}, "is not a base URL"),
        ({"to": ("http://a?b=c",)}, "is not a base URL"),
        ({"tls_cert": "a.pem"}, "certificate and its key"),
        ({"tries": 0}, "tries=0"),
        ({"drain_s": -1}, "drain_s=-1"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        GatewayConfig(**({"to": ("http://a",)} | settings))
    assert caught.value.hint


def test_a_port_or_certificate_that_cannot_be_used(tmp_path: Path) -> None:
    async def start(**settings: Any) -> None:
        async with listening(GatewayConfig(to=("http://a",), **settings)):
            pass

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen"):
            asyncio.run(start(port=taken.getsockname()[1]))
    with pytest.raises(ConfigError, match="cannot be used"):
        asyncio.run(start(tls_cert=str(tmp_path / "no.pem"), tls_key=str(tmp_path / "no.key"), port=0))


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A self-signed certificate of 127.0.0.1, and its key."""
    return write_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def commands() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_the_command_drains_at_sigterm(certificate: tuple[str, str], commands: list[subprocess.Popen[str]]) -> None:
    import ssl

    async def check() -> None:
        cert, key = certificate
        async with Endpoint(later(0.7, reply())).listening() as endpoint:
            words = ["gateway", "--to", endpoint.url, "--port", "0", "--tls-cert", cert, "--tls-key", key, "--json"]
            process = subprocess.Popen([sys.executable, "-m", "forge_ray.cli", *words], stdout=subprocess.PIPE, text=True)
            commands.append(process)
            assert process.stdout is not None
            announced = json.loads(await asyncio.to_thread(process.stdout.readline))
            assert announced["to"] == [endpoint.url]
            async with httpx.AsyncClient(
                base_url=announced["url"], verify=ssl.create_default_context(cafile=cert), trust_env=False
            ) as client:
                running = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
                while not endpoint.seen:
                    await asyncio.sleep(0.01)
                assert endpoint.seen[0].headers["x-forwarded-proto"] == "https"
                process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.3)
                with pytest.raises(httpx.ConnectError):
                    await client.get("/-/gateway/health")  # the running one has the only open connection
                answer = await running
                assert answer.json() == {"ok": True}
                assert answer.headers["connection"] == "close"
            assert await asyncio.to_thread(process.wait, 10) == 0

    asyncio.run(check())


def test_draining_is_bounded() -> None:
    async def check() -> None:
        endpoint = Endpoint(never)
        started = time.monotonic()
        async with between(endpoint, drain_s=0.2) as (client, _):
            waiting = asyncio.create_task(client.get("/v1/x"))
            while not endpoint.seen:
                await asyncio.sleep(0.01)
        assert time.monotonic() - started < 3
        with pytest.raises((httpx.HTTPError, RuntimeError)):
            await waiting

    asyncio.run(check())
