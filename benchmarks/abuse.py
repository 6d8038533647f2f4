"""What others notice of one client's abuse: p99 of their requests before and during each attack. A row of serve.py:

    python benchmarks/serve.py --rows abuse --engines transformers --seconds 10

Others and attacker have keys of one endpoint behind `forge gateway`; the attacker's allows one request at a time, and its
address is 127.0.0.9, so that limits by address tell the two apart. An attack is a process of its own:

    python benchmarks/abuse.py NAME '{"host": …, "port": …, "key": …}'        until it is ended
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

HERE = Path(__file__).parent
ADDRESS = "127.0.0.9"  # of the attacker
MODEL = "measured"
REQUEST_S = 60.0
PAUSE_S = 0.02  # of an attacker whose connection was closed
REFUSED_S = 1.0  # of one of many hundred connections


@dataclass(frozen=True)
class Target:
    """Where an attack goes, and the attacker's key."""

    host: str
    port: int
    key: str
    tls: bool = False

    def head(self, path: str, size: int, method: str = "POST") -> bytes:
        lines = (f"{method} {path} HTTP/1.1", "host: 127.0.0.1", f"authorization: Bearer {self.key}")
        return ("\r\n".join((*lines, "content-type: application/json", f"content-length: {size}")) + "\r\n\r\n").encode()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port, local_addr=(ADDRESS, 0))


async def _again_and_again(
    target: Target, act: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]], pause_s: float
) -> None:
    """One connection after the other, each as long as the other side bears it."""
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await target.connect()
            try:
                await act(reader, writer)
            finally:
                writer.close()
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))


async def _many(count: int, target: Target, act: Callable[..., Awaitable[Any]], pause_s: float = PAUSE_S) -> None:
    await asyncio.gather(*(_again_and_again(target, act, pause_s) for _ in range(count)))


async def endless_head(target: Target) -> None:
    """A header that does not end, on eight connections."""

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: a\r\nx: ")
        while not reader.at_eof():
            writer.write(b"y" * 4096)
            await writer.drain()
            await asyncio.sleep(PAUSE_S)

    await _many(8, target, act)


async def many_headers(target: Target) -> None:
    """A thousand headers of 1 KiB, on eight connections."""
    headers = b"".join(b"x-%d: %s\r\n" % (number, b"y" * 1024) for number in range(1000))

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n" + headers + b"\r\n")
        await writer.drain()
        await reader.read()

    await _many(8, target, act)


async def slow_bodies(target: Target) -> None:
    """Seventy bodies of which one byte comes."""

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(target.head("/v1/chat/completions", 100) + b"{")
        await reader.read()

    await _many(70, target, act)


async def large_bodies(target: Target) -> None:
    """Forty bodies of 15.9 MB that do not end."""

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(target.head("/v1/chat/completions", 15_900_000))
        for _ in range(240):
            writer.write(b" " * (1 << 16))
            await writer.drain()
            await asyncio.sleep(PAUSE_S)
        await reader.read()

    await _many(40, target, act)


async def _post(target: Target, path: str, body: bytes, stay_s: float) -> Callable[..., Awaitable[None]]:
    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(target.head(path, len(body)) + body)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(1), stay_s)

    return act


async def embeddings(target: Target) -> None:
    """2,048 inputs to embed, by a client that leaves after a second and comes back."""
    body = json.dumps({"model": MODEL, "input": ["the quick brown fox jumps over the lazy dog"] * 2048}).encode()
    await _many(1, target, await _post(target, "/v1/embeddings", body, 1.0))


async def tokenize(target: Target) -> None:
    """Texts of 4 MB to tokenise, two at a time."""
    words = random.Random(0).choices(["alpha", "beta", "gamma", "delta"], k=640_000)
    body = json.dumps({"model": MODEL, "prompt": " ".join(words)}).encode()
    await _many(2, target, await _post(target, "/tokenize", body, REQUEST_S))


async def half_open(target: Target) -> None:
    """1,500 connections with half a head; those that are closed come back after a second."""

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost:")
        await reader.read()

    await _many(1500, target, act, REFUSED_S)


async def handshakes(target: Target) -> None:
    """1,500 TLS handshakes that do not go on; those that are closed come back after a second."""

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x16\x03\x01\x02\x00\x01")
        await reader.read()

    await _many(1500, target, act, REFUSED_S)


ATTACKS: dict[str, tuple[Callable[[Target], Coroutine[Any, Any, None]], str]] = {
    "endless_head": (endless_head, "a header without end"),
    "many_headers": (many_headers, "1,000 headers of 1 KiB"),
    "slow_bodies": (slow_bodies, "70 bodies of one byte"),
    "embeddings": (embeddings, "2,048 inputs to embed, abandoned"),
    "tokenize": (tokenize, "4 MB to tokenise"),
    "large_bodies": (large_bodies, "40 bodies of 15.9 MB without end"),
    "half_open": (half_open, "1,500 half-open connections"),
    "handshakes": (handshakes, "1,500 unfinished TLS handshakes"),
}


@dataclass(frozen=True)
class Noticed:
    """Requests of others during some seconds: those answered, in seconds each, and how many were not; and the share of one
    core that the gateway took."""

    seconds: list[float]
    failed: int
    gateway: float

    @property
    def p99(self) -> float:
        return sorted(self.seconds)[min(int(len(self.seconds) * 0.99), len(self.seconds) - 1)] if self.seconds else REQUEST_S


async def others(url: str, key: str, cafile: str, seconds: float, process: int) -> Noticed:
    """One request for one token after the other, each on a connection of its own. `process`: the gateway's."""
    spent, started = _processor_s(process), time.perf_counter()
    tls = ssl.create_default_context(cafile=cafile) if cafile else None
    answered: list[float] = []
    failed, end = 0, time.perf_counter() + seconds
    payload = {"model": MODEL, "prompt": "Where is my parcel?", "max_tokens": 1, "temperature": 0}
    headers = {"authorization": f"Bearer {key}"}
    timeout = aiohttp.ClientTimeout(total=REQUEST_S)
    connector = aiohttp.TCPConnector(force_close=True, ssl=tls or True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
        while time.perf_counter() < end:
            begun = time.perf_counter()
            try:
                async with session.post(f"{url}/v1/completions", json=payload) as response:
                    await response.read()
                    good = response.status == 200
            except (aiohttp.ClientError, OSError, TimeoutError):
                good = False
            if good:
                answered.append(time.perf_counter() - begun)
            else:
                failed += 1
                await asyncio.sleep(PAUSE_S)
    return Noticed(answered, failed, (_processor_s(process) - spent) / (time.perf_counter() - started))


def _processor_s(process: int) -> float:
    times = psutil.Process(process).cpu_times()
    return float(times.user + times.system)


@contextmanager
def gateway(to: str, *options: str) -> Iterator[tuple[str, int]]:
    """`forge gateway` before an endpoint; its URL and its process."""
    command = [sys.executable, "-m", "forge_ray.cli", "gateway", "--to", to, "--port", "0", "--json", "--drain-s", "1"]
    running = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert running.stdout is not None
        yield str(json.loads(running.stdout.readline())["url"]), running.pid
    finally:
        running.terminate()
        running.wait(30)


@contextmanager
def attack(name: str, target: Target) -> Iterator[None]:
    """The attack, from two seconds after its start on."""
    running = subprocess.Popen([sys.executable, __file__, name, json.dumps(vars(target))])
    try:
        time.sleep(2)
        assert running.poll() is None, f"the attack {name} ended with {running.returncode}"
        yield
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()


def measured(url: str, keys: dict[str, str], seconds: float, names: list[str]) -> Iterator[tuple[str, Noticed, Noticed]]:
    """(attack, before, during) of each; after each the endpoint has some seconds of rest."""
    sys.path.insert(0, str(HERE.parent))
    from tests.certificates import write_certificate

    with tempfile.TemporaryDirectory() as folder:
        cert, key = write_certificate(Path(folder))
        with gateway(url) as plain, gateway(url, "--tls-cert", cert, "--tls-key", key) as secure:
            for name in names:
                (front, pid), cafile = (secure, cert) if name == "handshakes" else (plain, "")
                host, port = front.partition("://")[2].rsplit(":", 1)
                asyncio.run(others(front, keys["others"], cafile, 2, pid))
                before = asyncio.run(others(front, keys["others"], cafile, seconds, pid))
                with attack(name, Target(host, int(port), keys["attacker"], bool(cafile))):
                    during = asyncio.run(others(front, keys["others"], cafile, seconds, pid))
                yield name, before, during
                time.sleep(3)


if __name__ == "__main__":
    asyncio.run(ATTACKS[sys.argv[1]][0](Target(**json.loads(sys.argv[2]))))
