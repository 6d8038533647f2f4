"""Several LoRA adapters in one model: every row of a step uses its own.

All adapters that are in use stand side by side in two matrices per layer, and a mask keeps each row to its own columns:
three operations a layer, however many adapters. A row without an adapter gets the base's product plus an exact zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from forge_ray.errors import EngineError, PolicyError
from forge_ray.inference.projection import AdapterRows, Product, Projection, Stack, Weight

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MERGED = "deploy it merged into its base: `merged:` in the deployment's file"
Layer = Projection | torch.nn.Linear
SLACK = 4  # adapters that are out of use stay loaded until they are this many times as wide
# Settings of PEFT's that change more than two matrices next to a linear layer, or the base itself
OTHER = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "arrow_config",
    "alora_invocation_tokens",
    "megatron_config",
    "fan_in_fan_out",
)
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of init_lora_weights: those that leave the base as it is


@dataclass(frozen=True)
class Lora:
    """One adapter: per layer `down` [rank, in] and `up` [out, rank], the scale in the latter."""

    parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def width(self) -> int:
        return max(down.shape[0] for down, _ in self.parts.values())


class Adapters:
    """The loaded adapters, and which row of the running step has which. `load` may be called while a step runs; `use` only
    by the thread that runs it."""

    def __init__(self, products: Sequence[Product], rows: AdapterRows) -> None:
        self._products = products
        self._rows = rows
        self._loaded: dict[str, Lora] = {}
        self._resident: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    def load(self, name: str, lora: Lora) -> None:
        self._loaded[name] = lora

    def unload(self, name: str) -> None:
        """The generation thread must be paused."""
        self._loaded.pop(name, None)
        if name in self._resident:
            self._reside(())

    def use(self, names: Sequence[str], counts: Sequence[int] | None = None) -> None:
        """The adapters of the coming step's rows: `counts[i]` rows of `names[i]` ("" for none); one name without counts
        stands for all rows."""
        active = {name for name in names if name}
        self._rows.masks.clear()
        if not active:
            self._rows.adapters = None
            return
        width = sum(self._loaded[name].width for name in active)
        kept = sum(self._loaded[name].width for name in self._resident)
        if not active <= set(self._resident) or kept > SLACK * width:
            self._reside(tuple(sorted(active)))
        number = {name: index for index, name in enumerate(self._resident)}
        rows = chain.from_iterable(repeat(number.get(name, -1), n) for name, n in zip(names, counts or [1], strict=True))
        device = self._products[0].weight.data.device
        self._rows.adapters = torch.tensor(list(rows), device=device)

    def _reside(self, names: tuple[str, ...]) -> None:
        """Put these side by side in every layer that one of them changes."""
        self._resident = names
        for product in self._products:
            product.stack = _stack(product, [self._loaded[name] for name in names])


def _stack(product: Product, loras: Sequence[Lora]) -> Stack | None:
    """Each adapter's columns write to the rows of their own layer alone."""
    downs, ups, columns = [], [], []
    ends = list(accumulate(product.sizes))
    for number, lora in enumerate(loras):
        for layer, end, size in zip(product.names, ends, product.sizes, strict=True):
            if layer in lora.parts:
                down, up = lora.parts[layer]
                downs.append(down)
                ups.append(torch.nn.functional.pad(up, (0, 0, end - size, ends[-1] - end)))
                columns += [number] * down.shape[0]
    if not downs:
        return None
    return Stack(Weight(torch.cat(downs)), Weight(torch.cat(ups, dim=1)), tuple(columns))


def read_adapter(folder: Path, layers: Mapping[str, Layer], max_rank: int | None, like: torch.Tensor) -> Lora:
    """A PEFT LoRA folder for these layers, in the dtype and on the device of `like`. `PolicyError` for pickled weights,
    `EngineError` for what only a merged deployment can serve."""
    if not (folder / WEIGHTS).is_file():
        raise PolicyError(f"{folder} has no {WEIGHTS}", hint="export the adapter as safetensors")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _check_config(config)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        layer, _, half = key.removeprefix(PREFIX).rpartition(".lora_")
        if half not in ("A.weight", "B.weight") or layer not in layers:
            raise EngineError(f"the adapter changes {key!r}, which is not a linear layer of the decoder", hint=MERGED)
        halves.setdefault(layer, {})[half[0]] = tensor
    if not halves:
        raise EngineError("the adapter has no weights", hint="export it again")
    return Lora({layer: _scaled(layer, pair, layers[layer], config, max_rank, like) for layer, pair in halves.items()})


def _check_config(config: dict[str, Any]) -> None:
    other = [f"{name}={config[name]!r}" for name in OTHER if config.get(name)]
    if config.get("bias", "none") != "none":
        other.append(f"bias={config['bias']!r}")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        other.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if config.get("peft_type", "LORA") != "LORA":
        other.append(f"peft_type={config['peft_type']!r}")
    if other:
        raise EngineError(f"the adapter has {', '.join(other)}: it cannot be served alongside others", hint=MERGED)


def _scaled(
    layer: str,
    pair: Mapping[str, torch.Tensor],
    linear: Layer,
    config: dict[str, Any],
    max_rank: int | None,
    like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    from peft.utils.other import get_pattern_key

    down, up = pair.get("A"), pair.get("B")
    expected = f"A [rank, {linear.in_features}] and B [{linear.out_features}, rank]"
    if (
        down is None
        or up is None
        or (down.shape[1], up.shape[0], down.shape[0])
        != (
            linear.in_features,
            linear.out_features,
            up.shape[1],
        )
    ):
        shapes = {half: tuple(tensor.shape) for half, tensor in pair.items()}
        raise EngineError(
            f"{layer}: the adapter has {shapes}, the layer takes {expected}", hint="is it this model's adapter?"
        )
    rank = down.shape[0]
    if max_rank is not None and rank > max_rank:
        raise EngineError(
            f"{layer}: rank {rank} exceeds engine.max_lora_rank={max_rank}", hint="raise it, or deploy the adapter merged"
        )
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), layer), config.get("lora_alpha", 8))
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    up = up.to(torch.float32) * scale
    return down.to(device=like.device, dtype=like.dtype), up.to(device=like.device, dtype=like.dtype)
