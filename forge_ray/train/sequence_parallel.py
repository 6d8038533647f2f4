"""Sequence parallelism after DeepSpeed-Ulysses (arXiv:2309.14509): N ranks share the rows of a pass.

Every rank of a group is given the same rows and works on its N-th of the positions. All but attention is done position by
position; for attention an all-to-all trades positions for heads, so that a rank has all positions of an N-th of the heads,
and a second one trades back. Losses and gradients are sums over tokens, and all ranks are summed over anyway.

DeepSpeed's own `UlyssesSPAttentionHF` drops the mask and leaves the documents of a packed row to what follows it, which with
sdpa lets them see each other. Here what follows is `attention.document_attention`.

Shapes: P positions of a pass (its rows end to end), S = P / N of a slice, H heads, G key/value heads, D of one head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from forge_ray.errors import ConfigError
from forge_ray.train import attention
from forge_ray.train.context import Context
from forge_ray.train.method import STORED, Column

NAME = "forge_sequence_parallel"
SCALED_BY_LENGTH = {"dynamic", "longrope"}  # rotary embeddings that look at the longest position: a slice has another


class Slices:
    """One rank's part of its group's rows; with `context.sp_size` 1 the rows as they are. Put into `model` when made.

    `columns` are those that a method adds: one per token is cut as the rows are, the others are whole on every rank."""

    def __init__(self, model: Any, sequence_length: int, context: Context, columns: tuple[Column, ...] = ()) -> None:
        self.context, self.size, self.rank = context, context.sp_size, context.sp_rank
        self.per_token = {column.name for column in (*STORED, *columns) if column.per == "token"}
        if self.size > 1:
            _check(model.config.get_text_config(), sequence_length, self.size)
            from transformers import AttentionInterface

            AttentionInterface.register(NAME, self.attend)
            model.set_attn_implementation(NAME)

    def cut(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's positions [1, S] of rows [B, T]. `input_ids` and `loss_mask` have one more, the first of the next
        slice: the token that the slice's last position predicts. `edges` are those of the documents of the whole rows."""
        if self.size == 1:
            return batch
        flat = {name: value.reshape(1, -1, *value.shape[2:]) for name, value in batch.items() if name in self.per_token}
        whole = {name: value for name, value in batch.items() if name not in self.per_token}
        width = flat["input_ids"].shape[1] // self.size
        first = self.rank * width
        after = {name: F.pad(flat[name], (0, 1))[:, first : first + width + 1] for name in ("input_ids", "loss_mask")}
        edges = {"edges": attention.edges(flat["position_ids"][0])}
        return {name: value[:, first : first + width] for name, value in flat.items()} | after | edges | whole

    def attend(
        self,
        module: nn.Module,
        query_1HSD: Tensor,
        key_1GSD: Tensor,
        value_1GSD: Tensor,
        attention_mask: None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Takes the place of `document_attention`; returns [1, S, H, D]."""
        repeats = _repeats(query_1HSD.shape[1], key_1GSD.shape[1], self.size)
        if repeats > 1:
            key_1GSD, value_1GSD = (x.repeat_interleave(repeats, dim=1) for x in (key_1GSD, value_1GSD))
        query, key, value = (exchange(x, self.context.group, 1, 2) for x in (query_1HSD, key_1GSD, value_1GSD))
        attended, _ = attention.document_attention(module, query, key, value, attention_mask, **options)
        return exchange(attended, self.context.group, 1, 2).contiguous(), None


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
    rope = getattr(config, "rope_parameters", None) or {}
    scaling = rope.get("rope_type")
    if scaling in SCALED_BY_LENGTH:
        raise ConfigError(
            f"train.sequence_parallel={size}: this model has {scaling} rotary embeddings, whose scaling depends on the full"
            " sequence length",
            hint="train it with train.sequence_parallel=1",
        )


def _repeats(heads: int, kv_heads: int, size: int) -> int:
    """How often each head of keys and values is repeated, so that the group can share them evenly."""
    least = size // math.gcd(size, kv_heads)
    return least if heads // kv_heads % least == 0 else heads // kv_heads


def exchange(tensor: Tensor, group: dist.ProcessGroup | None, scattered: int, gathered: int) -> Tensor:
    """Dimension `scattered` is divided among the ranks of the group, `gathered` put together from them; differentiable."""
    exchanged: Tensor = _Exchange.apply(tensor, group, scattered, gathered)  # type: ignore[no-untyped-call]
    return exchanged


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
