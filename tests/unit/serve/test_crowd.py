"""The clients of the benchmark of an overload: what they send, and what they say of an answer."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
crowd: Any = importlib.import_module("crowd")

pytestmark = pytest.mark.unit
EVENT = b'data: {"choices": []}\n\n'
DONE = b"data: [DONE]\n\n"
OK = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
REFUSED = b'HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\n{"a"'


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def asked(pieces: Callable[[int], list[bytes]], clients: int = 1, seconds: float = 0.5, back_s: float = 0.05) -> Any:
    """The outcomes, and (connection, prompt) of each request; `pieces(number)` answer the request of that number, and b""
    closes the connection."""
    requests: list[tuple[int, bytes]] = []
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        own = connections
        while head := (await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""):
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            requests.append((own, await reader.readexactly(length)))
            for piece in pieces(len(requests)):
                if not piece:
                    writer.close()
                    return
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.005)

    async def everything() -> Any:
        async def quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await answer(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()

        server = await asyncio.start_server(quiet, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        numbers = iter(range(1000))
        new = lambda: crowd.request_bytes(url, "/v1/completions", {"prompt": [next(numbers)]})  # noqa: E731
        outcomes = await crowd.press(url, new, clients, seconds, back_s)
        server.close()
        await asyncio.sleep(0.02)  # the server sees that its clients left
        return outcomes

    outcomes = asyncio.run(everything())
    return outcomes, [(connection, json.loads(body)["prompt"][0]) for connection, body in requests]


def test_a_refused_client_returns_with_the_same_bytes_on_the_same_connection() -> None:
    outcomes, requests = asked(lambda _: [REFUSED[:20], REFUSED[20:45], REFUSED[45:]])
    assert len(outcomes) >= 2
    assert {(outcome.status, outcome.is_whole) for outcome in outcomes} == {(429, True)}
    assert all(0 < outcome.first_s <= outcome.total_s for outcome in outcomes)
    assert set(requests) == {(1, 0)}


def test_a_client_that_was_answered_asks_something_else_at_once() -> None:
    stream = OK + chunk(EVENT) + chunk(DONE) + b"0\r\n\r\n"
    outcomes, requests = asked(lambda _: [stream[:10], stream[10:-3], stream[-3:]], back_s=100.0)
    assert len(outcomes) >= 2
    assert {(outcome.status, outcome.is_whole) for outcome in outcomes} == {(200, True)}
    assert requests[:2] == [(1, 0), (1, 1)]


def test_a_stream_without_its_end_is_not_whole() -> None:
    outcomes, _ = asked(lambda _: [OK + chunk(EVENT) + b"0\r\n\r\n"])
    assert {(outcome.status, outcome.is_whole) for outcome in outcomes} == {(200, False)}


def test_a_refusal_that_is_cut_off_is_not_whole() -> None:
    outcomes, _ = asked(lambda _: [REFUSED[:-1], b""])
    assert {(outcome.status, outcome.is_whole) for outcome in outcomes} == {(429, False)}


def test_a_connection_that_is_closed_before_the_answer_is_a_failure_and_another_is_opened() -> None:
    outcomes, requests = asked(
        lambda number: [b""] if number == 1 else [OK + chunk(EVENT), b""] if number == 2 else [REFUSED]
    )
    assert [(outcome.status, outcome.is_whole) for outcome in outcomes[:2]] == [(0, False), (200, False)]
    assert outcomes[2].status == 429
    assert [connection for connection, _ in requests[:3]] == [1, 2, 3]


def test_all_come_at_once() -> None:
    outcomes, requests = asked(lambda _: [REFUSED], clients=8, back_s=1.0)
    assert len(outcomes) == 8
    assert {prompt for _, prompt in requests} == set(range(8))
    assert {connection for connection, _ in requests} == set(range(1, 9))
