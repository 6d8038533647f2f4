"""Training a reward model: a head of one number, read at the last token of each document, on pairs of a preferred answer y
and a rejected one z to one prompt, whose documents stand in one packed row (`data/tokens/units.py`).

    -log s(r(y) - r(z)), s the sigmoid        (R. A. Bradley, M. E. Terry, Biometrika 39, 1952; arXiv:2203.02155, eq. 1)

Losses are divided by the pairs of the whole step: a prompt with several pairs counts as often as it has them. The token that
is read is the last one that is not the pad token, as transformers' class reads it: where a model pads with the token that
ends a turn, the one before that. Left out: margins, and a pull of the rewards to a mean of zero.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from forge_ray.config.classify import REWARD
from forge_ray.data.dataset.version import load_tokenizer
from forge_ray.models.architecture import Head
from forge_ray.train import attention
from forge_ray.train.job import TrainJob
from forge_ray.train.method import Batch, Forward, Method, Sums
from forge_ray.train.methods.preference import num_pairs
from forge_ray.train.shared_prompt import shared_prompts


def reward(job: TrainJob) -> Method:
    pad_id = load_tokenizer(job.store, job.base.id).pad_id
    return Method(loss=partial(loss, pad_id), weight=num_pairs, head=Head((REWARD,)))


def loss(pad_id: int, forward: Forward, batch: Batch) -> Sums:
    """A pass without a pair reads the first token, whose reward is not used."""
    last_K = last_tokens(pad_id, batch)
    is_blank = not len(last_K)
    read_K, shared = last_K.new_zeros(2) if is_blank else last_K, shared_prompts(batch)
    ids, positions = (batch[name].reshape(1, -1) for name in ("input_ids", "position_ids"))
    output = forward(
        input_ids=ids[:, shared.tokens_M] if shared else ids,
        position_ids=positions[:, shared.tokens_M] if shared else positions,
        logits_to_keep=shared.places_N[read_K] if shared else read_K,
        use_cache=False,
        **attention.bounds(attention.edges(positions[0]), shared),
    )
    rewards_K = output.logits[0, :, 0].float()
    margins_P = (rewards_K[0::2] - rewards_K[1::2])[: 0 if is_blank else None]
    metrics = {"pair_accuracy": (margins_P > 0).sum(), "reward_margin": margins_P.sum()}
    return Sums(-F.logsigmoid(margins_P).sum() + 0 * rewards_K.sum(), metrics)


def last_tokens(pad_id: int, batch: Batch) -> Tensor:
    """Where each document of the pass is read, in the order of its rows laid end to end: int64 [K]."""
    segments_BT, (num_rows, length) = batch["segment_ids"], batch["input_ids"].shape
    num_segments = 1 + int(segments_BT.max())  # and segment 0, of padding
    places_N = torch.arange(num_rows * length, device=segments_BT.device)
    owners_N = places_N // length * num_segments + segments_BT.flatten()
    read_N = torch.where(batch["input_ids"].flatten() != pad_id, places_N, -1)
    lasts = places_N.new_full((num_rows * num_segments,), -1).scatter_reduce(0, owners_N, read_N, "amax")
    documents = lasts.view(num_rows, num_segments)[:, 1:].flatten()
    return documents[documents >= 0]
