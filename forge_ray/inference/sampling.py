"""How each request of one continuous batch draws its next token from its row of logits (tensors only).

A request that samples adds Gumbel noise to its scores: the argmax of that *is* an exact sample (the Gumbel-max trick). The
noise is a pure function of (seed, position, token id), so a seeded request draws the same tokens whatever else is in the
batch. The order of operations is that of `GenerationRequest`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from forge_ray.errors import EngineError, RequestError
from forge_ray.inference.engine import GenerationRequest, Token
from forge_ray.inference.grammar import Matcher

SEED_MASK = (1 << 64) - 1  # numpy takes no negative seeds; OpenAI's may be
NUCLEUS_GUESSES = (512, 8192)  # tokens; nearly every nucleus is smaller, and a sort of all costs a hundred times as much


@dataclass(eq=False)
class Drawing:
    """One request's sampling settings and the tokens drawn so far. Only the generation thread writes to it."""

    request: GenerationRequest
    seed: int
    adapter: str = ""
    grammar: Matcher | None = None
    counts: Counter[int] = field(default_factory=Counter)
    tokens: list[Token] = field(default_factory=list)  # with `num_logprobs` only
    error: str = ""
    is_request_error: bool = False  # what failed is the request's own doing

    def __deepcopy__(self, memo: object) -> Drawing:
        """Shared with the copy: a preempted request is copied and continues with the same state."""
        return self

    @cached_property
    def prompt_tokens(self) -> frozenset[int]:
        return frozenset(self.request.prompt_ids)

    @property
    def is_argmax(self) -> bool:
        """Whether the request only needs the most probable token: then the whole batch shares one argmax."""
        request = self.request
        penalised = request.presence_penalty or request.frequency_penalty or request.repetition_penalty != 1
        changed = request.logit_bias or penalised or self.grammar
        return request.temperature == 0 and request.num_logprobs is None and not changed


def check_drawing(request: GenerationRequest) -> None:
    """Refuse invalid sampling settings."""
    if not request.temperature >= 0 or not 0 <= request.top_p <= 1 or request.top_k < 0:
        raise EngineError(
            f"temperature={request.temperature}, top_p={request.top_p}, top_k={request.top_k}: want temperature >= 0,"
            " top_p in 0..1 and top_k >= 0",
            hint="temperature 0 is greedy, top_p 1 and top_k 0 keep every token",
        )
    if not 0 <= request.min_p <= 1 or not request.repetition_penalty > 0:
        raise EngineError(
            f"min_p={request.min_p}, repetition_penalty={request.repetition_penalty}: want min_p in 0..1 and"
            " repetition_penalty > 0",
            hint="min_p 0 keeps every token, repetition_penalty 1 changes nothing",
        )
    penalties = (request.presence_penalty, request.frequency_penalty, request.repetition_penalty)
    numbers = (request.temperature, *penalties)
    if not all(map(math.isfinite, (*numbers, *(value for _, value in request.logit_bias)))):
        raise EngineError(
            f"temperature, penalties {numbers} and the values of logit_bias must be finite", hint="-100 keeps a token out"
        )
    if len({token for token, _ in request.logit_bias}) < len(request.logit_bias):
        raise EngineError("logit_bias names a token twice", hint="give one value per token")
    if request.num_logprobs is not None and request.num_logprobs < 0:
        raise EngineError(f"num_logprobs={request.num_logprobs} is negative", hint="0 gives that of the token itself")
    if request.json_schema and not request.stop_token_ids:
        raise EngineError("json_schema without stop_token_ids could not end", hint="give the end-of-turn token")


def draw(logits: torch.Tensor, drawings: Sequence[Drawing], positions: Sequence[int]) -> torch.Tensor:
    """Next token of each row: logits [rows, vocab_size] → [rows]. `positions` count from the start of each prompt.
    A failure of one row is recorded in its drawing and does not affect the others."""
    tokens = best_tokens(logits)
    for row, (drawing, position) in enumerate(zip(drawings, positions, strict=True)):
        if not drawing.is_argmax and not drawing.error:
            try:
                tokens[row] = draw_one(logits[row].float(), drawing, position)
            except (RuntimeError, ValueError) as error:  # EngineError is one
                drawing.error, drawing.is_request_error = str(error), isinstance(error, RequestError)
    return tokens


def best_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Argmax of each row [..., vocab_size]; on a CPU numpy's, which takes a twentieth of torch's time."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    return torch.from_numpy(np.asarray(logits.float().numpy().argmax(axis=-1)))


def draw_one(logits: torch.Tensor, drawing: Drawing, position: int) -> int:
    """The token of one row of fp32 logits [vocab_size]; records it in `drawing`."""
    request, scores = drawing.request, logits
    if drawing.grammar is not None:
        allowed = drawing.grammar.allowed()
        if not bool(allowed.any()):
            raise RequestError("json_schema: no value conforms to the schema, or to a part of it", hint="change the schema")
        scores = scores.masked_fill(~allowed.to(scores.device), float("-inf"))
    if request.logit_bias:
        ids, values = zip(*request.logit_bias, strict=True)
        scores = scores.index_add(0, _ids(ids, scores), scores.new_tensor(values))
    if request.repetition_penalty != 1:
        seen = _ids(drawing.prompt_tokens.union(drawing.counts), scores)
        old = scores[seen]
        penalised = torch.where(old > 0, old / request.repetition_penalty, old * request.repetition_penalty)
        scores = scores.index_copy(0, seen, penalised)
    if (request.presence_penalty or request.frequency_penalty) and drawing.counts:
        times = scores.new_tensor(list(drawing.counts.values()))
        penalty = request.presence_penalty + request.frequency_penalty * times
        scores = scores.index_add(0, _ids(drawing.counts.keys(), scores), -penalty)
    greedy = request.temperature == 0
    token = int(best_tokens(scores)) if greedy else sample(scores, request, drawing.seed, position)
    drawing.counts[token] += 1
    if request.num_logprobs is not None:
        drawing.tokens.append(with_logprobs(logits, token, request.num_logprobs))
    if drawing.grammar is not None:
        drawing.grammar.accept(token)
    return token


def with_logprobs(logits: torch.Tensor, token: int, num: int) -> Token:
    """`token` with its log-probability and the `num` best, under the softmax of fp32 `logits` [vocab_size]."""
    logprobs = torch.log_softmax(logits, dim=-1)
    best, ids = logprobs.topk(min(num, logprobs.shape[-1]))
    top = tuple(zip(ids.tolist(), best.tolist(), strict=True))
    return Token(token, logprob=float(logprobs[token]), top_logprobs=top)


def sample(logits: torch.Tensor, request: GenerationRequest, seed: int, position: int) -> int:
    """One row of fp32 logits [vocab_size] → the sampled token of `position`."""
    scores = logits / request.temperature
    if request.min_p > 0:  # as a share of the largest probability, so the softmax's sum cancels out
        scores = scores.masked_fill(scores < scores.max() + math.log(request.min_p), float("-inf"))
    noise = gumbel_noise(seed, position, scores.shape[-1], scores.device)
    kept = candidates(scores, request.top_k, request.top_p)
    if kept is None:
        return int(best_tokens(scores + noise))
    return int(kept[(scores[kept] + noise[kept]).argmax()])


def candidates(scores: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor | None:
    """Ids of the `top_k` best tokens (0: all), and of these the fewest that reach `top_p`, best first; None: all."""
    if top_k <= 0 or top_k >= scores.shape[-1]:
        return nucleus(scores, top_p) if top_p < 1 else None
    best, ids = scores.topk(top_k)
    return ids[nucleus(best, top_p)] if top_p < 1 else ids


def nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Ids of the fewest most probable tokens that together reach `top_p`, best first."""
    total = scores.logsumexp(dim=-1)
    for guess in (*NUCLEUS_GUESSES, scores.shape[-1]):
        best, order = scores.topk(min(guess, scores.shape[-1]))
        probs = (best - total).exp()
        if probs.sum() >= top_p:
            break
    inside = probs.cumsum(-1) - probs < top_p
    inside[0] = True  # the most probable token always stays
    return order[inside]


def gumbel_noise(seed: int, position: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """[vocab_size] standard Gumbel draws; numpy's stream is the same on every machine, and its draws have 53 bits."""
    stream = np.random.Generator(np.random.PCG64([seed & SEED_MASK, position]))
    return torch.from_numpy(stream.standard_exponential(vocab_size)).float().log_().neg_().to(device)


def _ids(ids: object, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(ids), dtype=torch.long, device=like.device)  # type: ignore[call-overload]
