"""The Engine seam: tokens in, tokens out (imports no torch).

Three consumers (serve, evaluate, rollouts). Text, chat templates, stop strings and OpenAI's formats stay outside.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to continue.

    `temperature` 0 is greedy. With `seed` the same request gives the same tokens, whatever else is in the batch.
    Generation ends at one of `stop_token_ids` (not part of the output) or after `max_new_tokens`. The order in which logits
    are changed is vLLM's: grammar, `logit_bias`, penalties, temperature, min-p, top-k, top-p. `repetition_penalty` divides
    (what is below zero: multiplies) the logit of every token of the prompt or the answer so far, 1 changes nothing; the
    other penalties count generated tokens only. `min_p`: the least probability of a token, as a share of the largest.
    `num_logprobs` None gives no log-probabilities; k gives that of each token and of the k most probable ones, of the
    model's own distribution before all of that. `json_schema` is the text of a schema that the answer follows ("": none).
    `adapter` is a name given to `load_adapter` ("" for the weights that the engine was started with).
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None
    json_schema: str = ""
    adapter: str = ""


@dataclass(frozen=True)
class Generation:
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Token:
    """One step of a stream: a token, or (`token_id` None) the end with its reason. With `num_logprobs`: the token's
    natural-log probability and the most probable tokens with theirs, best first."""

    token_id: int | None
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Score:
    """Natural-log probability of a continuation: the sum over its `num_tokens` tokens."""

    logprob: float
    num_tokens: int


Question = tuple[Sequence[int], Sequence[Sequence[int]]]  # a prompt, and continuations of it


@dataclass(frozen=True)
class EngineHealth:
    """`num_tokens`: of the requests that run or wait, prompts and what may still be generated."""

    ok: bool
    detail: str
    num_running: int
    num_waiting: int
    num_tokens: int = 0


class Engine(Protocol):
    """What serving and evaluation require of an engine. `EngineError` when it cannot answer.

    `lacks` names the request fields (of `GenerationRequest`, and `embeddings`) that this engine does not have, each with the
    engine that does; a request that uses one is refused before it gets here.
    """

    max_request_tokens: int
    lacks: dict[str, str]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Continue all `requests` as one continuous batch; results in the same order."""
        ...

    def stream(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Tokens as they are generated, the end last. Closing the iterator cancels the request."""
        ...

    def score(self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        """Log-probability of each continuation after the same prompt."""
        ...

    def score_all(self, questions: Sequence[Question]) -> list[list[Score]]:
        """As `score`, of many prompts together; results in the same order."""
        ...

    def embed(self, inputs: Sequence[Sequence[int]], adapter: str = "") -> list[list[float]]:
        """One vector of unit length per input: the mean of the last hidden states of its tokens."""
        ...

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make a PEFT LoRA folder available under `name`, besides the loaded ones; blocks until it is usable. Loading a
        name again does nothing: names are content digests. `EngineError` if its rank or its targets cannot be served."""
        ...

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter that no pending request names."""
        ...

    def health(self) -> EngineHealth: ...

    def close(self) -> None: ...
