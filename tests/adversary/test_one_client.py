"""One client, with a key or without, must not stop an endpoint for the others: the ASGI application and the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import ssl
import time
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import ASGIApp

from forge_ray.config.base import parse
from forge_ray.config.release import AliasRoute, DeployConfig
from forge_ray.serve import bodies, connections, embeddings, entry, gateway
from forge_ray.serve.context import Caller, Chosen, ServingContext
from forge_ray.serve.directory import ReplicaDirectory, Snapshot
from forge_ray.serve.http import replica_app
from forge_ray.serve.keys import ApiKey, sha256_of
from forge_ray.serve.limits import Counters
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.metrics import Metrics
from forge_ray.serve.openai import ApiError
from forge_ray.serve.routing import RoutingInputs, ServedVersion, Table
from tests.certificates import write_certificate

pytestmark = pytest.mark.unit


def text_of(number: int) -> str:
    return f"fk_{number:012x}_" + "x" * 43


def key(number: int, **more: Any) -> ApiKey:
    values: dict[str, Any] = {"name": f"app{number}", "models": ("*",)}
    return ApiKey(id=f"fk_{number:012x}", sha256=sha256_of(text_of(number)), **(values | more))


KEYS = {1: key(1, concurrency=1), 2: key(2), 3: key(3, rpm=3), 4: key(4, tpm=50)}


class Tokenizer:
    """One token per character; counts the characters that it was handed."""

    vocab_size = 1000

    def __init__(self) -> None:
        self.characters = 0

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        self.characters += sum(map(len, texts))
        return [[1] * len(text) for text in texts]

    def token_bytes(self, token_id: int) -> bytes:
        return b"a"


class Engine:
    """Embeds; remembers the batches."""

    max_request_tokens = 100
    lacks: dict[str, str] = {}

    def __init__(self) -> None:
        self.batches: list[int] = []

    def embed(self, inputs: Any, adapter: str = "") -> list[list[float]]:
        import time

        self.batches.append(len(inputs))
        time.sleep(0.05)
        return [[1.0, 0.0] for _ in inputs]

    def health(self) -> Any:
        return SimpleNamespace(num_waiting=0, num_running=0)


class Names:
    def __init__(self) -> None:
        engine: Any = Engine()
        tokenizer: Any = Tokenizer()
        self.loaded: Any = Loaded("mv_1", "sha256:" + "0" * 64, engine, "", tokenizer, (2,))

    def stable(self, name: str, caller: Caller) -> Any:
        return self.loaded

    async def choose(self, name: str, caller: Caller, inputs: RoutingInputs) -> Chosen:
        return Chosen(name, self.loaded)

    def cards(self, caller: Caller) -> list[dict[str, Any]]:
        return [{"id": "m", "object": "model"}]


class Served:
    """A replica's application over scripted names."""

    def __init__(self, with_keys: bool = True, **settings: Any) -> None:
        self.names = Names()
        config = parse(DeployConfig, {"name": "bot", "models": ["m"], **settings})
        metrics = Metrics("bot", "r0")
        context = ServingContext(config, "dep_0", self.names, metrics)
        counters = Counters()
        keys = {one.sha256: one for one in KEYS.values()}
        current = (lambda: keys) if with_keys else None
        self.app: ASGIApp = replica_app(context, current, counters.take, counters.settle, "r0", list, None)


class Exchange:
    """One request to an ASGI application, whose body is sent as the test likes."""

    def __init__(
        self, app: ASGIApp, path: str, number: int = 0, headers: dict[str, str] | None = None, method: str = "POST"
    ):
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.num_read = 0
        self.status, self.headers, self.body = 0, {}, b""
        names = {"host": "localhost:8000", "content-type": "application/json", **(headers or {})}
        if number:
            names["authorization"] = f"Bearer {text_of(number)}"
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in names.items()],
            "client": ("127.0.0.1", 5),
            "server": ("127.0.0.1", 80),
            "scheme": "http",
            "root_path": "",
        }
        self.scope: Any = scope
        self.task = asyncio.create_task(app(scope, self.receive, self.send))

    async def receive(self) -> Any:
        message = await self.messages.get()
        self.num_read += len(message.get("body", b""))
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        self.body += message.get("body", b"")

    def feed(self, body: bytes, more: bool = False) -> Exchange:
        self.messages.put_nowait({"type": "http.request", "body": body, "more_body": more})
        return self

    def leave(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})

    async def answered(self, seconds: float = 10) -> Exchange:
        await asyncio.wait_for(self.task, seconds)
        return self


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


TOKENIZE = body(prompt="hello")


# ---------------------------------------------------------------- bodies


def test_bodies_that_do_not_arrive_hold_no_place_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "IDLE_S", 0.5)

    async def check() -> None:
        app = Served(limits={"max_queued_requests": 4}).app
        attack = [Exchange(app, "/tokenize", 1).feed(b"{", more=True) for _ in range(70)]
        await asyncio.sleep(0.05)
        other = await Exchange(app, "/tokenize", 2).feed(TOKENIZE).answered()
        assert other.status == 200
        own = [one for one in attack if not one.task.done()]
        assert len(own) == bodies.READ_BY_ONE  # the others of this key were refused, at once
        ended = [await one.answered() for one in attack]
        assert sorted({one.status for one in ended}) == [408, 429]
        assert all(one.headers["connection"] == "close" for one in ended if one.status == 408)
        assert (await Exchange(app, "/tokenize", 1).feed(TOKENIZE).answered()).status == 200

    asyncio.run(check())


def test_body_is_not_read_without_a_valid_key_and_the_connection_is_closed() -> None:
    async def check() -> None:
        app = Served().app
        for headers in ({"content-length": "3000000000"}, {"transfer-encoding": "chunked"}):
            refused = await Exchange(app, "/v1/chat/completions", 99, headers).feed(b"x" * 1000, more=True).answered()
            assert (refused.status, refused.num_read, refused.headers["connection"]) == (401, 0, "close")
        small = await Exchange(app, "/v1/chat/completions", 99, {"content-length": "20"}).answered()
        assert small.status == 401
        assert "connection" not in small.headers

    asyncio.run(check())


@pytest.mark.parametrize("declared", [True, False])
def test_large_bodies_of_one_caller_are_taken_at_a_pace(declared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and parsing what is then refused costs time of others: large bodies of one key have their turns."""
    monkeypatch.setattr(bodies, "PACE", 1 << 20)
    large = body(prompt="x" * (400 << 10))

    async def check() -> None:
        app = Served().app
        headers = {"content-length": str(len(large))} if declared else {"transfer-encoding": "chunked"}
        begun = time.monotonic()
        for _ in range(2):
            assert (await Exchange(app, "/tokenize", 2, headers).feed(large).answered()).status == 400
        first = time.monotonic() - begun
        assert (await Exchange(app, "/tokenize", 4).feed(TOKENIZE).answered()).status == 200  # another key
        small = {"content-length": str(len(TOKENIZE))}
        assert (await Exchange(app, "/tokenize", 2, small).feed(TOKENIZE).answered()).status == 200
        assert time.monotonic() - begun - first < 0.35
        assert first > 0.39  # the second waits until the first had its time
        assert (await Exchange(app, "/tokenize", 2, headers).feed(large).answered()).status == 400
        assert time.monotonic() - begun > 0.78

    asyncio.run(check())


def test_declared_size_is_refused_before_a_byte_is_read() -> None:
    async def check() -> None:
        refused = await Exchange(Served().app, "/tokenize", 2, {"content-length": "99999999"}).feed(b"x", True).answered()
        assert (refused.status, refused.num_read, refused.headers["connection"]) == (413, 0, "close")

    asyncio.run(check())


def test_two_authorization_headers_are_refused() -> None:
    async def check() -> None:
        exchange = Exchange(Served().app, "/v1/models", 1, method="GET")
        exchange.scope["headers"].insert(0, (b"authorization", f"Bearer {text_of(99)}".encode()))
        assert (await exchange.feed(b"").answered()).status == 401

    asyncio.run(check())


# ---------------------------------------------------------------- tokenising and embeddings


def test_text_that_cannot_fit_is_refused_before_it_is_tokenised() -> None:
    async def check() -> None:
        served = Served()
        large = "x" * 13_000  # of 100 tokens with at most 128 characters each
        for path, fields in (
            ("/tokenize", {"prompt": large}),
            ("/v1/completions", {"prompt": large}),
            ("/v1/embeddings", {"input": ["x", large]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": large}]}),
            ("/detokenize", {"tokens": [1] * 101}),
        ):
            refused = await Exchange(served.app, path, 2).feed(body(**fields)).answered()
            assert (refused.status, json.loads(refused.body)["error"]["code"]) == (400, "context_length_exceeded"), path
        assert served.names.loaded.tokenizer.characters == 0

    asyncio.run(check())


def test_tokenising_counts_in_the_limits_of_its_key() -> None:
    async def check() -> None:
        served = Served()
        statuses = [(await Exchange(served.app, "/tokenize", 3).feed(TOKENIZE).answered()).status for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        assert served.names.loaded.tokenizer.characters == 3 * len("hello")  # what is refused is not tokenised
        sizes = [
            (await Exchange(served.app, "/tokenize", 4).feed(body(prompt="x" * 20)).answered()).status for _ in range(3)
        ]
        assert sizes == [200, 200, 429]  # 50 tokens a minute

    asyncio.run(check())


def test_prompts_refused_as_too_long_count_as_requests() -> None:
    async def check() -> None:
        app, long = Served().app, body(prompt="x" * 120)  # 120 tokens; the context has 100
        statuses = [(await Exchange(app, "/v1/completions", 3).feed(long).answered()).status for _ in range(4)]
        assert statuses == [400, 400, 400, 429]

    asyncio.run(check())


def test_embeddings_end_when_their_client_leaves() -> None:
    async def check() -> None:
        served = Served()
        exchange = Exchange(served.app, "/v1/embeddings", 1).feed(body(input=["text"] * 2048))
        await asyncio.sleep(0.3)
        assert (await Exchange(served.app, "/tokenize", 1).feed(TOKENIZE).answered()).status == 429  # concurrency 1
        exchange.leave()
        await exchange.answered(2)
        batches = len(served.names.loaded.engine.batches)
        assert sum(served.names.loaded.engine.batches) < 2048 / 2
        await asyncio.sleep(0.2)
        assert len(served.names.loaded.engine.batches) == batches
        assert (await Exchange(served.app, "/tokenize", 1).feed(TOKENIZE).answered()).status == 200  # its place is free

    asyncio.run(check())


def test_batches_of_embeddings_are_as_large_as_a_moment_allows() -> None:
    """What generates waits for the end of a batch; the first tells how fast this engine is."""

    async def check() -> None:
        served = Served()
        exchange = Exchange(served.app, "/v1/embeddings", 2).feed(body(input=["text"] * 40))
        assert (await exchange.answered()).status == 200
        first, *rest = served.names.loaded.engine.batches
        assert first == embeddings.FIRST_BATCH_TOKENS // len("text")
        assert max(rest) <= first * embeddings.BATCH_S / 0.05  # seconds that this engine takes for any batch
        assert sum(served.names.loaded.engine.batches) == 40

    asyncio.run(check())


# ---------------------------------------------------------------- web pages and an endpoint without keys


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.1:1"}, 200),
        ({"host": "[::1]:8000", "origin": "http://localhost:3000"}, 200),
        ({"host": "box.lan"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": "localhost.evil.example:8000"}, 421),
        ({"host": "localhost@evil.example"}, 421),
        ({"x-forwarded-host": "evil.example, localhost"}, 421),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "https://127.0.0.1.evil.example"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_web_page_cannot_use_an_endpoint_without_keys(headers: dict[str, str], status: int) -> None:
    async def check() -> None:
        app = Served(with_keys=False, hosts=["box.lan"]).app
        assert (await Exchange(app, "/tokenize", 0, headers).feed(TOKENIZE).answered()).status == status

    asyncio.run(check())


@pytest.mark.parametrize(
    ("clients", "hosts", "status"),
    [
        ("127.0.0.1", [], 200),
        ("::1, 127.0.0.2", [], 200),
        ("203.0.113.7", [], 403),
        ("127.0.0.1, 203.0.113.7", [], 403),  # the client wrote the first one itself
        ("unknown", [], 403),
        ("203.0.113.7", ["box.lan"], 200),  # whose operator lets others in
    ],
)
def test_a_proxy_does_not_open_an_endpoint_without_keys(clients: str, hosts: list[str], status: int) -> None:
    async def check() -> None:
        app = Served(with_keys=False, hosts=hosts).app
        headers = {"x-forwarded-for": clients, "x-forwarded-host": "localhost"}
        assert (await Exchange(app, "/tokenize", 0, headers).feed(TOKENIZE).answered()).status == status

    asyncio.run(check())


# ---------------------------------------------------------------- what callers see


def version(name: str, base: str = "") -> ServedVersion:
    return ServedVersion(
        id=name,
        digest="sha256:" + "0" * 64,
        weights="adapter" if base else "full",
        engine=base or name,
        base=base or name,
        name=name,
        licence="",
        run="",
        dataset="",
        created_at="2026-01-01T00:00:00+00:00",
    )


def test_routes_of_aliases_are_for_admins_alone() -> None:
    rules = [{"to": "mv_b", "header": {"X-Team": "TEAM-SECRET-7"}}, {"to": "mv_b", "user": ["eve@example.org"]}]
    route = parse(AliasRoute, {"versions": {"mv_b": 1.0}, "shadow": ["mv_s"], "rules": rules})
    versions = {name: version(name, "" if name == "mv_base" else "mv_base") for name in ("mv_base", "mv_b", "mv_s")}
    directory = ReplicaDirectory(SimpleNamespace())  # type: ignore[arg-type]
    directory.current = Snapshot(Table(versions=versions, routes={"a@prod": route}), {})
    for caller in (Caller("r"), Caller("r", key(1)), Caller("r", key(2, scopes=("chat", "metrics")))):
        seen = json.dumps(directory.cards(caller))
        assert "a@prod" in seen
        assert not [secret for secret in ("TEAM-SECRET-7", "X-Team", "eve@", "mv_s", "rules") if secret in seen]
    assert "TEAM-SECRET-7" in json.dumps(directory.cards(Caller("r", key(3, scopes=("chat", "admin")))))


def test_alias_of_an_archived_version_is_not_listed() -> None:
    routes = {"a": parse(AliasRoute, {"versions": {"mv_b": 1}}), "b": parse(AliasRoute, {"versions": {"mv_c": 1}})}
    versions = {name: version(name) for name in ("mv_b", "mv_c")}
    directory = ReplicaDirectory(SimpleNamespace())  # type: ignore[arg-type]
    directory.current = Snapshot(Table(versions=versions, routes=routes, archived=("mv_b",)), {})
    assert [card["id"] for card in directory.cards(Caller("r"))] == ["b", "mv_c"]
    with pytest.raises(ApiError, match="archived"):
        directory.stable("a", Caller("r"))


def test_schema_without_any_value_is_the_clients_error() -> None:
    import torch

    from forge_ray.errors import RequestError
    from forge_ray.inference.engine import GenerationRequest
    from forge_ray.inference.sampling import Drawing, draw_one

    nothing: Any = SimpleNamespace(allowed=lambda: torch.zeros(5, dtype=torch.bool))
    with pytest.raises(RequestError, match="no value conforms"):
        draw_one(torch.zeros(5), Drawing(GenerationRequest((1,), 1), 0, "", nothing), 0)


# ---------------------------------------------------------------- the gateway


async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers 401 without the key `good`; else 200."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            fields = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:] if line)
            await reader.readexactly(int(fields.get("content-length", 0)))
            status = 200 if "good" in fields.get("authorization", "") else 401
            writer.write(f"HTTP/1.1 {status} X\r\nx-forge-deployment: d\r\ncontent-length: 2\r\n\r\n{{}}".encode())
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


class Front:
    """A gateway before `upstream`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    async def __aenter__(self) -> Front:
        self.behind = await asyncio.start_server(upstream, "127.0.0.1", 0)
        to = f"http://127.0.0.1:{self.behind.sockets[0].getsockname()[1]}"
        self.context = gateway.listening(gateway.GatewayConfig(to=(to,), port=0, drain_s=0, **self.settings))
        url, self.gateway = await self.context.__aenter__()
        self.port = int(url.rsplit(":", 1)[1])
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.context.__aexit__(None, None, None)
        self.behind.close()

    async def sent(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        return reader, writer

    async def answer(self, data: bytes) -> bytes:
        reader, writer = await self.sent(data)
        head = await asyncio.wait_for(reader.readline(), 20)
        writer.close()
        return head


GET = b"GET /v1/models HTTP/1.1\r\nhost: a\r\nauthorization: Bearer good\r\n\r\n"


def test_gateway_refuses_heads_without_end_and_too_many_headers() -> None:
    async def check() -> None:
        async with Front() as front:
            assert b" 431 " in await front.answer(
                b"GET / HTTP/1.1\r\n" + b"".join(b"x-%d: %s\r\n" % (i, b"y" * 2000) for i in range(50))
            )
            many = b"GET / HTTP/1.1\r\n" + b"".join(b"x-%d: y\r\n" % i for i in range(200)) + b"\r\n"
            assert b" 400 " in await front.answer(many)
            assert b" 200 " in await front.answer(GET)

    asyncio.run(check())


def test_gateway_closes_heads_that_do_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 1.0)
    monkeypatch.setattr(connections, "SWEEP_S", 0.1)

    async def check() -> None:
        async with Front() as front:
            half, first = await front.sent(b"GET / HTTP/1.1\r\nhost:")
            silent, second = await front.sent(b"")
            again, writer = await front.sent(GET)  # a connection that was used, and then begins a second head
            await asyncio.wait_for(again.readuntil(b"{}"), 10)
            writer.write(b"GET / HTT")
            assert b" 408 " in await asyncio.wait_for(half.read(), 10)
            assert await asyncio.wait_for(silent.read(), 10) == b""
            assert b" 408 " in await asyncio.wait_for(again.read(), 10)
            for one in (first, second, writer):
                one.close()

    asyncio.run(check())


def test_gateway_bounds_the_connections_of_one_address() -> None:
    async def check() -> None:
        async with Front(max_connections_per_address=5) as front:
            pairs = [await front.sent(b"GET /") for _ in range(5)]
            await asyncio.sleep(0.1)
            assert b" 503 " in await front.answer(GET)
            for _, writer in pairs:
                writer.close()
            await asyncio.sleep(0.2)
            assert b" 200 " in await front.answer(GET)

    asyncio.run(check())


def test_gateway_holds_no_large_body_before_its_key_is_checked() -> None:
    async def check() -> None:
        async with Front() as front:
            head = b"POST /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: 15900000\r\n"
            refused = [asyncio.create_task(front.answer(head + b"\r\n" + b"x" * 200_000)) for _ in range(20)]
            assert all(b" 401 " in line for line in await asyncio.gather(*refused))
            chunked = b"POST /v1/x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n30000\r\n" + b"x" * 0x30000
            assert b" 401 " in await front.answer(chunked + b"\r\n")
            assert front.gateway.buffer.held == 0

    asyncio.run(check())


def test_gateway_memory_for_bodies_is_bounded() -> None:
    async def check() -> None:
        async with Front(max_body_bytes=1 << 20, max_held_bytes=4 << 20) as front:
            head = b"POST /v1/x HTTP/1.1\r\nhost: a\r\nauthorization: Bearer good\r\ncontent-length: 1000000\r\n\r\n"
            pairs = [await front.sent(head + b"x" * 300_000) for _ in range(12)]
            await asyncio.sleep(1)
            assert front.gateway.buffer.held <= (1 << 20) + 2 * (256 << 10)  # one caller's quarter, and what is being read
            for _, writer in pairs:
                writer.close()
            await asyncio.sleep(0.5)
            assert front.gateway.buffer.held == 0
            assert b" 200 " in await front.answer(GET)

    asyncio.run(check())


def test_gateway_logs_nothing_that_a_client_wrote() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)

    async def check() -> None:
        async with Front(tries=1) as front:
            front.behind.close()
            await front.answer(b"GET /v1/x HTTP/1.1\r\nhost: a\r\nx-request-id: $(id>evil) canary\r\n\r\n")
            await front.answer(b"GET / HTTP/1.1\r\nca nary: \x01canary\r\n\r\n")
            await front.answer(b"GET / HTTP/1.1\r\nx: " + b"canary" * 3000 + b"\r\n\r\n")
            two = b"GET / HTTP/1.1\r\nhost: a\r\nauthorization: Bearer good\r\nauthorization: Bearer bad\r\n\r\n"
            assert b" 400 " in await front.answer(two)

    try:
        asyncio.run(check())
    finally:
        logging.getLogger().removeHandler(handler)
    assert "canary" not in stream.getvalue()
    assert "Traceback" not in stream.getvalue()


# ---------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cert, key = write_certificate(tmp_path_factory.mktemp("tls"))
    return {"tls_cert": cert, "tls_key": key}


async def over_tls(front: Front, tls: dict[str, str], data: bytes) -> bytes:
    """The first line of the answer to a request over TLS."""
    context = ssl.create_default_context(cafile=tls["tls_cert"])
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port, ssl=context)
    writer.write(data)
    line = await asyncio.wait_for(reader.readline(), 20)
    writer.close()
    return line


def test_gateway_counts_handshakes_that_do_not_end(tls: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "HANDSHAKE_S", 1.5)

    async def check() -> None:
        async with Front(max_connections_per_address=5, **tls) as front:
            begun = time.monotonic()
            open_ones = [await front.sent(data) for data in (b"", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01", b"", b"")]
            await asyncio.sleep(0.1)
            server = front.gateway.server
            assert server is not None
            assert server.by_address == {"127.0.0.1": 5}
            with pytest.raises(OSError):  # one too many: closed before TLS
                await over_tls(front, tls, GET)
            ends = await asyncio.gather(*(asyncio.wait_for(reader.read(), 20) for reader, _ in open_ones))
            assert ends == [b""] * 5
            assert 1 < time.monotonic() - begun < 10
            for _, writer in open_ones:
                writer.close()
            await asyncio.sleep(0.2)
            assert server.by_address == {}
            assert not server.handshakes
            assert b" 200 " in await over_tls(front, tls, GET)

    asyncio.run(check())


def test_gateway_refuses_what_is_not_tls_and_goes_on(tls: dict[str, str]) -> None:
    async def check() -> None:
        async with Front(max_connections_per_address=3, **tls) as front:
            for _ in range(10):
                reader, writer = await front.sent(GET)  # plain HTTP
                assert b"HTTP" not in await asyncio.wait_for(reader.read(), 10)
                writer.close()
            many = await asyncio.gather(*(over_tls(front, tls, GET) for _ in range(3)))
            assert all(b" 200 " in line for line in many)
            await asyncio.sleep(0.2)
            assert front.gateway.server is not None
            assert front.gateway.server.by_address == {}

    asyncio.run(check())


def test_request_in_the_packet_that_ends_the_handshake_is_answered(tls: dict[str, str]) -> None:
    """A client that speaks TLS by hand: its last message of the handshake and its request arrive together."""

    async def check() -> None:
        async with Front(**tls) as front:
            for _ in range(20):
                reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
                incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
                context = ssl.create_default_context(cafile=tls["tls_cert"])
                session = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
                while True:
                    try:
                        session.do_handshake()
                        break
                    except ssl.SSLWantReadError:
                        writer.write(outgoing.read())
                        incoming.write(await asyncio.wait_for(reader.read(1 << 16), 10))
                session.write(GET)
                writer.write(outgoing.read())  # both at once
                answer = b""
                while b"\r\n\r\n" not in answer:
                    incoming.write(await asyncio.wait_for(reader.read(1 << 16), 10))
                    with contextlib.suppress(ssl.SSLWantReadError):
                        answer += session.read(1 << 16)
                assert b" 200 " in answer
                writer.close()

    asyncio.run(check())
