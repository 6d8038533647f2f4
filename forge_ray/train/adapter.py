"""Put an adapter on a model and say what it reached.

A pattern names a *kind* of layer by the end of its name: `o_proj`, `self_attn.o_proj`, `mlp.experts.down_proj`. It must be
found in the text model, and in every layer that has that kind; else a run would train less than its file says, with a
falling loss and exit code 0.
"""

from __future__ import annotations

import importlib.util
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forge_ray.config.adapter import Adapter
from forge_ray.errors import ConfigError, first_line
from forge_ray.models.architecture import LM, Head, outside_text

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
SAVED = ".modules_to_save.default."  # in the names of weights that are trained in full
LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.|\.h\.(\d+)\.")


@dataclass(frozen=True)
class Reach:
    """One pattern: `kinds` maps a place in a layer to (layers where it was matched, layers that have it)."""

    pattern: str
    modules: int
    parameters: int
    kinds: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Coverage:
    """What an adapter reaches. Active: of the experts, the share that one token passes (`experts per token / experts`)."""

    patterns: tuple[Reach, ...]
    parameters: int
    active: float
    trained: int
    trained_active: float
    reached: int
    reached_active: float
    unreached: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        patterns = [
            {"pattern": one.pattern, "modules": one.modules, "parameters": one.parameters, "kinds": one.kinds}
            for one in self.patterns
        ]
        shares = {
            "trained_of_all": self.trained / self.parameters,
            "trained_of_active": self.trained_active / self.active,
            "reached_of_all": self.reached / self.parameters,
            "reached_of_active": self.reached_active / self.active,
        }
        return {**vars(self), "patterns": patterns, **shares}

    def lines(self) -> list[str]:
        """For a person."""
        lines = []
        for one in self.patterns:
            partial = [f"{kind} in {hit} of {of} layers" for kind, (hit, of) in one.kinds.items() if hit < of]
            more = f" ({', '.join(partial)})" if partial else ""
            lines.append(f"{one.pattern}: {one.modules} weights of {one.parameters:,} parameters{more}")
        lines.append(
            f"adapts {self.reached / self.parameters:.1%} of all weights, {self.reached_active / self.active:.1%} of the"
            f" active ones; trains {self.trained:,} ({self.trained / self.parameters:.3%} of all,"
            f" {self.trained_active / self.active:.3%} of active)"
        )
        experts = {kind: size for kind, size in self.unreached.items() if is_expert(kind)}
        if experts:
            share = sum(experts.values()) / self.parameters
            names = ", ".join(experts)
            lines.append(f"not adapted: the experts, {share:.1%} of all weights: train.adapter.target_parameters=[{names}]")
        return lines


def with_adapter(model: Any, adapter: Adapter, head: Head = LM) -> Any:
    """`model` with its adapter in its own dtype (the fp32 master copy is the optimizer's); a head over labels is trained in
    full, and is part of it. Raises `ConfigError`."""
    from peft import LoraConfig, get_peft_model

    outside = outside_text(model)
    for field_name, kinds in (
        ("target_modules", _modules(model, outside)),
        ("target_parameters", _parameters(model, outside)),
        ("modules_to_save", _owners(model, outside)),
    ):
        patterns = getattr(adapter, field_name)
        if patterns != "all-linear":
            for pattern in patterns:
                _check(field_name, pattern, kinds)
    _refuse_tied(model, adapter)
    _refuse_both(model, adapter)
    lora = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules if adapter.target_modules == "all-linear" else list(adapter.target_modules),
        target_parameters=list(adapter.target_parameters) or None,
        modules_to_save=saved_modules(model, adapter) or None,
        exclude_modules=_beyond(outside, model) if outside else None,
        use_rslora=adapter.method == "rslora",
        use_dora=adapter.method == "dora",
        task_type="SEQ_CLS" if head.targets else "CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of one library to the other
            return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ConfigError(
            f"train.adapter does not fit this model: {first_line(error)}",
            hint=f"its linear layers are {', '.join(_leaves(_modules(model, outside)))}; or use all-linear",
        ) from error


def load_weights(model: Any, folder: Path) -> None:
    """Replace the new weights of the adapter on `model` by those of an exported one, in the dtype of the model. Raises
    `ConfigError` where it has others."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(folder / ADAPTER_WEIGHTS)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if {name: weight.shape for name, weight in own.items()} != {name: weight.shape for name, weight in weights.items()}:
        raise ConfigError(
            "the adapter that train.init_from=continue trains on has other weights than train.adapter",
            hint="set train.adapter as in the run that made it",
        )
    set_peft_model_state_dict(model, weights)


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, from its header."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no mapping)


def _refuse_tied(model: Any, adapter: Adapter) -> None:
    """Embedding and output share one weight: an adapter on one of the two would change both when it is merged, and the
    merged model would not be the one that was trained."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    shared = {model.get_input_embeddings(), model.get_output_embeddings()} - {None}
    modules = () if adapter.target_modules == "all-linear" else adapter.target_modules
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        for field_name, patterns, target in (
            ("target_modules", modules, name),
            ("target_parameters", adapter.target_parameters, weight),
            ("modules_to_save", adapter.modules_to_save, name),
        ):
            if module not in shared or not any(fits(target, pattern) for pattern in patterns):
                continue
            other = "output" if module is model.get_input_embeddings() else "embedding"
            raise ConfigError(
                f"train.adapter.{field_name}: {target} shares its weight with the model's {other} (tie_word_embeddings), so"
                " that a merged adapter would change both",
                hint=f"leave {_leaves([name])[0]} out of {field_name}, or train the model in full",
            )


def quantised(adapter: Adapter, device: torch.device) -> dict[str, Any]:
    """How a base model is opened in 4 bits (QLoRA: NF4, constants quantised too, arithmetic in bf16). Raises `ConfigError`.

    bitsandbytes quantises linear layers; experts that are one weight of three dimensions stay as they are.
    """
    if adapter.quantize == "none":
        return {}
    if device.type != "cuda":
        raise ConfigError(
            f"train.adapter.quantize=nf4 runs on a GPU, this worker has {device}",
            hint="set train.scaling.gpus_per_worker=1, or train.adapter.quantize=none",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.adapter.quantize=nf4 needs bitsandbytes", hint="pip install 'forge-ray[qlora]' on every worker"
        )
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def _beyond(outside: tuple[str, ...], model: Any) -> str | None:
    """A regular expression for the modules that text does not pass; None where none of them could be matched."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    some = [name for name in outside if any(_is_in(one, (name,)) for one in linear)]
    return rf"({'|'.join(re.escape(name) for name in some)})(\..*)?" if some else None


def _is_in(name: str, outside: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in outside)


def _modules(model: Any, outside: tuple[str, ...]) -> list[str]:
    """Names of the text model's layers that can be adapted as layers."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and not _is_in(name, outside)]


def _parameters(model: Any, outside: tuple[str, ...]) -> list[str]:
    """Names of the text model's weights of two or three dimensions."""
    return [
        name
        for name, parameter in model.named_parameters()
        if len(getattr(parameter, "ds_shape", parameter.shape)) in (2, 3) and not _is_in(name, outside)
    ]


def _owners(model: Any, outside: tuple[str, ...]) -> list[str]:
    """Names of the text model's modules that own weights themselves."""
    owners = [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]
    return [name for name in owners if not _is_in(name, outside)]


def saved_modules(model: Any, adapter: Adapter) -> list[str]:
    """Full names of what `modules_to_save` names, of a model without its adapter: PEFT would match the end of a word."""
    return [name for name in _owners(model, outside_text(model)) if any(fits(name, one) for one in adapter.modules_to_save)]


def count(parameter: Any) -> int:
    """Elements of a weight, of a partitioned one too."""
    return math.prod(getattr(parameter, "ds_shape", parameter.shape))


def _kind(name: str) -> tuple[str, int | None]:
    """(place inside a layer, number of the layer)."""
    match = LAYER.search(name)
    if match is None:
        return name, None
    return name[match.end() :], int(match[1] or match[2])


def _leaves(names: list[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def fits(name: str, pattern: str) -> bool:
    """As PEFT matches a name of a list."""
    return name == pattern or name.endswith(f".{pattern}")


def _layers(names: Iterable[str]) -> dict[str, set[int | None]]:
    layers_of: dict[str, set[int | None]] = defaultdict(set)
    for name in names:
        kind, layer = _kind(name)
        layers_of[kind].add(layer)
    return dict(layers_of)


def _refuse_both(model: Any, adapter: Adapter) -> None:
    """A module is trained in full or adapted, not both."""
    modules = () if adapter.target_modules == "all-linear" else adapter.target_modules
    for name in saved_modules(model, adapter):
        fields = {"target_modules": (name, modules), "target_parameters": (f"{name}.weight", adapter.target_parameters)}
        for field_name, (target, patterns) in fields.items():
            if any(fits(target, pattern) for pattern in patterns):
                raise ConfigError(
                    f"train.adapter: modules_to_save and {field_name} both name {name}, which is trained in full or adapted",
                    hint=f"leave {_leaves([name])[0]} out of one of the two",
                )


def _check(field_name: str, pattern: str, names: list[str]) -> None:
    matched = _layers(name for name in names if fits(name, pattern))
    if not matched:
        what = {"target_modules": "linear layers", "modules_to_save": "modules"}.get(field_name, "weights")
        raise ConfigError(
            f"train.adapter.{field_name}: {pattern!r} matches nothing of this model's text",
            hint=f"its {what} are "
            + ", ".join(sorted(_layers(names)) if field_name == "target_parameters" else _leaves(names))
            + ("; or use all-linear" if field_name == "target_modules" else ""),
        )
    there = _layers(names)
    for kind, layers in matched.items():
        if layers != there[kind]:
            raise ConfigError(
                f"train.adapter.{field_name}: {pattern!r} matches {kind} in {len(layers)} of {len(there[kind])} layers that"
                " have it",
                hint=f"name the kind of layer, without a number: {kind}",
            )


def coverage(model: Any, adapter: Adapter) -> Coverage:
    """Of a model that has its adapter; shapes alone are looked at, so one on the meta device does."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    share = active_share(base.config.get_text_config().to_dict())
    sizes: dict[str, int] = {}
    trained: dict[str, int] = {}
    reached: dict[str, int] = {}
    wrapped: set[str] = set()  # reached as a weight, not as a layer
    saved: dict[str, int] = {}  # trained in full: a head over labels, and what modules_to_save names
    for name, parameter in base.named_parameters():
        if SAVED in name:
            weight = name.replace(SAVED, ".")
            saved[weight] = count(parameter)
            sizes.setdefault(weight, count(parameter))
        elif ".lora_" not in name:
            sizes[name.replace(".base_layer", "").replace(".original_module", "")] = count(parameter)
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            plain = name.replace(".base_layer", "")
            weight = f"{plain}.{getattr(layer, 'parameter_name', 'weight')}"
            own = [one for key, one in layer.named_parameters() if key.startswith("lora_")]
            trained[weight] = sum(count(one) for one in own)
            if isinstance(layer.get_base_layer(), nn.Linear):  # a quantised weight has another shape
                sizes[weight] = layer.in_features * layer.out_features
            reached[weight] = sizes[weight]
            if hasattr(layer, "parameter_name"):
                wrapped.add(weight)

    trained |= saved
    reached |= saved

    def active(sizes_of: dict[str, int]) -> float:
        return sum(size * (share if is_expert(name) else 1.0) for name, size in sizes_of.items())

    there = _layers(sizes)
    layers_reached = {weight for weight in reached if weight not in wrapped and weight not in saved}
    patterns = ("all-linear",) if adapter.target_modules == "all-linear" else adapter.target_modules
    reaches = []
    for pattern, among in (
        *((pattern, layers_reached) for pattern in patterns),
        *((pattern, wrapped) for pattern in adapter.target_parameters),
        *((pattern, saved.keys()) for pattern in adapter.modules_to_save),
    ):
        hits = {
            weight: reached[weight]
            for weight in among
            if pattern == "all-linear" or fits(weight, pattern) or fits(weight.removesuffix(".weight"), pattern)
        }
        kinds = {kind: (len(layers), len(there[kind])) for kind, layers in sorted(_layers(hits).items())}
        reaches.append(Reach(pattern, len(hits), sum(hits.values()), kinds))
    outside = outside_text(base)
    unreached: dict[str, int] = defaultdict(int)
    for name, size in sizes.items():
        if name not in reached and not _is_in(name, outside):
            unreached[_kind(name)[0]] += size
    return Coverage(
        patterns=tuple(reaches),
        parameters=sum(sizes.values()),
        active=active(sizes),
        trained=sum(trained.values()),
        trained_active=active(trained),
        reached=sum(reached.values()),
        reached_active=active(reached),
        unreached=dict(sorted(unreached.items(), key=lambda item: -item[1])),
    )


def active_share(config: dict[str, Any]) -> float:
    """Of a mixture's routed experts, the share that one token passes; 1 where there is no mixture."""
    taken, experts = config.get("num_experts_per_tok"), experts_of(config)
    return int(taken) / experts if taken and experts else 1.0


def experts_of(config: dict[str, Any]) -> int:
    """Routed experts of a layer; 0 in a dense model."""
    names = ("num_local_experts", "n_routed_experts", "num_experts")
    return next((int(config[name]) for name in names if config.get(name)), 0)


def is_expert(name: str) -> bool:
    """Whether a weight belongs to a layer's routed experts."""
    return ".experts." in f".{name}"
