"""The model, besides the one that a run starts from, whose numbers its loss reads: a teacher, or another reference.

Its weights are loaded for one pass over the rows (`reference.py`), never next to those that are trained. A run is named by
the digests of its files, not by the name that a run file gives it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from forge_ray.config.distil import Distil
from forge_ray.config.train import TrainConfig
from forge_ray.data.dataset.version import tokenizer_digest
from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.models.class_head import is_classifier
from forge_ray.models.vocabulary import num_rows
from forge_ray.records import ModelVersion
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.out_of_use import refuse_archived, refuse_withdrawn

MADE_BY = "made_by.json"  # in a folder of what a frozen model says of a dataset's rows: its versions
Asked = Literal["active", "archived", "any"]


@dataclass(frozen=True)
class FrozenModel:
    """`base`: the full weights below the version, where it is an adapter."""

    version: ModelVersion
    base: ModelVersion | None = None

    @property
    def full(self) -> ModelVersion:
        """The version with full weights, whose tokenizer the model has."""
        return self.base or self.version

    @property
    def versions(self) -> tuple[ModelVersion, ...]:
        """All whose files the pass loads."""
        return (self.version, *([self.base] if self.base else []))

    @property
    def digests(self) -> list[str]:
        return [version.files_digest for version in self.versions]

    def to_json(self) -> dict[str, Any]:
        return {"version": self.version.model_dump(mode="json"), "base": self.base and self.base.model_dump(mode="json")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FrozenModel:
        base = value["base"]
        return cls(ModelVersion.model_validate(value["version"]), ModelVersion.model_validate(base) if base else None)


def of_version(catalog: Catalog, version: ModelVersion) -> FrozenModel:
    """Raises `NotFound` where the base of an adapter has no record here."""
    return FrozenModel(version, catalog.get_as(ModelVersion, version.base_model) if version.weights == "adapter" else None)


def frozen_of(catalog: Catalog, train: TrainConfig, base: ModelVersion, asked: Asked = "active") -> FrozenModel | None:
    """What `train.method.teacher` or `reference` names; None where the run has none. `base`: the full weights that the run
    starts from. `asked`: whether the model must be in use, may have been archived, or is only named (`any`: of a run that
    has ended). Raises `ConfigError` for a model that cannot be asked about these rows, `PolicyError` for one that may not
    be, `NotFound` where it is not in the store."""
    if not train.frozen_model:
        return None
    key = f"train.method.{'teacher' if isinstance(train.method, Distil) else 'reference'}"
    frozen = of_version(catalog, catalog.model(train.frozen_model))
    if asked == "any":
        return frozen
    for version in frozen.versions:
        _refuse_out_of_use(catalog, version, key, asked == "archived")
    if is_classifier(frozen.version):
        raise ConfigError(
            f"{key}={train.frozen_model}: {frozen.version.id} is a classifier: it has no distribution over the next token",
            hint="name a model that generates text",
        )
    if tokenizer_digest(frozen.full) != tokenizer_digest(base):
        raise ConfigError(
            f"{key}={train.frozen_model}: {frozen.full.id} ({frozen.full.name}) has another tokenizer than {base.id}"
            f" ({base.name}): its numbers are about other tokens",
            hint=f"let {frozen.version.id} answer the prompts (`forge serve`, or any client of its endpoint), and train on"
            " these answers as rows with train.method=sft; or take a model with the same tokenizer files",
        )
    if isinstance(train.method, Distil):
        _refuse_licence(catalog, frozen, key)
        size = vocabulary(catalog.store, frozen, base)
        if train.method.k > size:
            raise ConfigError(
                f"train.method.k={train.method.k} exceeds the vocabulary of {size} tokens that {frozen.version.id} and"
                f" {base.id} share",
                hint=f"use k={min(64, size)}; the tokens beyond k count as one",
            )
    return frozen


def _refuse_out_of_use(catalog: Catalog, version: ModelVersion, key: str, allow_archived: bool) -> None:
    refuse_withdrawn(catalog, version.id, key)
    if not allow_archived:
        refuse_archived(catalog, version.id, key)
    if not catalog.store.is_published(paths.model(version.id)):
        raise NotFound(
            f"{key}: the files of {version.id} ({version.name}) are not in this store",
            hint=f"restore models/{version.id} from a backup, or name another version",
        )


def _refuse_licence(catalog: Catalog, frozen: FrozenModel, key: str) -> None:
    for version in frozen.versions:
        if hit := refused_licence(catalog, version):
            raise PolicyError(
                f"policy.refused_licences: {key} names {version.id} ({version.name}), whose licence is {hit}",
                hint="take a teacher with another licence; `forge policy show` lists those that no run learns from",
            )


def refused_licence(catalog: Catalog, version: ModelVersion) -> str:
    """What of a version's licence the policy lets no run learn from; "" where it does."""
    refused = {licence.lower() for licence in catalog.authority().policy.refused_licences}
    terms = version.licence.replace("(", " ").replace(")", " ").split()
    return next((term for term in (version.licence, *terms) if term.lower() in refused), "")


def vocabulary(store: Store, frozen: FrozenModel, base: ModelVersion) -> int:
    """Token ids that both models have logits for. Models of one tokenizer may have padded it to different sizes."""
    return min(_size(store, frozen.full), _size(store, base))


def _size(store: Store, version: ModelVersion) -> int:
    size = num_rows(json.loads(store.read(paths.model(version.id, "config.json"))))
    if size is None:
        raise ConfigError(
            f"the config.json of {version.id} does not say the size of its vocabulary (vocab_size)",
            hint="save the model again with transformers, and import it",
        )
    return size


def joined_licence(licence: str, frozen: ModelVersion | None) -> str:
    """Of weights that depend on a start with `licence` and on a frozen model: both, as an SPDX expression."""
    if frozen is None or frozen.licence in (licence, ""):
        return licence
    both = [f"({one})" if " OR " in one.upper() else one for one in (licence, frozen.licence)]
    parts = dict.fromkeys(part for one in both for part in one.split(" AND "))
    return " AND ".join(part for part in parts if part)
