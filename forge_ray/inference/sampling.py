"""Per-request temperature, top-p and seed inside one continuous batch (level 2; tensors only).

The batch takes the argmax of every row. For a request that samples, its row first becomes `logits / temperature`, cut to
the top-p nucleus, plus Gumbel noise: the argmax of that *is* an exact sample (the Gumbel-max trick). The noise is a pure
function of (seed, position, token id), so a seeded request draws the same tokens whatever else is in the batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from transformers.generation import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's increment, and its two multipliers
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
NUCLEUS_GUESS = 512  # tokens; nearly every nucleus of a language model is smaller


@dataclass(frozen=True)
class Sampling:
    """How one request draws its tokens; `temperature` 0 takes the most probable one."""

    temperature: float
    top_p: float
    seed: int


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


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer: torch's int64 arithmetic wraps around like uint64's."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift (torch's `>>` copies the sign)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def perturb(logits: torch.Tensor, sampling: Sampling, position: int) -> torch.Tensor:
    """One row of fp32 logits [vocab_size] → scores whose argmax is the sample for `position`."""
    scores = logits / sampling.temperature
    if sampling.top_p < 1.0:
        scores = nucleus(scores, sampling.top_p)
    return scores + gumbel_noise(sampling.seed, position, scores.shape[-1], scores.device)


def nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the fewest most probable tokens that together reach `top_p`; the others become -inf."""
    all_probs = torch.softmax(scores, dim=-1)
    probs, order = all_probs.topk(min(NUCLEUS_GUESS, scores.shape[-1]))
    if probs.sum() < top_p:  # a flat distribution: only now sort the whole vocabulary, at ten times the cost
        probs, order = all_probs.sort(descending=True)
    inside = probs.cumsum(-1) - probs < top_p
    inside[0] = True  # the most probable token always stays
    kept = order[inside]
    return torch.full_like(scores, float("-inf")).index_copy(-1, kept, scores[kept])


class SeededSampling(ContinuousBatchingLogitsProcessor):
    """The hook by which continuous batching reaches `perturb`.

    Needs the synchronous batch loop: what `prepare_tensor_args` notes is read by the `__call__` of the same step.
    """

    supported_kwargs = {"sampling": Sampling}
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._rows: list[tuple[int, Sampling, int]] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        self._rows = []
        for row, request in enumerate(requests_with_new_token):
            state = request.state
            sampling = state.logit_processor_kwargs["sampling"]
            if sampling.temperature > 0:
                # counted from the start of the prompt: unchanged when a request is preempted and prefilled again
                self._rows.append((row, sampling, len(state.initial_tokens) + state.generated_len()))
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        for row, sampling, position in self._rows:
            scores[row] = perturb(scores[row], sampling, position)
        return scores


def seeded_sampling_processors() -> ContinuousBatchingLogitsProcessorList:
    """The processor list of an engine: `SeededSampling` alone, with the one argument row that the protocol wants."""
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([SeededSampling()]))
    processors.tensors_required = 1  # counted by the constructor only for processors that it converts itself
    return processors
