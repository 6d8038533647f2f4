"""A PEFT LoRA folder as vLLM reads one (torch on first use).

vLLM knows one rank and one alpha for a whole adapter and would scale layers with their own wrongly without a word; it also
passes over layers that it does not adapt. Here the former are made right and the latter refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge_ray.errors import EngineError, PolicyError

WEIGHTS = "adapter_model.safetensors"
ELSEWHERE = "serve it merged into its base (deploy.merged), or with engine.kind: transformers"


def servable_adapter(folder: Path, max_rank: int, layers: Mapping[str, tuple[int, int]], scratch: Path) -> Path:
    """The folder that vLLM is to read: `folder`, or one in `scratch` with each layer's own scale in its weights.

    `PolicyError` for weights that are not safetensors; `EngineError` for what vLLM cannot serve, or for a rank above
    `max_rank`. `layers` are those of the base that the engine adapts: name → inputs and outputs.
    """
    from safetensors import safe_open

    if not (folder / WEIGHTS).is_file():
        raise PolicyError(f"{folder} has no {WEIGHTS}", hint="export the adapter as safetensors")
    settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name in ("modules_to_save", "use_dora", "lora_bias"):
        if settings.get(name):
            raise EngineError(f"the adapter has {name}={settings[name]}, which vLLM does not serve", hint=ELSEWHERE)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors' own class is not public
        raise EngineError(f"{folder / WEIGHTS} cannot be read: {error}", hint="publish the adapter again") from error
    ranks = {name.removesuffix(".lora_A.weight"): shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    fitting: dict[str, tuple[int, ...]] = {}
    for module, rank in ranks.items():
        inputs, outputs = layers.get(module.removeprefix("base_model.model."), (0, 0))
        fitting |= {f"{module}.lora_A.weight": (rank, inputs), f"{module}.lora_B.weight": (outputs, rank)}
    if not ranks or fitting != shapes:  # vLLM itself would pass over some, and pad others with zeros
        wrong = next((f"{name} {shape}" for name, shape in shapes.items() if fitting.get(name) != shape), "nothing")
        raise EngineError(f"the adapter changes {wrong}, which is no linear layer of this base", hint=ELSEWHERE)
    rank = max(ranks.values())
    if rank > max_rank:
        raise EngineError(
            f"the adapter has rank {rank}; this engine serves up to engine.max_lora_rank={max_rank}",
            hint="raise engine.max_lora_rank, or train the adapter with a lower rank",
        )
    if not (settings.get("rank_pattern") or settings.get("alpha_pattern")):
        return folder
    return _scaled(folder, settings, ranks, scratch)


def _scaled(folder: Path, settings: dict[str, Any], ranks: dict[str, int], scratch: Path) -> Path:
    """A copy whose layers all have the scale that its settings state without patterns."""
    from safetensors.torch import load_file, save_file

    def scale(alpha: float, rank: int) -> float:
        return alpha / (rank**0.5 if settings.get("use_rslora") else rank)

    def own(module: str) -> float:
        """PEFT's rule: the first pattern that is the end of the name."""
        patterns = settings.get("alpha_pattern") or {}
        pattern = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
        return scale(patterns[pattern] if pattern else settings["lora_alpha"], ranks[module])

    stated = scale(settings["lora_alpha"], settings["r"])
    weights = load_file(folder / WEIGHTS)
    for module in ranks:
        weights[f"{module}.lora_B.weight"] *= own(module) / stated
    scratch.mkdir(parents=True, exist_ok=True)
    save_file(weights, scratch / WEIGHTS, metadata={"format": "pt"})
    plain = {**settings, "rank_pattern": {}, "alpha_pattern": {}}
    (scratch / "adapter_config.json").write_text(json.dumps(plain), encoding="utf-8")
    return scratch
