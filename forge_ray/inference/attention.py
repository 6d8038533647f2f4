"""Attention of one packed step over the paged cache.

transformers lays the tokens of all requests end to end and lets every one see the keys of every request through a mask: work
that grows with the square of the batch. Here the requests that add one token (decoding) are one call on their own pages,
padded to the longest; each prompt is one more call. On an ordinary forward pass it is torch's own function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PAGED = "forge_paged"
FULL = "full_attention"
FEW_TOKENS = 64  # of a prompt, for which the mask is repeated instead of the keys


@dataclass(frozen=True)
class PromptSpan:
    """Tokens `start`..`stop` of the step belong to one request; `pages` of the cache hold what it read before, and these."""

    start: int
    stop: int
    pages: torch.Tensor  # [pages]
    mask: torch.Tensor | None  # [tokens, all tokens so far] in the model's dtype; None: nothing was read before


@dataclass(frozen=True)
class StepLayout:
    """Which tokens of a step belong together; computed once per step, read by every layer."""

    decoding: torch.Tensor | None  # [rows] positions in the step of requests with one token; None: all, in order
    pages: torch.Tensor  # [rows, pages] of these, padded with page 0
    mask: torch.Tensor  # [rows, 1, 1, pages * page_size] in the model's dtype: 0 where a token is, else -inf
    prompts: tuple[PromptSpan, ...]


def can_page(model: Any) -> bool:
    """Whether every layer attends to everything before it, by torch's own function: no windows, no capped scores."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [FULL])
    windowed = getattr(config, "sliding_window", None) is not None and not getattr(config, "layer_types", None)
    return model.config._attn_implementation == "sdpa" and kinds == {FULL} and not windowed


def step_of(requests: Sequence[FutureRequestState], cache: PagedAttentionCache, dtype: torch.dtype) -> StepLayout:
    """The plan of a step whose tokens are already counted in each request's `position_offset`."""
    allocator = cache.cache_allocators[FULL]
    page_size, stride = allocator.tokens_per_page, allocator.block_physical_stride // allocator.tokens_per_page
    device = cache.device
    rows: list[int] = []
    tables: list[list[int]] = []
    lengths: list[int] = []
    prompts: list[PromptSpan] = []
    at = 0
    for request in requests:
        length, num = request.state.position_offset, request.query_length
        pages = [block * stride for block in allocator.block_table[request.state.request_id][: -(-length // page_size)]]
        if num == 1:
            rows.append(at)
            tables.append(pages)
            lengths.append(length)
        else:
            mask = None
            if length > num:
                mask = torch.full((num, length), float("-inf"), dtype=dtype, device=device).triu_(length - num + 1)
            prompts.append(PromptSpan(at, at + num, torch.tensor(pages, device=device), mask))
        at += num
    width = max(map(len, tables), default=0)
    places = torch.arange(width * page_size, device=device)
    seen = places < torch.tensor(lengths, device=device)[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
    return StepLayout(
        decoding=None if len(rows) == at else torch.tensor(rows, dtype=torch.long, device=device),
        pages=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.long, device=device),
        mask=mask[:, None, None, :],
        prompts=tuple(prompts),
    )


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cache: PagedAttentionCache | None = None,
    step: StepLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, heads, tokens, head_dim] → [1, tokens, heads, head_dim]."""
    if cache is None or step is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    keys, values = cache.cache_allocators[FULL].get_cache_for_block_table(module.layer_idx)  # type: ignore[arg-type]
    written = kwargs["write_index"][0]
    key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [tokens, kv_heads, head_dim]
    keys.flatten(0, 1).index_copy_(0, written, key)
    values.flatten(0, 1).index_copy_(0, written, value)
    query = query[0].transpose(0, 1)  # [tokens, heads, head_dim]
    if step.decoding is None:
        return _decode(query, keys, values, step, scaling)[None], None
    out = torch.empty((query.shape[0], query.shape[1], value.shape[-1]), dtype=query.dtype, device=query.device)
    if len(step.decoding):
        out[step.decoding] = _decode(query[step.decoding], keys, values, step, scaling)
    for prompt in step.prompts:
        part = slice(prompt.start, prompt.stop)
        if prompt.mask is None:
            seen, kept = key[None, part], value[None, part]
        else:
            seen, kept = (_gather(kind, prompt.pages)[:, : prompt.mask.shape[1]] for kind in (keys, values))
        out[part] = _read(query[part], seen, kept, scaling, prompt.mask)
    return out[None], None


def _decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: StepLayout, scaling: float | None
) -> torch.Tensor:
    """query [rows, heads, head_dim] → the same shape. The heads that share a key stand as so many queries: each key is read
    once."""
    rows, heads, width = query.shape
    grouped = query.view(rows, keys.shape[2], -1, width)
    seen, kept = (_gather(part, step.pages).transpose(1, 2) for part in (keys, values))
    return scaled_dot_product_attention(grouped, seen, kept, attn_mask=step.mask, scale=scaling).reshape(rows, heads, -1)


def _gather(pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[all pages, page_size, kv_heads, head_dim] at [rows, pages] → [rows, pages * page_size, kv_heads, head_dim]."""
    rows = table.shape[0] if table.dim() == 2 else 1
    return pages.index_select(0, table.flatten()).view(rows, -1, *pages.shape[2:])


def _read(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """Tokens of one prompt: query [tokens, heads, head_dim], keys [1, seen, kv_heads, head_dim]; causal without a mask.

    However few the tokens are, all keys are read: then heads that share a key stand as so many queries, as in `_decode`.
    """
    tokens, heads, width = query.shape
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    num_shared = heads // key.shape[1]
    if mask is not None and tokens <= FEW_TOKENS:
        grouped = query.view(tokens, -1, num_shared, width).permute(1, 2, 0, 3).reshape(1, -1, num_shared * tokens, width)
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask.repeat(num_shared, 1), scale=scaling)
        return out.reshape(heads, tokens, -1).transpose(0, 1)  # on a GPU its layout is another one
    key, value = (part.repeat_interleave(num_shared, dim=1) for part in (key, value))
    out = scaled_dot_product_attention(
        query.transpose(0, 1)[None], key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
    )
    return out[0].transpose(0, 1)


AttentionInterface.register(PAGED, paged_attention)
AttentionMaskInterface.register(PAGED, sdpa_mask)
