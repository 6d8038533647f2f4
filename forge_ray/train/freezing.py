"""Weights that a full fine-tune leaves as they are: what text does not pass, routers, and what `train.freeze` names."""

from __future__ import annotations

from typing import Any

from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError
from forge_ray.models.architecture import outside_text
from forge_ray.train.adapter import LAYER, fits
from forge_ray.train.moe import routers


def freeze_weights(model: Any, config: TrainConfig) -> None:
    """In place, by `requires_grad`: an engine keeps neither gradient nor optimizer state of such a weight. Raises
    `ConfigError` where a pattern of `train.freeze` cannot be honoured."""
    for name in outside_text(model):
        model.get_submodule(name).requires_grad_(False)
    names = {name: weight for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}
    for pattern in config.freeze:
        matched = [name for name in names if _is_of(name, pattern)]
        if not matched:
            raise ConfigError(
                f"train.freeze: {pattern!r} matches nothing of this model's text",
                hint=f"name a module or a weight by the end of its name, such as {', '.join(_examples(list(names)))}",
            )
        for name in matched:  # a tied weight has two names, and is one weight
            names[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in names.values()):
        raise ConfigError(
            f"train.freeze={list(config.freeze)} leaves no weight of this model to train",
            hint="name fewer modules, or train an adapter with train.adapter",
        )
    frozen = any(not weight.requires_grad for router in routers(model) for weight in router.parameters())
    asked = "router=trained" if config.router == "trained" else f"router_aux_loss={config.router_aux_loss}"
    if frozen and (config.router == "trained" or config.router_aux_loss):
        raise ConfigError(
            f"train.freeze={list(config.freeze)} freezes a router of this model, and train.{asked} trains it",
            hint="leave the routers out of train.freeze, or set train.router=frozen and train.router_aux_loss=0",
        )
    for router in routers(model) if config.router == "frozen" else ():
        router.requires_grad_(False)


def frozen_names(model: Any) -> frozenset[str]:
    """Names of the weights that are not trained, each weight once."""
    return frozenset(name for name, weight in model.named_parameters() if not weight.requires_grad)


def _is_of(name: str, pattern: str) -> bool:
    """Whether the weight is named by the pattern, or is in a module that is."""
    parts = name.split(".")
    return any(fits(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _examples(names: list[str]) -> list[str]:
    """The modules outside of layers, the first layer and a module in it."""
    outside = sorted({name.split(".")[-2] for name in names if not LAYER.search(name)})
    for name in names:
        if match := LAYER.search(name):
            return [*outside, ".".join(name[: match.end() - 1].split(".")[-2:]), name[match.end() :].rpartition(".")[0]]
    return outside
