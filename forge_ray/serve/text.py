"""Incremental detokenisation: whole characters only, and never a part of a stop string (no ray, no torch)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from forge_ray.inference.engine import Engine, FinishReason, GenerationRequest, Token

REPLACEMENT = "\ufffd"
NO_MARKERS: Mapping[int, str] = {}


@dataclass
class Detokenizer:
    """Decodes a growing list of ids; a character whose bytes are split over tokens waits for its last byte.

    Only a short window is decoded again per token: from the token before the last clean boundary, because some
    tokenizers write a leading space or not depending on the token before. Special tokens other than `markers` have no text.
    """

    tokenizer: Any
    markers: Mapping[int, str] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    context: int = 0
    done: int = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often one word, sometimes nothing yet."""
        if (marker := self.markers.get(token_id)) is not None:
            text = self._advance(final=True) + marker
            self.ids.append(token_id)
            self.context = self.done = len(self.ids)
            return text
        self.ids.append(token_id)
        return self._advance(final=False)

    def flush(self) -> str:
        """The rest at the end: bytes that never completed a character are shown as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._decode(self.ids[self.context : self.done])
        whole = self._decode(self.ids[self.context :])
        if len(whole) <= len(before) or (whole.endswith(REPLACEMENT) and not final):
            return ""
        self.context, self.done = self.done, len(self.ids)
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


@dataclass
class StopStrings:
    """Cuts a growing text at the first of `stops`, and holds back what may be the beginning of one."""

    stops: tuple[str, ...]
    held: str = ""
    hit: bool = False

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to show; sets `hit` once a stop string is complete."""
        if self.hit:
            return ""
        self.held += text
        positions = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if positions:
            self.hit = True
            safe, self.held = self.held[: min(positions)], ""
            return safe
        keep = max((overlap(self.held, stop) for stop in self.stops), default=0)
        safe, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return safe

    def flush(self) -> str:
        """At the end of the tokens, the text that was held back: it was not a stop string."""
        rest, self.held = self.held, ""
        return rest


def overlap(text: str, mark: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


@dataclass(frozen=True)
class Piece:
    """A generated token with its log-probabilities; `offset`: where its text begins, in characters of the answer."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Delta:
    """New text, the number of tokens generated so far, and at the end the finish reason. `pieces`: the tokens of this text,
    if log-probabilities were requested."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    pieces: tuple[Piece, ...] = ()


@dataclass
class _Pieces:
    """Tokens whose text is held back. Those of a stop string are never released."""

    num_raw: int = 0
    num_released: int = 0
    waiting: list[Piece] = field(default_factory=list)

    def push(self, token: Token, text: str) -> None:
        self.waiting.append(Piece(token, self.num_raw))
        self.num_raw += len(text)

    def release(self, text: str, ended: bool = False) -> tuple[Piece, ...]:
        self.num_released += len(text)
        ready = [piece for piece in self.waiting if ended or piece.offset < self.num_released]
        del self.waiting[: len(ready)]
        return tuple(ready)


async def answer(
    engine: Engine,
    tokenizer: Any,
    request: GenerationRequest,
    stops: tuple[str, ...],
    markers: Mapping[int, str] = NO_MARKERS,
) -> AsyncGenerator[Delta, None]:
    """One `Delta` per generated token, the last with a finish reason. Closing the iterator cancels the request.

    `num_tokens` counts what was generated, the tokens of a stop string included, the end-of-turn token not.
    """
    detokenizer, scanner, pieces = Detokenizer(tokenizer, markers), StopStrings(stops), _Pieces()
    with_logprobs = request.num_logprobs is not None
    num_tokens = 0
    async with aclosing(engine.stream(request)) as tokens:  # type: ignore[type-var]
        async for token in tokens:
            if token.token_id is not None:
                num_tokens += 1
                new = detokenizer.push(token.token_id)
                if with_logprobs:
                    pieces.push(token, new)
                text = scanner.push(new)
            else:
                text = scanner.push(detokenizer.flush())
            if scanner.hit:
                yield Delta(text, num_tokens, "stop", pieces.release(text))
                return
            if token.finish_reason is not None:
                text += scanner.flush()
                yield Delta(text, num_tokens, token.finish_reason, pieces.release(text, ended=True))
                return
            yield Delta(text, num_tokens, None, pieces.release(text))
