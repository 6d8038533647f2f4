"""Text out of tokens: whole characters, and never the beginning of a stop string."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.inference.engine import EngineHealth, Generation, GenerationRequest, Score, Token
from forge_ray.serve.text import Delta, Detokenizer, StopStrings, answer

pytestmark = pytest.mark.unit


class ByteTokenizer:
    """One token per byte; token 0 is special and has no text."""

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(token_id for token_id in ids if token_id).decode("utf-8", errors="replace")


class ScriptedEngine:
    """Streams fixed tokens and remembers whether it was cancelled."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = token_ids
        self.sent = 0
        self.cancelled = False

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Token]:
        self.cancelled = True
        for token_id in self.token_ids:
            self.sent += 1
            yield Token(token_id)
        self.cancelled = False
        yield Token(None, "length")

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        raise NotImplementedError

    def score(self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        raise NotImplementedError

    def health(self) -> EngineHealth:
        return EngineHealth(True, "idle", 0, 0)

    def close(self) -> None: ...


def deltas(engine: ScriptedEngine, *stops: str) -> list[Delta]:
    async def collect() -> list[Delta]:
        request = GenerationRequest((1,), 100)
        return [delta async for delta in answer(engine, ByteTokenizer(), request, stops)]

    return asyncio.run(collect())


@given(st.text(alphabet=st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])))
def test_pieces_join_to_the_whole_text(text: str) -> None:
    detokenizer = Detokenizer(ByteTokenizer())
    pieces = [detokenizer.push(byte) for byte in text.encode()] + [detokenizer.flush()]
    assert "".join(pieces) == text


@given(st.binary().filter(lambda data: 0 not in data))
def test_bytes_that_are_no_text_still_join_to_the_whole(data: bytes) -> None:
    detokenizer = Detokenizer(ByteTokenizer())
    pieces = [detokenizer.push(byte) for byte in data] + [detokenizer.flush()]
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


def test_a_character_waits_for_its_last_byte() -> None:
    detokenizer = Detokenizer(ByteTokenizer())
    assert [detokenizer.push(byte) for byte in "a🙂b".encode()] == ["a", "", "", "", "🙂", "b"]


def test_an_unfinished_character_shows_at_the_end() -> None:
    detokenizer = Detokenizer(ByteTokenizer())
    assert [detokenizer.push(byte) for byte in "é".encode()[:1]] == [""]
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_have_no_text() -> None:
    detokenizer = Detokenizer(ByteTokenizer())
    assert [detokenizer.push(token_id) for token_id in (0, 65, 0, 66)] == ["", "A", "", "B"]


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["Hel", "lo ST", "OP more"], ("STOP",), ["Hel", "lo ", ""]),
        (["a S", "TO", "X"], ("STOP",), ["a ", "", "STOX"]),
        (["aab"], ("ab",), ["a"]),
        (["aa", "ab"], ("aab",), ["", "a"]),
        (["one two"], ("two", "one"), [""]),
        (["ends with \n"], ("\n\n",), ["ends with "]),
        (["plain"], (), ["plain"]),
    ],
)
def test_stop_strings_over_pieces(pieces: list[str], stops: tuple[str, ...], expected: list[str]) -> None:
    scanner = StopStrings(stops)
    assert [scanner.push(piece) for piece in pieces] == expected


def test_held_text_that_was_no_stop_string_comes_at_the_end() -> None:
    scanner = StopStrings(("STOP",))
    assert scanner.push("non-STO") == "non-"
    assert scanner.flush() == "STO"
    assert not scanner.hit


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.randoms())
def test_any_split_gives_the_text_before_the_first_stop(text: str, stops: list[str], rng: random.Random) -> None:
    scanner, rest, released = StopStrings(tuple(stops)), text, ""
    while rest and not scanner.hit:
        size = rng.randint(1, 4)
        released += scanner.push(rest[:size])
        rest = rest[size:]
    if not scanner.hit:
        released += scanner.flush()
    complete = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    assert scanner.hit == bool(complete)
    assert text.startswith(released)
    assert not any(stop in released for stop in stops)
    if not complete:
        assert released == text


def test_a_stop_string_ends_the_request_in_the_engine() -> None:
    engine = ScriptedEngine(b"say STOP and go on")
    stream = deltas(engine, "STOP")
    assert "".join(delta.text for delta in stream) == "say "
    assert stream[-1] == Delta("", 8, "stop")
    assert (engine.sent, engine.cancelled) == (8, True)


def test_without_a_stop_all_tokens_are_counted_and_shown() -> None:
    engine = ScriptedEngine("größe ST".encode())
    stream = deltas(engine, "STOP")
    assert "".join(delta.text for delta in stream) == "größe ST"
    assert stream[-1] == Delta("ST", 10, "length")
    assert not engine.cancelled
