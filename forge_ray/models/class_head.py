"""A head over labels: what a folder says of it, and how it is read.

A folder with such a head, or with an adapter that has one, holds `classes.json`:

    {"format": 1, "targets": [{"name": "label", "labels": ["mail", "sound"], "loss": "single"}]}

The weights are `score.weight` of its safetensors, [labels of all targets, hidden size], the targets' rows in this order. The
logits of a text are read at its last token. torch and transformers on first use.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

from forge_ray.config.base import parse
from forge_ray.config.classify import REWARD, Target
from forge_ray.errors import ConfigError, StoreError
from forge_ray.records import ModelVersion
from forge_ray.store import paths
from forge_ray.store.files import Store

HEAD_FILE = "classes.json"
FORMAT = 1
OPENED_BY = (
    "serve it (`forge serve`) and send texts to /v1/classifications, score it with `forge eval`, or open it with"
    " transformers' AutoModelForSequenceClassification; for a model that writes labels, train with train.method=sft"
)


def write_targets(folder: Path, targets: tuple[Target, ...]) -> None:
    kept = [target.model_dump(mode="json", exclude={"weight"}) for target in targets]
    text = json.dumps({"format": FORMAT, "targets": kept}, ensure_ascii=False, indent=2)
    (folder / HEAD_FILE).write_text(text + "\n", encoding="utf-8")


def targets_of(folder: Path | None) -> tuple[Target, ...]:
    """What the head of a folder answers; () where it has none. Raises `StoreError` for a form that is not known."""
    if folder is None or not (folder / HEAD_FILE).is_file():
        return ()
    return _targets(str(folder / HEAD_FILE), json.loads((folder / HEAD_FILE).read_text(encoding="utf-8")))


def refuse_reward_model(store: Store, version: ModelVersion) -> None:
    """`ConfigError` for a version that no endpoint serves, nor looks at: its answers are numbers, of whole conversations."""
    if targets_in(store, version) == (REWARD,):
        raise ConfigError(
            f"{version.id} ({version.name}) is a reward model, which no endpoint serves",
            hint="score pairs with `forge eval`, or open it with transformers' AutoModelForSequenceClassification",
        )


def targets_in(store: Store, version: ModelVersion) -> tuple[Target, ...]:
    """As `targets_of`, of a version whose files stay in the store."""
    path = paths.model(version.id, HEAD_FILE)
    return _targets(path, store.read_json(path)) if is_classifier(version) else ()


def _targets(path: str, value: Any) -> tuple[Target, ...]:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise StoreError(f"{path} is not of format {FORMAT}", hint="use the version of forge_ray that wrote the model")
    return tuple(parse(Target, target, where=HEAD_FILE) for target in value["targets"])


def refuse_classifier(folder: Path | None) -> None:
    """`ConfigError` where a folder that is to generate text has a head over labels."""
    if targets := targets_of(folder):
        labels = ", ".join(targets[0].labels[:5])
        raise ConfigError(
            f"{folder} is a classifier ({targets[0].name}: {labels}): it has no language model's head and generates no text",
            hint=OPENED_BY,
        )


def is_classifier(version: ModelVersion) -> bool:
    return any(entry.path == HEAD_FILE for entry in version.files)


def refuse_version(version: ModelVersion, purpose: str) -> None:
    """As `refuse_classifier`, from the record alone. `purpose`: what was to be done with the version."""
    if is_classifier(version):
        raise ConfigError(
            f"{version.id} ({version.name}) is a classifier: {purpose} needs a model that generates text",
            hint=OPENED_BY,
        )


def read_at_positions(model: Any) -> None:
    """Let the model's forward pass take `logits_to_keep`, positions int64 [K], and give logits [1, K, C] there, as language
    models do: a row holds several documents, and transformers reads one token a row. Names of weights stay."""
    if not hasattr(model, "score"):
        raise ConfigError(
            f"{type(model).__name__} has no layer `score` that reads a token", hint="use a model that generates text"
        )
    model.forward = MethodType(_forward, model)


def _forward(model: Any, logits_to_keep: Any, **inputs: Any) -> Any:
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    # PEFT passes every argument that it knows, most of them None
    states = model.get_decoder()(**{name: value for name, value in inputs.items() if value is not None}).last_hidden_state
    return SequenceClassifierOutputWithPast(logits=model.score(states[:, logits_to_keep]))


def draw(model: Any, seed: int) -> None:
    """A new head: normally distributed, the same numbers for the same seed, whatever ZeRO stage partitions them."""
    import contextlib

    import torch

    weight = model.score.weight
    whole: Any = contextlib.nullcontext()
    if hasattr(weight, "ds_id"):
        import deepspeed

        whole = deepspeed.zero.GatheredParameters([weight], modifier_rank=0)
    deviation = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
    with torch.no_grad(), whole:
        generator = torch.Generator().manual_seed(seed)
        weight.copy_(torch.randn(tuple(weight.shape), generator=generator) * deviation)
