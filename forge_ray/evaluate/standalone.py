"""Evaluation without a run: models side by side on the same held-out rows. Models are found here by their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from forge_ray.config.release import EvalConfig
from forge_ray.data.dataset.version import records
from forge_ray.errors import ConfigError
from forge_ray.evaluate.chat_api import Endpoint
from forge_ray.evaluate.endpoint import evaluate_endpoint, refuse_endpoint
from forge_ray.evaluate.reports import evaluate, model_subject, run_subject
from forge_ray.evaluate.rows import dataset_of
from forge_ray.evaluate.score import EvaluatedModel
from forge_ray.records import DatasetManifest, EvalReport, ModelVersion, RunRecord
from forge_ray.store.catalog import Catalog
from forge_ray.store.resolve import resolve
from forge_ray.train.start import chain_of


def subject_of(catalog: Catalog, name: str) -> tuple[EvaluatedModel, ModelVersion]:
    """A version, alias or finished run by its name, and the base model whose tokenizer it has."""
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
    """A report of each, in order, on the rows that `data` holds out. What may not be sent is refused before any work."""
    subjects = [subject_of(catalog, name) for name in compared.names]
    for endpoint in () if compared.reuse else compared.endpoints:
        refuse_endpoint(catalog, endpoint)
    manifest = data if isinstance(data, DatasetManifest) else _dataset(catalog, data, subjects, settings)
    named = zip(compared.names, subjects, strict=True)
    reports = [evaluate(catalog, subject, manifest, config, name) for name, (subject, _) in named]
    return reports + [
        evaluate_endpoint(catalog, endpoint, manifest, config, compared.reuse) for endpoint in compared.endpoints
    ]


def _dataset(
    catalog: Catalog, data: str, subjects: list[tuple[EvaluatedModel, ModelVersion]], settings: dict[str, Any]
) -> DatasetManifest:
    if not subjects and not catalog.has(data):
        raise ConfigError(
            f"{data} is not a dataset of this store, and rows of a file are read for a model of it",
            hint="add --model NAME, or give a run file or a dataset (ds_…)",
        )
    return dataset_of(catalog, data, subjects[0][1], settings) if subjects else catalog.get_as(DatasetManifest, data)


def trained_rows(catalog: Catalog, name: str, report: EvalReport) -> dict[str, int]:
    """Dataset version → rows of the report's split that the model was trained on from there, itself or a version that it
    started from. Their scores are not held-out ones."""
    record = catalog.get(resolve(catalog, name))
    runs = [record] if isinstance(record, RunRecord) else []
    start = (
        catalog.get_as(ModelVersion, record.initial_adapter or record.base_model)
        if isinstance(record, RunRecord)
        else record
    )
    versions = chain_of(catalog, start) if isinstance(start, ModelVersion) else ()
    runs += [catalog.get_as(RunRecord, version.run) for version in versions if version.run and catalog.has(version.run)]
    evaluated = {record for ids in _record_ids(catalog, report.dataset, report.split) for record in ids}
    counts = {
        run.dataset: sum(len(evaluated.intersection(ids)) for ids in _record_ids(catalog, run.dataset, "train"))
        for run in runs
    }
    return {dataset: count for dataset, count in counts.items() if count}


def _record_ids(catalog: Catalog, dataset: str, split: str) -> Iterator[list[str]]:
    """Of a split, part after part; none where the rows were removed."""
    if catalog.has(dataset):
        for table in records(catalog.store, catalog.get_as(DatasetManifest, dataset), split, ["record"]):
            yield table.column("record").to_pylist()
