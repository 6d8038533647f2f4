"""Autoscaling (no torch): as many replicas as hold about `target_tokens` each.

The number of requests is a poor measure: one may have ten tokens, the next ten thousand. A replica counts the tokens of the
requests that run and wait in its engines: prompts and what may still be generated.
"""

from __future__ import annotations

import math
from typing import Any


class TokensPolicy:
    """A Ray Serve autoscaling policy; Serve applies the delays and the bounds to its result."""

    def __init__(self, target_tokens: int) -> None:
        self.target_tokens = target_tokens

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """`ctx`: `ray.serve.config.AutoscalingContext`. At least one replica while requests wait in front of all of them."""
        tokens = (ctx.aggregated_metrics or {}).get("tokens", {})
        if not tokens and ctx.current_num_replicas:  # they are starting: too early to decide
            return ctx.target_num_replicas, {}
        num_replicas = math.ceil(sum(tokens.values()) / self.target_tokens)
        return max(num_replicas, 1 if ctx.total_num_requests > 0 else 0), {}
