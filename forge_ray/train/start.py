"""What a run starts from: full weights, an adapter that is trained on, or the two added up.

A run on an adapter version (`base_model`) says with `train.init_from` which it means. `continue`: the base of that version,
with its adapter as the initial one. `merge`: a `merged` version of the store, which is made once for each adapter version
and is a base model like any other. torch is imported where weights are looked at alone: a build of a dataset asks here too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from forge_ray.config.adapter import Adapter
from forge_ray.config.classify import Target, class_names
from forge_ray.config.curate import HeldOut
from forge_ray.config.data import DataConfig
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError, NotFound
from forge_ray.models.architecture import Head
from forge_ray.models.class_head import refuse_version, targets_of
from forge_ray.models.derived import make_version
from forge_ray.progress import stage
from forge_ray.records import DatasetManifest, ModelVersion, RunRecord
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.train.frozen import Asked, FrozenModel, frozen_of, joined_licence


@dataclass(frozen=True)
class Start:
    """`base` has full weights; `initial` is the version whose adapter is trained on, None where it is a new one. `frozen`:
    the model, besides these, whose numbers the loss reads."""

    base: ModelVersion
    initial: ModelVersion | None = None
    frozen: FrozenModel | None = None


def full_base(catalog: Catalog, named: ModelVersion, train: TrainConfig) -> ModelVersion:
    """The full weights below the version that a run file names, whose tokenizer its rows are built with. Raises
    `ConfigError` where `init_from` does not fit the version, or a classifier is to learn to write; `NotFound` where the base
    of an adapter is gone."""
    if not train.targets:
        refuse_version(named, f"train.method={train.method_name} from it")
    if named.weights == "full":
        if train.init_from:
            raise ConfigError(
                f"train.init_from={train.init_from} says how a run starts from an adapter, and base_model {named.id} has"
                " full weights",
                hint="remove train.init_from, or name an adapter version as base_model",
            )
        return named
    if train.init_from is None:
        raise ConfigError(
            f"base_model {named.id} is an adapter on {named.base_model}, and train.init_from does not say how to start from"
            " it",
            hint="train.init_from=continue trains this adapter on, on the same base; train.init_from=merge adds it to its"
            " base and trains a new adapter, or every weight, on the sum",
        )
    if not catalog.has(named.base_model) or not catalog.store.is_published(paths.model(named.base_model)):
        raise NotFound(
            f"base_model {named.id} is an adapter on {named.base_model}, whose files are not in this store",
            hint=f"restore models/{named.base_model} and its record from a backup",
        )
    return catalog.get_as(ModelVersion, named.base_model)


def started_from(catalog: Catalog, version: ModelVersion) -> str:
    """The version that comes before this one: the adapter that its run trained on, else its base."""
    run = catalog.get_as(RunRecord, version.run) if version.run and catalog.has(version.run) else None
    return run.initial_adapter if run and run.initial_adapter else version.base_model


def chain_of(catalog: Catalog, version: ModelVersion) -> Iterator[ModelVersion]:
    """The version, the one that its run started from, and so on to the imported model."""
    seen: set[str] = set()
    while version.id not in seen:
        seen.add(version.id)
        yield version
        before = started_from(catalog, version)
        if not before or not catalog.has(before):
            return
        version = catalog.get_as(ModelVersion, before)


def with_held_out(catalog: Catalog, named: ModelVersion, data: DataConfig) -> DataConfig:
    """The settings of the rows of a run on `named`, with a rule that keeps the test records of every earlier cycle, and
    edited copies of them, out of its training. A first cycle's settings are returned as they are."""
    runs = [catalog.get_as(RunRecord, v.run) for v in chain_of(catalog, named) if v.run and catalog.has(v.run)]
    before = dict.fromkeys(run.dataset for run in runs if catalog.has(run.dataset))
    tested = [dataset for dataset in before if _num_tested(catalog, dataset)]
    stated = {dataset for rule in data.curate if rule.rule == "held_out" for dataset in rule.against}
    missing = tuple(dataset for dataset in tested if dataset not in stated)
    if not missing:
        return data
    return data.model_copy(update={"curate": (*data.curate, HeldOut(rule="held_out", by=data.splits.by, against=missing))})


def _num_tested(catalog: Catalog, dataset: str) -> int:
    test = catalog.get_as(DatasetManifest, dataset).splits.get("test")
    return test.num_records if test else 0


def start_of(catalog: Catalog, named: ModelVersion, train: TrainConfig, asked: Asked = "active") -> Start:
    """What a run on the version starts from; the merged version is made now where there is none yet. `asked`: as in
    `frozen_of`, which says what this raises."""
    base = full_base(catalog, named, train)
    frozen = frozen_of(catalog, train, base, asked)
    if train.init_from == "merge":
        return Start(merged_version(catalog, named) or _merge(catalog, named, base), frozen=frozen)
    return Start(base, named if train.init_from == "continue" else None, frozen)


def licence_of(catalog: Catalog, run: RunRecord) -> str:
    """Of what a run made: that of its base, and of the model whose numbers its loss read."""
    frozen = catalog.get_as(ModelVersion, run.frozen_model) if run.frozen_model else None
    return joined_licence(catalog.get_as(ModelVersion, run.base_model).licence, frozen)


def merged_version(catalog: Catalog, adapter: ModelVersion) -> ModelVersion | None:
    """The version of an adapter and its base added up, if it is in the store."""
    for version in catalog.all(ModelVersion):
        is_of_adapter = version.status == "merged" and version.base_model == adapter.id
        if is_of_adapter and catalog.store.is_published(paths.model(version.id)):
            return version
    return None


def _merge(catalog: Catalog, adapter: ModelVersion, base: ModelVersion) -> ModelVersion:
    """Add an adapter to its base: the sum in fp32, rounded once to the dtype of the base."""
    from forge_ray.train.model import merge_adapter

    store = catalog.store
    catalog.check_may("models")
    with stage("merge") as it:
        full = store.fetch_dir(paths.model(base.id), files=base.files)
        low_rank = store.fetch_dir(paths.model(adapter.id), files=adapter.files)
        version = make_version(
            catalog,
            [adapter, base],
            partial(merge_adapter, full, low_rank),
            "merged",
            adapter.name,
            f"{adapter.id} merged into {base.id}",
        )
        it.done(f"{version.id}  {version.source}")
        return version


def refuse_other_adapter(catalog: Catalog, start: Start, adapter: Adapter | None, targets: tuple[Target, ...] = ()) -> None:
    """Raise `ConfigError` where `train.adapter` is not the adapter that is trained on: of another rank, scale or method, on
    other weights, or with a head over other labels (`targets`: those of the run). Shapes alone are looked at."""
    from forge_ray.train.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, shapes_of

    version = start.initial
    if version is None or adapter is None:
        return
    store = catalog.store
    folder = store.fetch_dir(paths.model(version.id), files=version.files)
    stored = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    method = "dora" if stored.get("use_dora") else "rslora" if stored.get("use_rslora") else "lora"
    theirs = {"method": method, "r": stored["r"], "alpha": stored["lora_alpha"]}
    other = {name: value for name, value in theirs.items() if getattr(adapter, name) != value}
    if other:
        is_set = " ".join(f"train.adapter.{name}={getattr(adapter, name)}" for name in other)
        raise ConfigError(
            f"{is_set}: the adapter of {version.id} has {' '.join(f'{name}={value}' for name, value in other.items())}, and"
            " init_from=continue trains that one on",
            hint=f"set {' '.join(f'train.adapter.{name}={value}' for name, value in other.items())}, or"
            " train.init_from=merge for another adapter",
        )
    base = store.fetch_dir(paths.model(start.base.id), files=start.base.files, verify=False)
    if (before := class_names(targets_of(folder))) != class_names(targets):
        raise ConfigError(
            f"the adapter of {version.id} has a head over the labels {list(before)}, and this run's targets have"
            f" {list(class_names(targets))}",
            hint="init_from=continue trains the head on too: list the same labels in the same order, or start from"
            f" {start.base.id}",
        )
    own, kept = _weights_of_new(base, adapter, Head(targets)), shapes_of(folder / ADAPTER_WEIGHTS)
    if own != kept:
        more, fewer = _layers(own, kept), _layers(kept, own)
        raise ConfigError(
            f"train.adapter reaches other weights than the adapter of {version.id}, which init_from=continue trains on:"
            + (f" also {', '.join(more)}" if more else "")
            + (f"{' and' if more else ''} not {', '.join(fewer)}" if fewer else ""),
            hint="set target_modules, target_parameters and modules_to_save as in the run that made it"
            f" ({version.run}; `forge init --from {version.id}` writes them), or train.init_from=merge for another adapter",
        )


def _weights_of_new(base: Path, adapter: Adapter, head: Head) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a new adapter would have."""
    import torch
    from peft import get_peft_model_state_dict

    from forge_ray.models.architecture import empty_model
    from forge_ray.train.adapter import with_adapter

    with torch.device("meta"):
        model = with_adapter(empty_model(base, head), adapter, head)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _layers(some: dict[str, tuple[int, ...]], others: dict[str, tuple[int, ...]]) -> list[str]:
    """The kinds of layers that only `some` has, or has in another shape."""
    names = [name.partition(".lora_")[0].removesuffix(".weight") for name in some if some[name] != others.get(name)]
    return sorted({name.rpartition(".")[2] for name in names})
