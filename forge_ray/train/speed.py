"""How much of the machine a step uses: model FLOPs against the peak, and memory.

    FLOPs of a step = tokens (4 N + 2 T + 6 L D d) + trained tokens V H (4, or 6 where the head is trained)

N: weights of the linear layers in the blocks that a token passes (of a mixture: its experts), an adapter's included; T: the
trained ones among them. Forward takes 2 N, gradients of inputs 2 N, of weights 2 T: 6 N where all are trained. L layers of
D = heads x head size attend to d / 2 positions on average, d being the mean length of a document. V H: the head, computed
at trained positions only. Gradients of inputs count in frozen layers below the first trained one too, where none is
computed. What activation checkpointing computes twice does not count (model FLOPs, arXiv:2204.02311). A prompt that both
answers of a pair have counts in each of them, though it is computed once (`shared_prompt.py`).
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from forge_ray.config.train import TrainConfig
from forge_ray.machine.hardware import gpu_named
from forge_ray.models.architecture import Head
from forge_ray.records import DatasetManifest
from forge_ray.train.adapter import active_share, is_expert
from forge_ray.train.metrics import StepClock
from forge_ray.train.model import DTYPES
from forge_ray.train.plan import OUTSIDE, Model


@dataclass(frozen=True)
class Flops:
    """Of one token, and more of one that is trained."""

    per_token: float
    per_trained_token: float

    def of(self, tokens: float, trained_tokens: float) -> float:
        return tokens * self.per_token + trained_tokens * self.per_trained_token


class Meter:
    """Where the time of a step goes, and how much of the machine it used. `flops` None: the architecture is not known."""

    def __init__(self, flops: Flops | None, peak: float, world_size: int, first_step: int) -> None:
        self.flops, self.peak, self.world_size, self.first_step = flops, peak, world_size, first_step
        self._clock, self._began = StepClock(), time.perf_counter()
        self._step_began = self._began

    def begin(self) -> None:
        """A step begins."""
        self._step_began = time.perf_counter()

    def measure(self, part: str) -> AbstractContextManager[None]:
        """What is done inside counts as `part` of the step."""
        return self._clock.measure(part)

    def line(self, step: int, total_steps: int, tokens: float, trained_tokens: float) -> dict[str, float]:
        """`times`, the share of the peak (`mfu`), and the seconds that are left (`eta_s`)."""
        line = self.times(tokens, trained_tokens)
        if self.flops and self.peak:
            line["mfu"] = self.flops.of(tokens, trained_tokens) / line["seconds"] / self.peak / self.world_size
        done = step - self.first_step
        return line | {"eta_s": (time.perf_counter() - self._began) / done * (total_steps - step)}

    def times(self, tokens: float, trained_tokens: float) -> dict[str, float]:
        """Seconds of the step so far, of its parts since the last call, and its tokens per second."""
        seconds = time.perf_counter() - self._step_began
        parts = {f"{part}_s": spent for part, spent in self._clock.take().items()}
        rates = {"tokens_per_s": int(tokens) / seconds, "trained_tokens_per_s": int(trained_tokens) / seconds}
        return {"seconds": seconds, **parts, **rates}


def flops(folder: Path, config: TrainConfig, dataset: DatasetManifest) -> Flops | None:
    """From the configuration of the base model; None for an architecture whose numbers are not where they usually are."""
    try:
        model = Model.of(folder, Head(config.targets))
        numbers, stats = model.config, dataset.splits["train"]
        hidden, heads = int(numbers["hidden_size"]), int(numbers["num_attention_heads"])
        attention = int(numbers["num_hidden_layers"]) * heads * int(numbers.get("head_dim") or hidden // heads)
        head = model.num_logits * hidden
    except (KeyError, TypeError, ValueError, OSError):
        return None
    active = active_weights(model, model.shapes)
    outputs = [name for name in model.shapes if "lm_head" in name] or [name for name in model.shapes if "embed" in name]
    changed = model.saved(config.adapter) if config.adapter else model.trained(config)
    low_rank = model.num_trained(config) - sum(map(math.prod, changed.values())) if config.adapter else 0
    passed, trained = active + low_rank, active_weights(model, changed) + low_rank
    document = stats.num_tokens / max(stats.num_records, 1)
    return Flops(4 * passed + 2 * trained + 6 * attention * document, head * (6 if changed.keys() & set(outputs) else 4))


def active_weights(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Of some weights of the model, those of the matrices inside the blocks that one token is multiplied with."""
    share, total = active_share(model.config), 0.0
    for name, shape in shapes.items():
        if len(shape) >= 2 and name not in model.outside and not any(part in name for part in OUTSIDE):
            total += math.prod(shape) * (share if is_expert(name) else 1.0)
    return total


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of one worker: of the data sheet for a known card in bf16, else of a large matrix product, measured now."""
    if device.type == "cuda" and precision == "bf16" and (card := gpu_named(torch.cuda.get_device_name(device))):
        return card.flops
    size = 8192 if device.type == "cuda" else 768
    matrix, best = torch.ones(size, size, dtype=DTYPES[precision], device=device), math.inf
    for _ in range(5):
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def peak_bytes(device: torch.device) -> float:
    """The most memory that this process has held: of its GPU, else of the machine."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
