"""The Engine seam: tokens in, tokens out (level 2; imports no torch).

Three consumers (serve, evaluate, rollouts). Text, chat templates, stop strings and OpenAI's formats stay outside.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to continue.

    `temperature` 0 is greedy. With `seed` the same request gives the same tokens, whatever else is in the batch.
    Generation ends at one of `stop_token_ids` (not part of the output) or after `max_new_tokens`.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generation:
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Token:
    """One step of a stream: a token, or (`token_id` None) the end with its reason."""

    token_id: int | None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Score:
    """Natural-log probability of a continuation: the sum over its `num_tokens` tokens."""

    logprob: float
    num_tokens: int


@dataclass(frozen=True)
class EngineHealth:
    ok: bool
    detail: str
    num_running: int
    num_waiting: int


class Engine(Protocol):
    """What serving and evaluation ask of an engine. `EngineError` when it cannot answer."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Continue all `requests` as one continuous batch; results in the same order."""
        ...

    def stream(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Tokens as they are made, the end last. Closing the iterator cancels the request."""
        ...

    def score(self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        """Log-probability of each continuation after the same prompt."""
        ...

    def health(self) -> EngineHealth: ...

    def close(self) -> None: ...
