"""Evaluation without a run: models side by side on the same held-out rows. Models are found here by their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forge_ray.config.release import EvalConfig
from forge_ray.errors import ConfigError, NotFound
from forge_ray.evaluate.chat_api import Endpoint
from forge_ray.evaluate.endpoint import evaluate_endpoint, refuse_endpoint
from forge_ray.evaluate.reports import checkpoint_subject, evaluate, model_subject, run_subject
from forge_ray.evaluate.rows import dataset_of
from forge_ray.evaluate.score import EvaluatedModel
from forge_ray.machine.cluster import connect
from forge_ray.records import DatasetManifest, EvalReport, ModelVersion, RunRecord
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.resolve import resolve
from forge_ray.store.uses import using

if TYPE_CHECKING:
    from forge_ray.train.job import TrainJob


@dataclass(frozen=True)
class NamedCheckpoint:
    """A checkpoint that a person names as `run_…@step`, where `step` is a number, `best` or `last`."""

    job: TrainJob
    step: int

    @property
    def folder(self) -> str:
        return paths.checkpoint(self.job.run, self.step)


def checkpoint_of(catalog: Catalog, name: str) -> NamedCheckpoint | None:
    """The checkpoint that a name denotes; None for the name of anything else. Raises `NotFound` where the run has no such
    checkpoint, with those that it has, and `ConfigError` where the step is not one."""
    from forge_ray.train.checkpoint_export import step_of
    from forge_ray.train.job import job_of

    run, at, step = name.rpartition("@")
    if not at or not run.startswith(RunRecord.prefix + "_") or name in catalog.aliases():
        return None
    job = job_of(catalog, run)
    return NamedCheckpoint(job, step_of(job, step))


def subject_of(catalog: Catalog, name: str) -> tuple[EvaluatedModel | NamedCheckpoint, ModelVersion]:
    """A version, alias, finished run or checkpoint by its name, and the base model whose tokenizer it has."""
    if checkpoint := checkpoint_of(catalog, name):
        return checkpoint, checkpoint.job.base
    if name not in catalog.aliases() and not catalog.has(name) and catalog.events("run", name):
        raise NotFound(
            f"the run {name} is not finished",
            hint=f"--model {name}@last evaluates its newest checkpoint, {name}@best the best",
        )
    record = catalog.get(resolve(catalog, name))
    if isinstance(record, RunRecord):
        return run_subject(catalog, record), catalog.get_as(ModelVersion, record.base_model)
    if not isinstance(record, ModelVersion):
        raise ConfigError(f"{name} is no model: it is one of {record.kind}", hint="`forge models list` shows the models")
    base = catalog.get_as(ModelVersion, record.base_model) if record.weights == "adapter" else record
    return model_subject(catalog, record), base


@dataclass(frozen=True)
class Compared:
    """What is compared: models of the store by name, then those of endpoints. `reuse`: the last report of an endpoint on the
    same rows is enough."""

    names: tuple[str, ...]
    endpoints: tuple[Endpoint, ...] = ()
    reuse: bool = False


def evaluate_models(
    catalog: Catalog, compared: Compared, data: str | DatasetManifest, config: EvalConfig, settings: dict[str, Any]
) -> list[EvalReport]:
    """A report of each, in order, on the rows that `data` holds out. What may not be sent is refused before any work. A
    checkpoint is exported aside for as long as it is evaluated; the run that it is of may be training."""
    named = [subject_of(catalog, name) for name in compared.names]
    for endpoint in () if compared.reuse else compared.endpoints:
        refuse_endpoint(catalog, endpoint)
    bases = [base for _, base in named]
    manifest = data if isinstance(data, DatasetManifest) else _dataset(catalog, data, bases, settings)
    checkpoints = [one.folder for one, _ in named if isinstance(one, NamedCheckpoint)]
    with using(catalog.store, f"evaluation of {', '.join(compared.names)}", *checkpoints):
        reports = [_evaluated(catalog, one, manifest, config, n) for n, (one, _) in zip(compared.names, named, strict=True)]
    return reports + [
        evaluate_endpoint(catalog, endpoint, manifest, config, compared.reuse) for endpoint in compared.endpoints
    ]


def _evaluated(
    catalog: Catalog, one: EvaluatedModel | NamedCheckpoint, manifest: DatasetManifest, config: EvalConfig, name: str
) -> EvalReport:
    if not isinstance(one, NamedCheckpoint):
        return evaluate(catalog, one, manifest, config, name)
    from forge_ray.train.checkpoint_export import exported

    connect()
    what = f"{one.job.run}@{one.step}"
    with exported(one.job, one.step, f"evaluation of {what}") as export:
        return evaluate(catalog, checkpoint_subject(catalog, one.job, one.step, export), manifest, config, what)


def _dataset(catalog: Catalog, data: str, bases: list[ModelVersion], settings: dict[str, Any]) -> DatasetManifest:
    if not bases and not catalog.has(data):
        raise ConfigError(
            f"{data} is not a dataset of this store, and rows of a file are read for a model of it",
            hint="add --model NAME, or give a run file or a dataset (ds_…)",
        )
    return dataset_of(catalog, data, bases[0], settings) if bases else catalog.get_as(DatasetManifest, data)
