"""Sequence parallelism after DeepSpeed-Ulysses (arXiv:2309.14509): N ranks share each row (level 3).

Every rank of a group is given the same rows and works on its N-th of the positions. All but attention is done position by
position; for attention an all-to-all trades positions for heads, so that a rank has all positions of an N-th of the heads,
and a second one trades back. Losses and gradients are sums over tokens, and all ranks are summed over anyway.

DeepSpeed's own `UlyssesSPAttentionHF` drops the mask and leaves the documents of a packed row to what follows it, which with
sdpa lets them see each other. Here attention runs document by document: no mask of T times T, and nothing to leak.

Shapes: B rows, T positions of a row, S = T / N of a slice, H heads, K heads of keys and values, D of one head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from forge_ray.errors import ConfigError
from forge_ray.train.context import Context

NAME = "forge_sequence_parallel"
ATTENTION = {"full_attention", "sliding_attention"}  # kinds of layers through which positions meet only in `attend`
SCALED_BY_LENGTH = {
    "dynamic",
    "longrope",
}  # rotary embeddings that look at the longest position of a pass: a slice has another


class Slices:
    """One rank's part of its group's rows; with `context.share` 1 the rows as they are. Put into `model` when made."""

    def __init__(self, model: Any, sequence_length: int, context: Context) -> None:
        self.context, self.size, self.place = context, context.share, context.place
        self.documents: list[list[int]] = []
        if self.size > 1:
            _check(model.config.get_text_config(), sequence_length, self.size)
            from transformers import AttentionInterface

            AttentionInterface.register(NAME, self.attend)
            model.set_attn_implementation(NAME)

    def cut(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's positions [B, S] of rows [B, T]. `input_ids` and `loss_mask` have one more, the first of the next
        slice: the token that the slice's last position predicts. `attend` is told the documents of the whole rows."""
        if self.size == 1:
            return batch
        self.documents = [_lengths(row) for row in batch["segment_ids"]]
        width = batch["input_ids"].shape[1] // self.size
        first = self.place * width
        after = {name: F.pad(batch[name], (0, 1))[:, first : first + width + 1] for name in ("input_ids", "loss_mask")}
        return {name: value[:, first : first + width] for name, value in batch.items()} | after

    def attend(
        self,
        module: nn.Module,
        query_BHSD: Tensor,
        key_BKSD: Tensor,
        value_BKSD: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Takes the place of an attention function of transformers; returns [B, S, H, D]."""
        unknown = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
        if unknown or attention_mask is not None:
            raise ConfigError(
                f"train.sequence_parallel={self.size}: this model's attention wants {', '.join(unknown) or 'a mask'}",
                hint="train it with train.sequence_parallel=1",
            )
        heads = query_BHSD.shape[1]
        repeats = _repeats(heads, key_BKSD.shape[1], self.size)
        if repeats > 1:
            key_BKSD, value_BKSD = (x.repeat_interleave(repeats, dim=1) for x in (key_BKSD, value_BKSD))
        query, key, value = (exchange(x, self.context.group, 1, 2) for x in (query_BHSD, key_BKSD, value_BKSD))
        found = by_document(query, key, value, self.documents, scaling, dropout, sliding_window)
        return exchange(found, self.context.group, 2, 1).transpose(1, 2).contiguous(), None


def _check(config: Any, sequence_length: int, size: int) -> None:
    """What can be known of a model and its rows before the first pass."""
    heads = int(config.num_attention_heads)
    if heads % size:
        fitting = [n for n in range(2, heads + 1) if heads % n == 0]
        raise ConfigError(
            f"train.sequence_parallel={size} does not divide the {heads} attention heads of this model",
            hint=f"use one of {', '.join(map(str, fitting))}",
        )
    if sequence_length % size:
        raise ConfigError(
            f"train.sequence_parallel={size} does not divide data.sequence_length={sequence_length}",
            hint=f"prepare the data with data.sequence_length={-(-sequence_length // size) * size}",
        )
    other = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION)
    rope = getattr(config, "rope_parameters", None) or {}
    other += sorted({str(found) for found in (rope.get("rope_type"),) if found in SCALED_BY_LENGTH})
    if other:
        raise ConfigError(
            f"train.sequence_parallel={size}: this model has {', '.join(other)}, which a slice of a row does not give right",
            hint="train it with train.sequence_parallel=1",
        )


def _lengths(segment_ids_T: Tensor) -> list[int]:
    """Of the documents of a row, padding as one of them."""
    return [int(count) for count in torch.unique_consecutive(segment_ids_T, return_counts=True)[1]]


def _repeats(heads: int, kv_heads: int, size: int) -> int:
    """How often each head of keys and values is repeated, so that the group can share them evenly."""
    least = size // math.gcd(size, kv_heads)
    return least if heads // kv_heads % least == 0 else heads // kv_heads


def by_document(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    documents: list[list[int]],
    scaling: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Causal attention inside each document; `documents`: per row the lengths, which add up to T."""
    rows = []
    for row, lengths in enumerate(documents):
        parts = [x[row : row + 1].split(lengths, dim=2) for x in (query_BHTD, key_BKTD, value_BKTD)]
        found = []
        for query, key, value in zip(*parts, strict=True):
            length = query.shape[2]
            mask = None
            if window is not None and length > window:
                ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
                mask = ones.tril() & ~ones.tril(-window)
            found.append(
                F.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    attn_mask=mask,
                    dropout_p=dropout,
                    is_causal=mask is None,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
        rows.append(torch.cat(found, dim=2))
    return torch.cat(rows)


def exchange(tensor: Tensor, group: dist.ProcessGroup | None, scattered: int, gathered: int) -> Tensor:
    """Dimension `scattered` is divided among the ranks of the group, `gathered` put together from them; differentiable."""
    found: Tensor = _Exchange.apply(tensor, group, scattered, gathered)
    return found


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None, scattered: int, gathered: int) -> Tensor:
        ctx.way = group, gathered, scattered
        sent = torch.stack(tensor.chunk(dist.get_world_size(group), scattered))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return torch.cat(tuple(received), dim=gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        group, scattered, gathered = ctx.way
        return exchange(gradients[0], group, scattered, gathered), None, None, None
