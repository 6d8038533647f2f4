"""Settings that a GGUF file has and transformers' reader passes over: scaled positions, and the width of experts.

Positions, as llama.cpp reads them: `linear` and `yarn` are metadata (`rope.scaling.*`); of `llama3` the file holds a divisor
for each pair of a head (`rope_freqs.weight`), not the settings that they follow from. Those are put into a key of our own
(`SETTINGS_KEY`); of files from elsewhere the published ones are tried. Settings count only where their divisors are those of
the file; what is in none of these forms is refused, for the model would compute other positions.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf

from forge_ray.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS_KEY = "forge.rope_parameters"
FREQUENCIES = "rope_freqs.weight"
PLAIN = {"rope_type", "rope_theta", "partial_rotary_factor"}
LINEAR = {"factor"}
YARN = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
TYPES = {"default": frozenset[str](), "linear": LINEAR, "yarn": YARN, "llama3": LLAMA3}
PUBLISHED = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CLOSE = 1e-4  # relative: other converters compute divisors in other steps


def add_rope(writer: gguf.GGUFWriter, config: Any, hint: str) -> None:
    """Write the settings of positions of a transformers configuration. Raises `ConfigError` for one that llama.cpp has no
    name for."""
    rope, window = full_and_window(config)
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    if "rope_theta" in window:
        writer.add_rope_freq_base_swa(window["rope_theta"])
    kind = rope.get("rope_type", "default")
    other = _set(rope).keys() - TYPES.get(kind, frozenset()) - PLAIN
    if kind not in TYPES or other or window.get("rope_type", "default") != "default":
        named = f" with {', '.join(sorted(other))}" if kind in TYPES and other else ""
        what = f"rope_parameters of rope_type {kind!r}{named}"
        raise ConfigError(f"{what} have no name in GGUF as this package writes it", hint=hint)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name, method in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                method(rope[name])
    if kind == "llama3":
        writer.add_string(SETTINGS_KEY, json.dumps({name: rope[name] for name in sorted(LLAMA3 | {"rope_type"})}))


def full_and_window(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """`rope_parameters` of the layers that see everything, and of those with a window where they have their own."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:
        return rope["full_attention"], rope.get("sliding_attention") or {}
    return rope, {}


def divisors(config: Any) -> Tensor | None:
    """[head / 2] what the frequency of each pair is divided by, as `rope_freqs.weight` has it; None where that is not how
    the positions are scaled."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, _ = full_and_window(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head = 2 * len(scaled)
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float32) / head))
    values: Tensor = (plain / scaled).float()
    return values


def apply_settings(config: Any, file: gguf.GGUFReader) -> None:
    """Put into a configuration what the file says and transformers does not read. Raises `ConfigError` for positions that
    cannot be computed as the file means them."""
    architecture = _value(file, "general.architecture")
    width = _value(file, f"{architecture}.expert_feed_forward_length")
    if width is not None and hasattr(config, "moe_intermediate_size"):
        config.moe_intermediate_size = width
    rope = _scaling(file, architecture) or _of_divisors(config, file)
    if rope:
        current, window = full_and_window(config)
        config.rope_parameters = (
            {"full_attention": {**current, **rope}, "sliding_attention": window} if window else {**current, **rope}
        )
    _check_divisors(config, file)


def _scaling(file: gguf.GGUFReader, architecture: str) -> dict[str, Any]:
    prefix = f"{architecture}.rope.scaling"
    kind = _value(file, f"{prefix}.type")
    if kind in (None, "none"):
        return {}
    names = {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    values = {ours: _value(file, f"{prefix}.{theirs}") for theirs, ours in names.items()}
    rope = {name: value for name, value in values.items() if value is not None and name in TYPES.get(kind, ())}
    known_keys = {f"{prefix}.{name}" for name in ("type", "finetuned", *names)}
    other = sorted(key for key in file.fields if key.startswith(f"{prefix}.") and key not in known_keys)
    if kind not in ("linear", "yarn") or other or "factor" not in rope:
        raise ConfigError(
            f"the GGUF file scales positions by {prefix}.type={kind!r}{f' with {other[0]}' if other else ''}, which is not"
            " read here",
            hint="import the model's folder with safetensors instead",
        )
    return {"rope_type": kind, **rope}


def _of_divisors(config: Any, file: gguf.GGUFReader) -> dict[str, Any]:
    """Settings of `llama3` that the file may mean: those that it notes, or the published ones with its largest divisor."""
    tensor = next((one for one in file.tensors if one.name == FREQUENCIES), None)
    if tensor is None:
        return {}
    noted = _value(file, SETTINGS_KEY)
    return dict(json.loads(noted)) if noted else {**PUBLISHED, "factor": round(float(tensor.data.max()), 3)}


def _check_divisors(config: Any, file: gguf.GGUFReader) -> None:
    import torch

    scaled = [one for one in file.tensors if one.name.startswith("rope_f")]
    for tensor in scaled:
        own = divisors(config) if tensor.name == FREQUENCIES else None
        values = torch.from_numpy(tensor.data.copy()).float().reshape(-1)
        if own is None or own.shape != values.shape or not torch.allclose(own, values, rtol=CLOSE):
            raise ConfigError(
                f"the GGUF file has {tensor.name}, a scale of positions whose settings it does not say",
                hint="import the model's folder with safetensors instead",
            )


def _set(rope: dict[str, Any]) -> dict[str, Any]:
    """Without the settings that are at the value that computes nothing else."""
    neutral = {"truncate": True, "attention_factor": None, "mscale": None, "mscale_all_dim": None}
    return {name: value for name, value in rope.items() if neutral.get(name, ...) != value and value is not None}


def _value(file: gguf.GGUFReader, key: str) -> Any:
    field = file.fields.get(key)
    return field.contents() if field else None
