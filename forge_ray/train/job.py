"""What a worker is told: one small, picklable value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError, NotFound
from forge_ray.records import DatasetManifest, ModelVersion, RunRecord, digest, short_id
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train import attempts, run_folder
from forge_ray.train.frozen import FrozenModel, of_version

LOOP = 3  # raised when the loop changes what the same settings compute


@dataclass(frozen=True)
class TrainJob:
    """One training run. `config` has a resolved precision; `base` and `dataset` are complete records."""

    run: str
    name: str
    config: TrainConfig
    store: Store
    dataset: DatasetManifest
    base: ModelVersion
    precision: str
    under_ray: bool
    initial: ModelVersion | None = None  # the adapter that is trained on; None: a new one, or every weight
    frozen: FrozenModel | None = None  # whose numbers the loss reads; None: nobody's, or those of the start
    chosen_micro_batch: int = 0  # where train.micro_batch_size=auto; else 0

    @property
    def micro_batch_size(self) -> int:
        """Packed rows per forward pass."""
        size = self.config.micro_batch_size
        return max(self.chosen_micro_batch, 1) if size == "auto" else size

    @property
    def origins(self) -> tuple[str, ...]:
        """The versions that the weights of the run depend on."""
        return origins(self.base, self.initial, self.frozen)

    def check_may_publish(self, number: int | None = None) -> None:
        """As `attempts.check_may_publish`, for this run."""
        attempts.check_may_publish(self.store, self.run, self.dataset.id, *self.origins, number=number)

    def to_json(self) -> dict[str, Any]:
        """For Ray Train's `train_loop_config`."""
        return {
            "run": self.run,
            "name": self.name,
            "config": self.config.model_dump(mode="json"),
            "store": self.store.uri,
            "dataset": self.dataset.model_dump(mode="json"),
            "base": self.base.model_dump(mode="json"),
            "precision": self.precision,
            "under_ray": self.under_ray,
            "initial": self.initial.model_dump(mode="json") if self.initial else None,
            "frozen": self.frozen.to_json() if self.frozen else None,
            "chosen_micro_batch": self.chosen_micro_batch,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrainJob:
        return cls(
            run=value["run"],
            name=value["name"],
            config=parse(TrainConfig, value["config"]),
            store=Store(value["store"]),
            dataset=DatasetManifest.model_validate(value["dataset"]),
            base=ModelVersion.model_validate(value["base"]),
            precision=value["precision"],
            under_ray=value["under_ray"],
            initial=ModelVersion.model_validate(value["initial"]) if value["initial"] else None,
            frozen=FrozenModel.from_json(value["frozen"]) if value["frozen"] else None,
            chosen_micro_batch=value["chosen_micro_batch"],
        )


def origins(base: ModelVersion, initial: ModelVersion | None, frozen: FrozenModel | None) -> tuple[str, ...]:
    """Ids of the versions that the weights of a run depend on, that of its base first."""
    versions = (base, *([initial] if initial else []), *(frozen.versions if frozen else ()))
    return tuple(dict.fromkeys(version.id for version in versions))


def identity(
    config: TrainConfig,
    precision: str,
    dataset: str,
    base: ModelVersion,
    initial: ModelVersion | None = None,
    frozen: FrozenModel | None = None,
) -> dict[str, Any]:
    """What decides the weights of a run; its hash is the run's id, so the same request finds the same run."""
    settings = config.identity() | {"precision": precision}
    start: dict[str, Any] = {"base": base.files_digest} | ({"initial": initial.files_digest} if initial else {})
    start |= {"frozen": frozen.digests} if frozen else {}
    return {"loop": LOOP, "config": settings, "dataset": dataset} | start


def run_id(
    config: TrainConfig,
    precision: str,
    dataset: DatasetManifest,
    base: ModelVersion,
    initial: ModelVersion | None = None,
    frozen: FrozenModel | None = None,
) -> str:
    return short_id("run", identity(config, precision, dataset.id, base, initial, frozen))


def identity_digest(job: TrainJob) -> str:
    return digest(identity(job.config, job.precision, job.dataset.id, job.base, job.initial, job.frozen))


def job_of(catalog: Catalog, run: str) -> TrainJob:
    """The job of a run that has started, from its record, or from what lies in its folder. Raises `NotFound`, or
    `ConfigError` where those settings no longer give this run id."""
    store = catalog.store
    path, position = run_folder.config_path(store, run), next(run_folder.positions(store, run), None)
    if catalog.has(run):
        record = catalog.get_as(RunRecord, run)
        names = ("dataset", "base_digest", "initial_digest", "frozen_digest")
        position = {name: getattr(record, name) for name in names}
        size = record.micro_batch_size
        settings: dict[str, Any] = {"name": record.name, **record.config}
    elif path is None or position is None:
        raise NotFound(f"{run!r} has no checkpoint", hint="`forge runs list` shows the runs of this store")
    else:
        settings, size = store.read_json(path), run_folder.micro_batch_of(store, run)
    config = parse(TrainConfig, settings["train"], where=run)
    dataset = catalog.get_as(DatasetManifest, position["dataset"])
    initial_digest = position.get("initial_digest", "")
    initials: list[ModelVersion | None] = [*_published(catalog, initial_digest)] if initial_digest else [None]
    frozen_digest = position.get("frozen_digest", "")
    asked: list[FrozenModel | None] = [*frozen_with(catalog, frozen_digest)] if frozen_digest else [None]
    for base, initial, frozen in product(_published(catalog, position["base_digest"]), initials, asked):
        for precision in ("bf16", "fp32"):  # `auto` was resolved on the machine that trained
            if run_id(config, precision, dataset, base, initial, frozen) == run:
                name = settings["name"]
                return TrainJob(run, name, config, store, dataset, base, precision, False, initial, frozen, size)
    raise ConfigError(
        f"{run} was trained with settings that mean something else in this version, or its base model is gone",
        hint="take the version that trained it (its record's code_digest), or train again",
    )


def _published(catalog: Catalog, files_digest: str) -> list[ModelVersion]:
    """The versions with these files whose files are in the store."""
    same = [version for version in catalog.all(ModelVersion) if version.files_digest == files_digest]
    return [version for version in same if catalog.store.is_published(paths.model(version.id))]


def frozen_with(catalog: Catalog, files_digest: str = "") -> Iterator[FrozenModel]:
    """The versions with these files (all, without a digest) as frozen models, where the records of their bases are here."""
    for version in catalog.all(ModelVersion):
        is_whole = version.weights == "full" or catalog.has(version.base_model)
        if is_whole and files_digest in ("", version.files_digest):
            yield of_version(catalog, version)
