"""Learning rate and number of steps: pure functions, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from forge_ray.config.optimizer import Schedule
from forge_ray.config.train import TrainConfig


def num_steps(config: TrainConfig, num_rows: int) -> int:
    """Optimizer steps of the whole run: `epochs` over the rows, rounded up, or `max_steps` if that is less."""
    steps = max(1, math.ceil(config.epochs * num_rows / config.global_batch))
    return min(steps, config.max_steps) if config.max_steps else steps


def learning_rate(step: int, total: int, peak: float, schedule: Schedule) -> float:
    """Rate of step `step` (from 0): linear warm-up to `peak`, then to `peak * min_lr_ratio` as the name says."""
    warmup = round(schedule.warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    first = warmup  # the first step of the decay is at the peak still
    if schedule.name == "wsd":
        first = max(total - 1 - max(1, round(schedule.decay_ratio * total)), warmup - 1, 0)
    progress = min(1.0, max(0, step - first) / max(1, total - 1 - first))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - progress
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * shape)
