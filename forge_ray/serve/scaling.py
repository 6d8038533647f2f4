"""How many replicas (no torch): so many that each holds about `target_tokens`.

Requests are a poor measure: one may be ten tokens, the next ten thousand. A replica counts the tokens of what runs and what
waits in its engines, prompts and what may still be generated.
"""

from __future__ import annotations

import math
from typing import Any


class TokensPolicy:
    """A Ray Serve autoscaling policy; Serve applies the delays and the bounds to what it wants."""

    def __init__(self, target_tokens: int) -> None:
        self.target_tokens = target_tokens

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """`ctx`: `ray.serve.config.AutoscalingContext`. Requests that wait in front of all replicas keep one at least."""
        told = (ctx.aggregated_metrics or {}).get("tokens", {})
        if not told and ctx.current_num_replicas:  # they are starting: too early to judge
            return ctx.target_num_replicas, {}
        wanted = math.ceil(sum(told.values()) / self.target_tokens)
        return max(wanted, 1 if ctx.total_num_requests > 0 else 0), {}
