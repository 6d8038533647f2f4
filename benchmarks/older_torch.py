"""What a torch before the lock's lacks, replaced for a benchmark and said by name: a machine's own torch may be older."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch


def bridge() -> list[str]:
    """Replaces what is lacking in this process; returns what was, each with what is done instead."""
    from torch.nn.attention import varlen

    attend = varlen.varlen_attn
    if "enable_gqa" in inspect.signature(attend).parameters:
        return []
    setattr(varlen, "varlen_attn", repeating(attend))  # noqa: B010  (another signature than the one that mypy sees)
    return [f"torch {torch.__version__}: varlen_attn takes no grouped heads; keys and values are repeated, which costs time"]


def repeating(attend: Any) -> Any:
    """`varlen_attn` with `enable_gqa`, by keys and values [N, G, D] repeated to as many heads as the queries have."""

    @functools.wraps(attend)
    def attention(query: Any, key: Any, value: Any, *bounds: Any, enable_gqa: bool = False, **options: Any) -> Any:
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return attend(query, key, value, *bounds, **options)

    return attention
