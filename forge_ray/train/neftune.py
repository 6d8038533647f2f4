"""NEFTune (arXiv:2310.05914): uniform noise on the embeddings of training rows.

Shapes: N tokens of a pass, d hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def add_noise(model: Any, alpha: float) -> None:
    """From now on, in training mode alone, each embedding of `model` gets noise drawn from (-s, s), s = alpha / sqrt(L d).
    L is the number of tokens of its own document, not of the packed row. Drawn from torch's random state, so that a step
    that is repeated from the same state, and a resumed run, see the same noise."""
    lengths_N: list[Tensor] = []  # of the pass that is running

    def keep_lengths(_: Any, args: Any, inputs: dict[str, Any]) -> None:
        lengths, shared = inputs["cu_seq_lens_q"].diff().long(), inputs.get("shared_prompts")
        of_tokens = lengths.repeat_interleave(lengths)
        lengths_N[:] = [of_tokens[shared.tokens_M] if shared else of_tokens]

    def noisy(embedding: Any, _: Any, embeddings_1Nd: Tensor) -> Tensor:
        if not embedding.training:
            return embeddings_1Nd
        scale_N1 = alpha / (lengths_N[0] * embeddings_1Nd.shape[-1]).float().sqrt()[:, None]
        noise = torch.empty_like(embeddings_1Nd, dtype=torch.float32).uniform_(-1.0, 1.0)
        return embeddings_1Nd + (noise * scale_N1).to(embeddings_1Nd.dtype)

    model.register_forward_pre_hook(keep_lengths, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(noisy)
