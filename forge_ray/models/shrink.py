"""A smaller model of some layers of a larger one: what a student starts from (arXiv:1910.01108, section 3).

The layers are those whose tensors are `<prefix>.<number>.…`, with the numbers 0 to `num_hidden_layers` - 1. They are
numbered anew, settings with a value for each layer are cut, and everything else stays. torch and transformers on first use.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forge_ray.errors import ConfigError
from forge_ray.models.class_head import is_classifier
from forge_ray.models.dequantise import INDEX
from forge_ray.models.derived import make_version
from forge_ray.models.model_files import refuse_unsafe
from forge_ray.records import ModelVersion
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.out_of_use import refuse_archived, refuse_withdrawn

LAYERS = "layers "  # begins the source of such a version
NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)")
# lists of a configuration that have no value for each layer, whatever their length
NOT_OF_LAYERS = frozenset({"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "keys_to_ignore_at_inference"})
SHAPE_ALONE = frozenset({"layer_idx", "training"})  # attributes of a module that say nothing about what it computes
OF_ALL_LAYERS = ("params.json", "consolidated")  # beginnings of files in Mistral's own form, which would tell of all layers


def shrink(catalog: Catalog, reference: str, layers: Sequence[int], name: str) -> ModelVersion:
    """The version with these layers of a version with full weights, by their numbers. Raises `ConfigError` for numbers or
    a model that this cannot be done with, `PolicyError` for a version that may not be used."""
    parent = catalog.model(reference)
    _refuse(catalog, parent)
    catalog.check_may("imported models")
    base = catalog.store.fetch_dir(paths.model(parent.id), files=parent.files)

    def write(folder: Path) -> None:
        write_layers(base, folder, layers)
        refuse_unsafe(folder)

    source = f"{LAYERS}{','.join(map(str, layers))} of {parent.name} {parent.id}"
    return make_version(catalog, [parent], write, "imported", name, source)


def _refuse(catalog: Catalog, parent: ModelVersion) -> None:
    refuse_withdrawn(catalog, parent.id)
    refuse_archived(catalog, parent.id)
    if parent.weights != "full":
        raise ConfigError(
            f"{parent.id} is an adapter on {parent.base_model}: it has no layers of its own",
            hint=f"take the layers of {parent.base_model}, or export the sum and import it (`forge models export --form"
            " merged`)",
        )
    if is_classifier(parent):
        raise ConfigError(
            f"{parent.id} is a classifier, and a student learns to generate text",
            hint=f"take the layers of the model that it was trained on, {parent.base_model or 'its base'}",
        )


def write_layers(base: Path, folder: Path, layers: Sequence[int]) -> None:
    """Write the model of `base` with these of its layers to `folder`, which is empty."""
    shards = {path.name: _shapes(path) for path in sorted(base.glob("*.safetensors")) if not _tells_of_all(path.name)}
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    settings = _resolved(base)
    count = settings.get("num_hidden_layers")
    if not isinstance(count, int):
        raise ConfigError(
            f"the configuration of {base.name} has no num_hidden_layers",
            hint="layers can be taken of models whose configuration states it under this name: Llama, Mistral, Qwen and"
            " their like",
        )
    prefix = _prefix([tensor for shapes in shards.values() for tensor in shapes], count)
    _refuse_numbers(layers, count)
    for path in base.iterdir():
        is_written_anew = path.name.endswith(".safetensors") or path.name in ("config.json", INDEX)
        if path.is_file() and not is_written_anew and not _tells_of_all(path.name):
            shutil.copyfile(path, folder / path.name)
    text.update(_cut(settings, layers, count) | {"num_hidden_layers": len(layers)})
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _refuse_other_layers(base, folder, prefix, layers)
    _write_weights(base, folder, shards, prefix, {layer: number for number, layer in enumerate(layers)})


def _tells_of_all(name: str) -> bool:
    return name.startswith(OF_ALL_LAYERS)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no mapping)


def _prefix(tensors: Sequence[str], count: int) -> str:
    """What the names of the layers' tensors begin with."""
    numbers: dict[str, set[int]] = {}
    for tensor in tensors:
        if parts := NUMBERED.fullmatch(tensor):
            numbers.setdefault(parts[1], set()).add(int(parts[2]))
    fitting = [prefix for prefix, own in numbers.items() if own == set(range(count))]
    if len(fitting) != 1:
        listed = ", ".join(f"{prefix}.0 to {max(own)}" for prefix, own in sorted(numbers.items())) or "none"
        raise ConfigError(
            f"the model has num_hidden_layers={count} and {len(fitting)} lists of so many layers: its numbered tensors are"
            f" {listed}",
            hint="layers can be taken of decoders with one list of layers, such as model.layers",
        )
    return fitting[0]


def _refuse_numbers(layers: Sequence[int], count: int) -> None:
    if outside := [layer for layer in layers if not 0 <= layer < count]:
        raise ConfigError(f"layer {outside[0]} is not one of the model's, 0 to {count - 1}", hint="layers count from 0")
    if not layers or list(layers) != sorted(set(layers)):
        raise ConfigError(
            f"layers {','.join(map(str, layers)) or '(none)'}: each is taken once, in the order of the model",
            hint=f"for example {','.join(map(str, range(0, count, 2)))}",
        )
    if len(layers) == count:
        raise ConfigError(f"these are all {count} layers of the model", hint="leave some out")


def _resolved(base: Path) -> dict[str, Any]:
    """The configuration of the text model, with what transformers derives from it, such as the kind of each layer."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False).get_text_config()
    settings: dict[str, Any] = config.to_dict()
    return settings


def _cut(settings: Mapping[str, Any], layers: Sequence[int], count: int) -> dict[str, list[Any]]:
    """The settings with a value for each layer, for these layers."""
    return {
        key: [value[layer] for layer in layers]
        for key, value in settings.items()
        if isinstance(value, list | tuple) and len(value) == count and key not in NOT_OF_LAYERS
    }


def _refuse_other_layers(base: Path, folder: Path, prefix: str, layers: Sequence[int]) -> None:
    """Raise `ConfigError` where a layer would be another kind of layer under its new number: models whose settings say by
    number which layers are dense, or see a window."""
    from forge_ray.models.architecture import empty_model

    before, after = _kinds(empty_model(base), prefix), _kinds(empty_model(folder), prefix)
    for number, layer in enumerate(layers):
        old, new = before[layer], after[number]
        if differing := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
            key = differing[0]
            raise ConfigError(
                f"layer {layer} would be layer {number}, where the model computes something else:"
                f" {key} is {old.get(key, 'absent')} and would be {new.get(key, 'absent')}",
                hint="choose layers that keep the model's pattern, for example whole groups of it",
            )


def _kinds(model: Any, prefix: str) -> list[dict[str, str]]:
    """Of each layer, its modules, their weights' shapes and their plain attributes, by name."""
    leaf, count = prefix.rpartition(".")[2], int(model.config.get_text_config().num_hidden_layers)
    lists = [
        module
        for name, module in model.get_decoder().named_modules()
        if name.rpartition(".")[2] == leaf and type(module).__name__ == "ModuleList" and len(module) == count
    ]
    if len(lists) != 1:
        raise ConfigError(
            f"transformers' class has {len(lists)} lists of {count} layers named {leaf}",
            hint="layers can be taken of decoders with one list of layers",
        )
    kinds = []
    for layer in lists[0]:
        kind: dict[str, str] = {}
        for name, module in layer.named_modules():
            kind[name or "layer"] = type(module).__name__
            kind |= {f"{name}.{key}".lstrip("."): str(tuple(w.shape)) for key, w in module.named_parameters(recurse=False)}
            plain = {key: value for key, value in vars(module).items() if key[:1] != "_" and key not in SHAPE_ALONE}
            simple = {key: value for key, value in plain.items() if isinstance(value, bool | int | float | str | None)}
            kind |= {f"{name}.{key}".lstrip("."): str(value) for key, value in simple.items()}
        kinds.append(kind)
    return kinds


def _write_weights(
    base: Path, folder: Path, shards: Mapping[str, Mapping[str, Any]], prefix: str, numbers: Mapping[int, int]
) -> None:
    """One file of the base after the other; `numbers`: layer → its new number."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    size = 0
    for name, shapes in shards.items():
        names = {tensor: new for tensor in shapes if (new := _renamed(tensor, prefix, numbers))}
        if not names:
            continue
        with safe_open(base / name, framework="pt") as file:
            tensors = {new: file.get_tensor(tensor) for tensor, new in names.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if (base / INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _renamed(tensor: str, prefix: str, numbers: Mapping[int, int]) -> str:
    """The tensor's name in the smaller model; "" where its layer is left out."""
    parts = NUMBERED.fullmatch(tensor)
    if parts is None or parts[1] != prefix:
        return tensor
    return f"{prefix}.{numbers[int(parts[2])]}.{parts[3]}" if int(parts[2]) in numbers else ""
