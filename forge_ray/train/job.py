"""What a worker is told: one small, picklable value."""

from __future__ import annotations

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

    def check_may_publish(self, number: int | None = None) -> None:
        """As `attempts.check_may_publish`, for this run."""
        initial = self.initial.id if self.initial else ""
        attempts.check_may_publish(self.store, self.run, self.dataset.id, self.base.id, number, initial)

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
        )


def identity(config: TrainConfig, precision: str, dataset: str, base_digest: str, initial_digest: str) -> dict[str, Any]:
    """What decides the weights of a run; its hash is the run's id, so the same request finds the same run."""
    settings = config.identity() | {"precision": precision}
    start = {"base": base_digest} | ({"initial": initial_digest} if initial_digest else {})
    return {"loop": LOOP, "config": settings, "dataset": dataset} | start


def run_id(
    config: TrainConfig, precision: str, dataset: DatasetManifest, base: ModelVersion, initial: ModelVersion | None = None
) -> str:
    digest_of_initial = initial.files_digest if initial else ""
    return short_id("run", identity(config, precision, dataset.id, base.files_digest, digest_of_initial))


def identity_digest(job: TrainJob) -> str:
    initial_digest = job.initial.files_digest if job.initial else ""
    return digest(identity(job.config, job.precision, job.dataset.id, job.base.files_digest, initial_digest))


def job_of(catalog: Catalog, run: str) -> TrainJob:
    """The job of a run that has started, from its record, or from what lies in its folder. Raises `NotFound`, or
    `ConfigError` where those settings no longer give this run id."""
    store = catalog.store
    path, position = run_folder.config_path(store, run), next(run_folder.positions(store, run), None)
    if catalog.has(run):
        record = catalog.get_as(RunRecord, run)
        position = {name: getattr(record, name) for name in ("dataset", "base_digest", "initial_digest")}
        settings: dict[str, Any] = {"name": record.name, **record.config}
    elif path is None or position is None:
        raise NotFound(f"{run!r} has no checkpoint", hint="`forge runs list` shows the runs of this store")
    else:
        settings = store.read_json(path)
    config = parse(TrainConfig, settings["train"], where=run)
    dataset = catalog.get_as(DatasetManifest, position["dataset"])
    initial_digest = position.get("initial_digest", "")
    initials: list[ModelVersion | None] = [*_published(catalog, initial_digest)] if initial_digest else [None]
    for base, initial in product(_published(catalog, position["base_digest"]), initials):
        for precision in ("bf16", "fp32"):  # `auto` was resolved on the machine that trained
            if run_id(config, precision, dataset, base, initial) == run:
                name = settings["name"]
                return TrainJob(run, name, config, store, dataset, base, precision, under_ray=False, initial=initial)
    raise ConfigError(
        f"{run} was trained with settings that mean something else in this version, or its base model is gone",
        hint="take the version that trained it (its record's code_digest), or train again",
    )


def _published(catalog: Catalog, files_digest: str) -> list[ModelVersion]:
    """The versions with these files whose files are in the store."""
    same = [version for version in catalog.all(ModelVersion) if version.files_digest == files_digest]
    return [version for version in same if catalog.store.is_published(paths.model(version.id))]
