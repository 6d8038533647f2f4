"""A base and an adapter as one model: the product B A is added in fp32, and the sum rounded once.

The base is read, summed and written one file of weights at a time, under the names of its own files. So the memory is that
of the largest file (5 GB and less as transformers and most publishers cut them) and of the adapter, whatever the size of
the base. Of a base whose tensors have other names than those that transformers writes, and where modules or a head were
trained in full, the whole model is held once, in its own dtype, and one layer at a time in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from forge_ray.errors import ConfigError
from forge_ray.models.architecture import LM, Head, empty_model, open_model
from forge_ray.models.class_head import refuse_classifier

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"  # transformers' names
ADAPTER_CONFIG = "adapter_config.json"
DEFAULT = "default"  # PEFT's name of the only adapter


@dataclass(frozen=True)
class Change:
    """What an adapter does to one stored tensor: `apply` takes it in fp32 and returns the sum."""

    apply: Callable[[Tensor], Tensor]


def write_sum(base: Path, adapter: Path | None, folder: Path, dtype: torch.dtype | None = None, head: Head = LM) -> None:
    """Write config.json and the weights of `base` with `adapter` added to `folder`; nothing else of the base. `dtype`: of
    the result; None: each tensor in that of the base. Raises `ConfigError` for a sum that it cannot hold."""
    for part in (base, adapter) if head == LM else ():
        refuse_classifier(part)
    shards = _shards(base)
    stored = {name for names in shards.values() for name in names}
    model = empty_model(base)
    own_config, class_name = model.config, type(model).__name__
    is_sum = bool(shards) and head == LM and not (adapter and _has_whole_modules(adapter))
    changes = _changes(model, adapter) if adapter and is_sum else {}
    if not is_sum or not changes.keys() <= stored:
        _write_whole(base, adapter, folder, dtype, head)
        return
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes = 0
    for shard in shards:
        weights = dict(_summed(base / shard, changes, dtype))
        num_bytes += sum(weight.nbytes for weight in weights.values())
        save_file(weights, folder / shard, metadata={"format": "pt"})
    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": num_bytes}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    own_config.architectures = [class_name]
    if dtype is not None:
        own_config.dtype = dtype
    own_config.save_pretrained(folder)


def _has_whole_modules(adapter: Path) -> bool:
    """Whether an adapter also has modules that were trained in full, which take the place of the base's."""
    return bool(json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("modules_to_save"))


def _shards(base: Path) -> dict[str, list[str]]:
    """File of weights → names of its tensors; empty where the files are not named as transformers names them."""
    if (base / INDEX).is_file():
        weight_map = json.loads((base / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    else:
        files = [SINGLE] if (base / SINGLE).is_file() else []
    shards = {}
    for file in files:
        with safe_open(base / file, "pt") as opened:
            shards[file] = list(opened.keys())
    return shards


def _summed(path: Path, changes: dict[str, Change], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (a handle of safetensors has no iterator)
            weight = file.get_tensor(name)
            target = (dtype or weight.dtype) if weight.is_floating_point() else weight.dtype
            if change := changes.get(name):
                weight = change.apply(weight.float())
            yield name, _rounded(name, weight, target).contiguous()


def _rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.is_floating_point() and dtype != weight.dtype:
        limit = torch.finfo(dtype).max
        if (largest := float(weight.abs().max())) > limit:
            raise ConfigError(
                f"{name} holds {largest:g} once the adapter is added to it, and the base's"
                f" {str(dtype).removeprefix('torch.')} ends at {limit:g}",
                hint="import the base in bf16 or fp32, and train the adapter on that",
            )
    return weight.to(dtype)


# ---------------------------------------------------------------- what an adapter changes


def _changes(model: Any, adapter: Path) -> dict[str, Change]:
    """Name of a stored tensor → what the adapter does to it. The weights of `model`, which is on the meta device, become
    zeros without memory, for PEFT moves an adapter to where its layer is."""
    from transformers.core_model_loading import revert_weight_conversion

    for module in model.modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, own, _zeros(parameter.shape))
    layers = dict(_layers(_adapted(model, adapter)))
    changes: dict[str, Change] = {}
    delta_of = lru_cache(maxsize=2)(partial(_stored_deltas, model, layers))  # of the two matrices of a layer's experts
    for name, layer in layers.items():
        names = revert_weight_conversion(model, {name: _parameter(layer)})
        if layer.use_dora.get(DEFAULT):  # of linear layers alone, which are stored as they are
            changes |= {stored: Change(partial(_merged, layer)) for stored in names}
        else:
            changes |= {stored: Change(partial(_plus, delta_of, name, stored)) for stored in names}
    return changes


def _plus(delta_of: Callable[[str], dict[str, Tensor]], name: str, stored: str, weight: Tensor) -> Tensor:
    return weight + delta_of(name)[stored]


@torch.no_grad()
def _stored_deltas(model: Any, layers: dict[str, Any], name: str) -> dict[str, Tensor]:
    """The product B A of one weight, cut as the weight is stored."""
    from transformers.core_model_loading import revert_weight_conversion

    deltas: dict[str, Tensor] = revert_weight_conversion(model, {name: layers[name].get_delta_weight(DEFAULT)})
    return deltas


@torch.no_grad()
def _merged(layer: Any, weight: Tensor) -> Tensor:
    """By PEFT itself, in the layer, whose weight is zeros without memory again afterwards."""
    parameter = _parameter(layer)
    parameter.data, empty = weight, parameter.data
    layer.merge()
    summed, parameter.data = parameter.data, empty
    return summed


def _adapted(model: Any, adapter: Path) -> Any:
    """The adapter on a model in fp32 on the CPU, with its own weights as that."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    settings = PeftConfig.from_pretrained(str(adapter))
    settings.inference_mode = True
    adapted: Any = PeftModel(model, settings, low_cpu_mem_usage=True)
    weights = {name: weight.float() for name, weight in load_file(adapter / "adapter_model.safetensors").items()}
    set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=True)
    return adapted


def _layers(adapted: Any) -> Iterator[tuple[str, Any]]:
    """(name of the weight in the model, layer of PEFT on it)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in adapted.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            plain = ".".join(part for part in path.split(".") if part != "base_layer")
            yield f"{plain}.{_parameter_name(module)}", module


def _parameter_name(layer: Any) -> str:
    return str(getattr(layer, "parameter_name", "weight"))


def _parameter(layer: Any) -> nn.Parameter:
    parameter: nn.Parameter = getattr(layer.get_base_layer(), _parameter_name(layer))
    return parameter


def _zeros(shape: torch.Size) -> nn.Parameter:
    """In fp32 on the CPU, all of them one number in memory."""
    return nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)


def _write_whole(base: Path, adapter: Path | None, folder: Path, dtype: torch.dtype | None, head: Head) -> None:
    summed_model(base, adapter, dtype, head).save_pretrained(folder)


@torch.no_grad()
def summed_model(base: Path, adapter: Path | None, dtype: torch.dtype | None, head: Head = LM) -> Any:
    """The whole model in memory, in `dtype` (None: that of the base), one layer at a time in fp32. Raises as `write_sum`."""
    # what was trained in full has the dtype that the model is opened in: not below that of the result
    model = open_model(base, torch.float32 if dtype == torch.float32 else "auto", head=head)
    target = dtype or model.dtype
    if adapter is not None:
        from peft import PeftModel

        adapted: Any = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)  # its weights in fp32
        for name, layer in _layers(adapted):
            _parameter(layer).data = _parameter(layer).data.float()
            layer.merge()
            _parameter(layer).data = _rounded(name, _parameter(layer).data, target)
        model = adapted.merge_and_unload()  # layers are summed already: modules that were trained in full are put in place
    return model.to(target)
