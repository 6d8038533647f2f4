"""Evaluation without a run: models side by side on the same held-out rows. What a person names is found here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_ray.config.base import parse
from forge_ray.config.data import DataConfig
from forge_ray.config.release import EvalConfig
from forge_ray.errors import ConfigError, NotFound
from forge_ray.evaluate.reports import checkpoint_subject, evaluate, model_subject, run_subject
from forge_ray.evaluate.score import EvaluatedModel
from forge_ray.machine import sessions
from forge_ray.machine.cluster import connect
from forge_ray.progress import stage
from forge_ray.records import DatasetManifest, EvalReport, ModelVersion, RunRecord
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.resolve import resolve
from forge_ray.store.uses import using

if TYPE_CHECKING:
    from forge_ray.train.job import TrainJob

LONGEST = 8192  # tokens of a held-out conversation, where the model has positions for more


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


def rows_of_file(catalog: Catalog, file: str, base: ModelVersion, settings: dict[str, Any]) -> DataConfig:
    """The settings of a dataset that holds every row of `file` out; `settings` go before the defaults of this use."""
    length = min(LONGEST, _positions(catalog, base))
    defaults = {"sequence_length": length, "splits": {"validation": 0.0, "test": 1.0}}
    return parse(DataConfig, {"sources": [{"path": file}]} | defaults | settings, where="data")


def _positions(catalog: Catalog, base: ModelVersion) -> int:
    config = catalog.store.read_json(paths.model(base.id, "config.json"))
    return int(config.get("text_config", config).get("max_position_embeddings") or LONGEST)


def dataset_of(catalog: Catalog, data: str, base: ModelVersion, settings: dict[str, Any]) -> DatasetManifest:
    """`data`: the id of a dataset version, or a file of rows, all of which are held out; a version of it is built once."""
    if catalog.has(data) or (data.startswith("ds_") and not Path(data).exists()):
        return catalog.get_as(DatasetManifest, data)
    from forge_ray.data.build.prepare import prepare_version
    from forge_ray.data.dataset.version import require_tokenizer

    connect()
    sessions.note(catalog.store)
    require_tokenizer(catalog.store, base)
    with stage("prepare") as it:
        prepared = prepare_version(name_of(data), rows_of_file(catalog, data, base, settings), base, catalog, it.update)
        it.done(f"{prepared.manifest.id}  {prepared.summary}")
    return prepared.manifest


def evaluate_models(
    catalog: Catalog, names: Sequence[str], data: str | DatasetManifest, config: EvalConfig, settings: dict[str, Any]
) -> list[EvalReport]:
    """A report of each named model, in order, on the rows that `data` holds out. A checkpoint is exported aside for as long
    as it is evaluated; the run that it is of may be training."""
    named = [subject_of(catalog, name) for name in names]
    manifest = data if isinstance(data, DatasetManifest) else dataset_of(catalog, data, named[0][1], settings)
    checkpoints = [one.folder for one, _ in named if isinstance(one, NamedCheckpoint)]
    with using(catalog.store, f"evaluation of {', '.join(names)}", *checkpoints):
        return [_evaluated(catalog, one, manifest, config, name) for name, (one, _) in zip(names, named, strict=True)]


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


def name_of(file: str) -> str:
    """A dataset's name, from its file's."""
    stem = Path(file).stem.lower()
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in stem).strip("._-")[:64] or "rows"
