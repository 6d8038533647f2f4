"""Vectors of texts: the mean of a decoder's last hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

MAX_INPUTS = 16  # per forward pass


@torch.inference_mode()
def mean_states(model: PreTrainedModel, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
    """One vector of unit length per input, [hidden_size]: the mean over its tokens, in fp32, after the last norm."""
    device = model.device
    lengths = torch.tensor([len(ids) for ids in inputs], device=device)
    width = int(lengths.max())
    padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in inputs], device=device)
    real = torch.arange(width, device=device) < lengths[:, None]
    states = model.get_decoder()(input_ids=padded, attention_mask=real.long(), use_cache=False).last_hidden_state
    mean = (states.float() * real[..., None]).sum(dim=1) / lengths[:, None]
    vectors: list[list[float]] = torch.nn.functional.normalize(mean, dim=-1).tolist()
    return vectors
