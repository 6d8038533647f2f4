"""How streams are written: what is ready at the same moment is one write to the connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from http_server import Fixed, deployment
from scripted import Scripted, ids_of, loaded
from scripted_api import TEMPLATE, USER, Tally
from starlette.types import Message

from forge_ray.data.tokens.chat import load_tokenizer_dir
from forge_ray.data.tokens.hf import HfTokenizer
from forge_ray.errors import EngineError
from forge_ray.inference.engine import GenerationRequest, Token
from forge_ray.serve import streams
from forge_ray.serve.http import build_http
from forge_ray.serve.streams import KEEP_ALIVE, Arrived, merged, writes

pytestmark = pytest.mark.unit

BROKEN = EngineError("the engine died", hint="x")


class Stepped(Scripted):
    """Makes a token of each of its requests at the same moment, when the test says so, as an engine's step does."""

    def __init__(self) -> None:
        super().__init__(lambda request: [])
        self.inboxes: list[asyncio.Queue[Token | Exception]] = []

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Token]:
        inbox = asyncio.Queue[Token | Exception]()
        self.inboxes.append(inbox)
        while True:
            item = await inbox.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.token_id is None:
                return

    async def begun(self, num_requests: int) -> None:
        while len(self.inboxes) < num_requests:
            await asyncio.sleep(0)

    async def step(self, *items: Token | Exception) -> None:
        """One item to each request; returns when nothing is left to do about it."""
        for inbox, item in zip(self.inboxes, items, strict=True):
            inbox.put_nowait(item)
        await asyncio.sleep(0.02)


@dataclass
class Served:
    """The application without a server: `bodies` are the messages in which a stream was sent."""

    engine: Stepped
    tokenizer: HfTokenizer
    tally: Tally = field(default_factory=Tally)
    bodies: list[bytes] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        context = deployment(Fixed(tiny=loaded(self.tokenizer, self.engine)))
        self.context = replace(context, admit=self.tally.admit)
        self.app = build_http(self.context)

    async def send(self, message: Message) -> None:
        if message.get("body"):
            self.bodies.append(message["body"])

    def num_counted(self) -> float:
        """Tokens of answers in the metrics."""
        lines = self.context.metrics.text().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("forge_completion_tokens_total{"))

    async def ask(self, path: str, send: Callable[[Message], Awaitable[None]] | None = None, **body: Any) -> None:
        sent = json.dumps({"model": "tiny", "stream": True, **body}).encode()
        messages = iter([{"type": "http.request", "body": sent, "more_body": False}])

        async def receive() -> Message:
            if (message := next(messages, None)) is None:
                await self.left.wait()
            return message or {"type": "http.disconnect"}

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await self.app(scope, receive, send or self.send)

    def steps(self, text: str, num_choices: int) -> list[list[Token]]:
        ids = [Token(token_id) for token_id in ids_of(self.tokenizer, text)]
        return [[token] * num_choices for token in (*ids, Token(None, "stop"))]


@pytest.fixture
def served(tiny_model_dir: Path) -> Served:
    tokenizer = load_tokenizer_dir(tiny_model_dir)
    assert isinstance(tokenizer, HfTokenizer)
    tokenizer.tokenizer.chat_template = TEMPLATE
    return Served(Stepped(), tokenizer)


def events_of(body: bytes) -> list[Any]:
    *blocks, rest = body.decode().split("\n\n")
    assert rest == ""
    data = [block.removeprefix("data: ") for block in blocks]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


CHAT = ("/v1/chat/completions", {"messages": USER, "n": 4})
TEXTS = ("/v1/completions", {"prompt": ["one", "two"], "n": 2, "max_tokens": 9})


@pytest.mark.parametrize(("path", "body"), [CHAT, TEXTS])
def test_tokens_of_one_step_are_one_write(served: Served, path: str, body: dict[str, Any]) -> None:
    steps = served.steps("abc", 4)

    async def go() -> None:
        asked = asyncio.create_task(served.ask(path, stream_options={"include_usage": True}, **body))
        await served.engine.begun(4)
        for number, step in enumerate(steps):
            assert len(served.bodies) == number
            await served.engine.step(*step)
        await asked

    asyncio.run(go())
    assert len(served.bodies) == len(steps)
    written = [events_of(body) for body in served.bodies]
    num_roles = 4 if path == CHAT[0] else 0
    assert [len(events) for events in written] == [4 + num_roles, *[4] * (len(steps) - 2), 4 + 2]
    for events in written:
        indices = [event["choices"][0]["index"] for event in events if event != "[DONE]" and event["choices"]]
        assert indices == sorted(indices)  # the order of the step
    assert written[-1][-2]["usage"]["completion_tokens"] == 4 * (len(steps) - 1)
    assert written[-1][-1] == "[DONE]"


def test_events_of_a_response_are_written_together(served: Served) -> None:
    steps = served.steps("ab", 1)

    async def go() -> None:
        asked = asyncio.create_task(served.ask("/v1/responses", input="hi"))
        await served.engine.begun(1)
        for step in steps:
            await served.engine.step(*step)
        await asked

    asyncio.run(go())
    first, *_, last = served.bodies
    assert len(served.bodies) == len(steps)
    names = [line.removeprefix("event: ") for line in first.decode().splitlines() if line.startswith("event: ")]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.output_text.delta"
    assert b"event: response.completed" in last


def test_a_slow_client_gets_what_waited_at_once(served: Served) -> None:
    read = asyncio.Event()
    steps = served.steps("abc", 2)

    async def slowly(message: Message) -> None:
        await served.send(message)
        await read.wait()

    async def go() -> None:
        asked = asyncio.create_task(served.ask("/v1/chat/completions", slowly, messages=USER, n=2))
        await served.engine.begun(2)
        for step in steps:
            await served.engine.step(*step)
        assert served.bodies == []  # the head of the response is not read yet
        read.set()
        await asked

    asyncio.run(go())
    (first, second) = served.bodies  # the first was asked for before the others came
    assert len(events_of(first)) == 2 + 2
    assert len(events_of(second)) == 2 * (len(steps) - 1) + 1


def test_what_came_before_an_error_is_written_and_nothing_behind_it(served: Served) -> None:
    token = served.steps("a", 1)[0][0]

    async def go() -> None:
        asked = asyncio.create_task(served.ask("/v1/chat/completions", messages=USER, n=4))
        await served.engine.begun(4)
        await served.engine.step(*[token] * 4)
        await served.engine.step(token, token, BROKEN, token)
        await asked

    asyncio.run(go())
    events = [event for body in served.bodies for event in events_of(body)]
    assert len(served.bodies) == 2
    assert [event["choices"][0]["index"] for event in events[:-1]] == [0, 0, 1, 1, 2, 2, 3, 3, 0, 1]
    assert events[-1]["error"]["message"] == "the engine died"
    assert served.tally.closed[-1][1:] == (6, 503)


def test_metrics_are_recorded_behind_the_write(served: Served) -> None:
    counted: list[float] = []
    steps = served.steps("abc", 4)

    async def send(message: Message) -> None:
        await served.send(message)
        counted.append(served.num_counted())

    async def go() -> None:
        asked = asyncio.create_task(served.ask("/v1/chat/completions", send, messages=USER, n=4))
        await served.engine.begun(4)
        for step in steps:
            await served.engine.step(*step)
        await asked

    asyncio.run(go())
    num_tokens = len(steps) - 1
    # the head, a write a step, the last with all of them, the empty end
    assert counted == [0, *(4 * number for number in range(num_tokens)), 4 * num_tokens, 4 * num_tokens]


def test_a_client_that_leaves_in_a_write_is_charged_for_the_step(served: Served) -> None:
    steps = served.steps("abc", 4)

    async def send(message: Message) -> None:
        if message.get("body"):
            served.left.set()
            await asyncio.Event().wait()  # nobody reads it

    async def go() -> None:
        asked = asyncio.create_task(served.ask("/v1/chat/completions", send, messages=USER, n=4))
        await served.engine.begun(4)
        await served.engine.step(*steps[0])
        await asked
        while not served.tally.closed:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(go(), 20))
    assert served.tally.closed[-1][1:] == (4, 499)
    assert served.num_counted() == 4


# ---------------------------------------------------------------- the two functions


async def items_of(items: list[Any]) -> AsyncGenerator[Any, None]:
    """Plays its items: a number is a pause in seconds, an error is raised."""
    for item in items:
        if isinstance(item, float):
            await asyncio.sleep(item)
        elif isinstance(item, Exception):
            raise item
        else:
            yield item


def merged_from(*played: list[Any], idle_s: float = 10.0) -> list[Any]:
    async def go() -> list[Any]:
        seen: list[Any] = []
        async with aclosing(merged([items_of(items) for items in played], idle_s)) as arriving:
            try:
                async for arrived in arriving:
                    seen.append(arrived)
            except EngineError as error:
                seen.append(error)
        return seen

    return asyncio.run(go())


def test_streams_are_merged_by_moment() -> None:
    assert merged_from(["a", "b"], ["c"]) == [Arrived(((0, "a"), (0, "b"), (1, "c")), is_last=True)]
    later = merged_from(["a", 0.05, "b", 0.05], ["c"])
    assert later == [Arrived(((0, "a"), (1, "c"))), Arrived(((0, "b"),))]  # the end came later than the last item
    assert merged_from([], []) == []
    assert merged_from([0.2, "a"], idle_s=0.05)[0] is None
    assert merged_from(["a"], ["b", BROKEN, "c"], ["d"]) == [Arrived(((0, "a"), (1, "b")), is_last=True), BROKEN]
    assert merged_from([BROKEN]) == [BROKEN]


def test_what_waits_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_AT_ONCE", 2)
    assert merged_from(["a", "b", "c"], ["d", "e"]) == [
        Arrived(((0, "a"), (0, "b"))),
        Arrived(((0, "c"), (1, "d"))),
        Arrived(((1, "e"),), is_last=True),
    ]


def written(arriving: list[Arrived[str] | Exception | None]) -> list[bytes]:
    def events(number: int, item: str) -> Iterator[bytes]:
        if item:
            yield f"{number}{item};".encode()
        if item == "?":
            raise ValueError(item)

    async def go() -> list[bytes]:
        rest = items_of(arriving[1:])
        first = arriving[0]
        assert not isinstance(first, Exception)
        failed = lambda error: f"failed: {error}".splitlines()[0].encode()  # noqa: E731
        pieces = writes(first, rest, events, lambda: [b"usage;", b"done"], failed, [b"begin;"])
        return [piece async for piece in pieces]

    return asyncio.run(go())


def test_pieces_of_a_stream() -> None:
    two, one = Arrived(((0, "a"), (1, "b"))), Arrived(((1, "c"),))
    assert written([two, one]) == [b"begin;0a;1b;", b"1c;", b"usage;done"]
    assert written([two, replace(one, is_last=True)]) == [b"begin;0a;1b;", b"1c;usage;done"]
    assert written([None, one]) == [b"begin;" + KEEP_ALIVE, b"1c;", b"usage;done"]
    nothing = Arrived(((0, ""),))
    assert written([two, nothing, nothing, one]) == [b"begin;0a;1b;", b"1c;", b"usage;done"]
    assert written([two, BROKEN]) == [b"begin;0a;1b;", b"failed: the engine died"]
    assert written([two, replace(one, is_last=True), BROKEN]) == [b"begin;0a;1b;", b"1c;failed: the engine died"]
    assert written([Arrived(((0, "a"), (1, "?"), (2, "c")))]) == [b"begin;0a;1?;failed: ?"]
