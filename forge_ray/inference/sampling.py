"""How each request of one continuous batch draws its next token from its row of logits (level 2; tensors only).

A request that samples adds Gumbel noise to its scores: the argmax of that *is* an exact sample (the Gumbel-max trick). The
noise is a pure function of (seed, position, token id), so a seeded request draws the same tokens whatever else is in the
batch. The order of operations is that of `GenerationRequest`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from forge_ray.errors import EngineError
from forge_ray.inference.engine import GenerationRequest, Token
from forge_ray.inference.grammar import Matcher

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's increment, and its two multipliers
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
NUCLEUS_GUESS = 512  # tokens; nearly every nucleus of a language model is smaller


@dataclass(eq=False)
class Drawing:
    """One request's way of drawing and what it has drawn. While it runs, only the generation thread writes to it."""

    request: GenerationRequest
    seed: int
    adapter: str = ""
    grammar: Matcher | None = None
    counts: Counter[int] = field(default_factory=Counter)
    tokens: list[Token] = field(default_factory=list)  # with `num_logprobs` only
    error: str = ""

    def __deepcopy__(self, memo: object) -> Drawing:
        """A request that is preempted is copied; how it draws goes on."""
        return self

    @property
    def is_argmax(self) -> bool:
        """Whether the most probable token is all that is asked for: then the whole batch shares one argmax."""
        request = self.request
        changed = request.logit_bias or request.presence_penalty or request.frequency_penalty or self.grammar
        return request.temperature == 0 and request.num_logprobs is None and not changed


def draw(logits: torch.Tensor, drawings: Sequence[Drawing], positions: Sequence[int]) -> torch.Tensor:
    """Next token of each row: logits [rows, vocab_size] → [rows]. `positions` count from the start of each prompt.
    What fails in one row is noted in its drawing alone."""
    tokens = logits.argmax(dim=-1)
    for row, (drawing, position) in enumerate(zip(drawings, positions, strict=True)):
        if not drawing.is_argmax and not drawing.error:
            try:
                tokens[row] = draw_one(logits[row].float(), drawing, position)
            except EngineError as error:
                drawing.error = error.message
    return tokens


def draw_one(logits: torch.Tensor, drawing: Drawing, position: int) -> int:
    """The token of one row of fp32 logits [vocab_size]; notes it in `drawing`."""
    request, scores = drawing.request, logits
    if drawing.grammar is not None:
        allowed = drawing.grammar.allowed()
        if not bool(allowed.any()):
            raise EngineError("the grammar allows no token", hint="simplify the schema")
        scores = scores.masked_fill(~allowed.to(scores.device), float("-inf"))
    if request.logit_bias:
        ids, values = zip(*request.logit_bias, strict=True)
        scores = scores.index_add(0, _ids(ids, scores), scores.new_tensor(values))
    if (request.presence_penalty or request.frequency_penalty) and drawing.counts:
        times = scores.new_tensor(list(drawing.counts.values()))
        penalty = request.presence_penalty + request.frequency_penalty * times
        scores = scores.index_add(0, _ids(drawing.counts.keys(), scores), -penalty)
    if request.temperature > 0:
        scores = perturb(scores, request, drawing.seed, position)
    token = int(scores.argmax())
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


def perturb(logits: torch.Tensor, request: GenerationRequest, seed: int, position: int) -> torch.Tensor:
    """One row of fp32 logits [vocab_size] → scores whose argmax is the sample for `position`."""
    scores = logits / request.temperature
    if 0 < request.top_k < scores.shape[-1]:
        scores = _only(scores, scores.topk(request.top_k).indices)
    if request.top_p < 1.0:
        scores = nucleus(scores, request.top_p)
    return scores + gumbel_noise(seed, position, scores.shape[-1], scores.device)


def nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the fewest most probable tokens that together reach `top_p`; the others become -inf."""
    all_probs = torch.softmax(scores, dim=-1)
    probs, order = all_probs.topk(min(NUCLEUS_GUESS, scores.shape[-1]))
    if probs.sum() < top_p:  # a flat distribution: only now sort the whole vocabulary, at ten times the cost
        probs, order = all_probs.sort(descending=True)
    inside = probs.cumsum(-1) - probs < top_p
    inside[0] = True  # the most probable token always stays
    return _only(scores, order[inside])


def gumbel_noise(seed: int, position: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """[vocab_size] standard Gumbel draws: a SplitMix64 stream that starts at a hash of (seed, position)."""
    start = int.from_bytes(hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest(), "big")
    state = torch.arange(1, vocab_size + 1, device=device) * _signed(GOLDEN_GAMMA) + _signed(start)
    state = (state ^ _shift(state, 30)) * _signed(MIX_1)
    state = (state ^ _shift(state, 27)) * _signed(MIX_2)
    state = state ^ _shift(state, 31)
    # 40 bits in (0, 1): small values, which make the large draws, keep fp32's full relative precision
    uniform = ((_shift(state, 24).double() + 0.5) * 2.0**-40).float().clamp_(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _only(scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return torch.full_like(scores, float("-inf")).index_copy(-1, kept, scores[kept])


def _ids(ids: object, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(ids), dtype=torch.long, device=like.device)  # type: ignore[call-overload]


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer: torch's int64 arithmetic wraps around like uint64's."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift (torch's `>>` copies the sign)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
