"""Tokens → text while they arrive: whole characters only, and never a piece of a stop string (level 4; no ray, no torch)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from forge_ray.inference.engine import Engine, FinishReason, GenerationRequest

REPLACEMENT = "\ufffd"


@dataclass
class Detokenizer:
    """Decodes a growing list of ids; a character whose bytes are split over tokens waits for its last byte.

    Only a short window is decoded again per token: from the token before the last clean boundary, because some
    tokenizers write a leading space or not depending on the token before.
    """

    tokenizer: Any
    ids: list[int] = field(default_factory=list)
    context: int = 0
    done: int = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often one word, sometimes nothing yet."""
        self.ids.append(token_id)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character show as U+FFFD."""
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
    """Cuts a growing text at the first of `stops`, holding back what may be the beginning of one."""

    stops: tuple[str, ...]
    held: str = ""
    hit: bool = False

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to show; sets `hit` once a stop string is complete."""
        if self.hit:
            return ""
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.hit = True
            shown, self.held = self.held[: min(found)], ""
            return shown
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """At the end of the tokens the held text was no stop string after all."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Delta:
    """New text, the number of tokens generated so far, and at the end why it ended."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None


async def answer(engine: Engine, tokenizer: Any, request: GenerationRequest, stops: tuple[str, ...]) -> AsyncIterator[Delta]:
    """One `Delta` per generated token, the last with a finish reason. Closing the iterator cancels the request.

    `num_tokens` counts what was generated, the tokens of a stop string included, the end-of-turn token not.
    """
    detokenizer, scanner = Detokenizer(tokenizer), StopStrings(stops)
    num_tokens = 0
    async with aclosing(engine.stream(request)) as tokens:  # type: ignore[type-var]
        async for token in tokens:
            if token.token_id is not None:
                num_tokens += 1
                text = scanner.push(detokenizer.push(token.token_id))
            else:
                text = scanner.push(detokenizer.flush())
            if scanner.hit:
                yield Delta(text, num_tokens, "stop")
                return
            if token.finish_reason is not None:
                yield Delta(text + scanner.flush(), num_tokens, token.finish_reason)
                return
            yield Delta(text, num_tokens)
