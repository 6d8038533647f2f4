"""Attention inside documents only, without a mask.

The rows of a pass are laid end to end, and each document attends to itself: the work grows with the squares of the
documents, not of the rows, and no mask of rows times rows is made. It stands in transformers' table of attention functions,
which hands through what the recipe gives to the model: `cu_seq_lens_q`, the bounds of the documents, as flash attention
wants them.

Shapes: H heads, G key/value heads, N tokens of a pass, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge_ray.errors import ConfigError

NAME = "documents"
KNOWN = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class SharedPrompts:
    """Of a pass without the second copies of prompts (`shared_prompt.py`), M of its N tokens. `tokens_M`: which ones are
    computed, in their order. `places_N`: for each token of the pass, where among them its state is. `sizes`: of each pair in
    turn, the tokens of both together, of the first one alone, of the second one alone; of any other document (0, all, 0)."""

    tokens_M: Tensor
    places_N: Tensor
    sizes: tuple[tuple[int, int, int], ...]


def register() -> str:
    """The name to give as `attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, document_attention)
    return NAME


def refuse_unknown(model: Any) -> None:
    """Raises `ConfigError` for a model whose layers mix tokens in another way: documents in a row would see each other."""
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or KNOWN) - KNOWN
    if others or not model._supports_attention_backend:
        raise ConfigError(
            f"{type(model).__name__} has {', '.join(sorted(others)) or 'an attention of its own'}, which is not kept inside"
            " documents of packed rows",
            hint="take a model with full or sliding-window attention: Llama, Mistral, Qwen, Gemma",
        )


def edges(position_ids_N: Tensor) -> Tensor:
    """Where documents begin (a position of 0) and the last one ends: int32 [documents + 1]."""
    starts = torch.nonzero(position_ids_N == 0).flatten()
    return torch.cat([starts, starts.new_full((1,), len(position_ids_N))]).to(torch.int32)


def bounds(edges: Tensor, shared: SharedPrompts | None = None) -> dict[str, Any]:
    """`edges` by the names that flash attention has for them; the model hands them through to its attention. `shared`: what
    is left out of the pass, whose documents still have these edges."""
    longest = int(edges.diff().max())
    options: dict[str, Any] = {"shared_prompts": shared} if shared else {}
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest} | options


def document_attention(
    module: nn.Module,
    query_1HND: Tensor,
    key_1GND: Tensor,
    value_1GND: Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[1, N, H, D]: softmax(scale Q K^T) V of each document, causal; a token sees `sliding_window` tokens with itself."""
    if options.get("s_aux") is not None:
        raise ConfigError(
            f"{type(module).__name__} attends to sinks, which are not trained here", hint="take another base model"
        )
    edges: Tensor = options["cu_seq_lens_q"]
    shared: SharedPrompts | None = options.get("shared_prompts")
    if query_1HND.is_cuda and query_1HND.dtype != torch.float32 and not dropout and not softcap:
        longest = options["max_length_q"]
        return whole_documents(query_1HND, key_1GND, value_1GND, edges, longest, scaling, sliding_window, shared), None
    sizes = shared.sizes if shared else [(0, size, 0) for size in edges.diff().tolist()]
    options = {"dropout": dropout, "scaling": scaling, "window": sliding_window, "softcap": softcap}
    return _one_by_one(query_1HND, key_1GND, value_1GND, sizes, options), None


def whole_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
    shared: SharedPrompts | None,
) -> Tensor:
    """By a kernel that takes documents as they are: what they share is put into each of them, and left out again."""
    if shared is None:
        return _varlen(query, key, value, edges, longest, scaling, window)
    query, key, value = (part.index_select(2, shared.places_N) for part in (query, key, value))
    return _varlen(query, key, value, edges, longest, scaling, window).index_select(1, shared.tokens_M)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of documents differs from pass to pass
def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, sizes: Sequence[tuple[int, int, int]], options: dict[str, Any]
) -> Tensor:
    """`sizes`: as in `SharedPrompts`."""
    dtype, groups = query.dtype, query.shape[1] // key.shape[1]
    if not query.is_cuda:  # its kernel takes half the time in fp32 that it takes in bf16
        query, key, value = query.float(), key.float(), value.float()
    if groups > 1:  # the fast kernels want as many heads on both sides
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    # no part is empty: each costs the backward pass a tensor
    lengths = [length for prompt, first, second in sizes for length in (prompt + first, second) if length]
    parts = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    attended = []
    for prompt, _, second in sizes:
        its_query, its_key, its_value = next(parts)
        attended.append(_attend(its_query, its_key, its_value, **options))
        if second:
            prompt_key, prompt_value = its_key[:, :, :prompt], its_value[:, :, :prompt]
            its_query, its_key, its_value = next(parts)
            its_keys, its_values = torch.cat([prompt_key, its_key], dim=2), torch.cat([prompt_value, its_value], dim=2)
            attended.append(_attend(its_query, its_keys, its_values, **options))
    return torch.cat(attended, dim=2).transpose(1, 2).to(dtype)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Of a document, or of its last tokens alone: fewer queries than keys."""
    length = key.shape[2]
    if not softcap and (window is None or length <= window) and query.shape[2] == length:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    place = torch.arange(length, device=query.device)
    distance = place[length - query.shape[2] :, None] - place[None, :]
    seen = (distance >= 0) & (distance < (window or length))
    if not softcap:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=dropout, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, edges: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    """Flash attention over all documents in one kernel: [N, H, D] each."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    left = -1 if window is None else window - 1
    size, narrower = v.shape[2], q.shape[2] - v.shape[2]
    out = varlen_attn(
        q,
        k,
        F.pad(v, (0, narrower)) if narrower else v,  # one head size for all (latent attention has two)
        edges,
        edges,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None, ..., :size]
