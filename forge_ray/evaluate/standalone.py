"""Evaluation without a run: models side by side on the same held-out rows. Models are found here by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forge_ray.config.release import EvalConfig
from forge_ray.errors import ConfigError
from forge_ray.evaluate.reports import evaluate, model_subject, run_subject
from forge_ray.evaluate.rows import dataset_of
from forge_ray.evaluate.score import EvaluatedModel
from forge_ray.records import DatasetManifest, EvalReport, ModelVersion, RunRecord
from forge_ray.store.catalog import Catalog
from forge_ray.store.resolve import resolve


def subject_of(catalog: Catalog, name: str) -> tuple[EvaluatedModel, ModelVersion]:
    """A version, alias or finished run by its name, and the base model whose tokenizer it has."""
    record = catalog.get(resolve(catalog, name))
    if isinstance(record, RunRecord):
        return run_subject(catalog, record), catalog.get_as(ModelVersion, record.base_model)
    if not isinstance(record, ModelVersion):
        raise ConfigError(f"{name} is no model: it is one of {record.kind}", hint="`forge models list` shows the models")
    base = catalog.get_as(ModelVersion, record.base_model) if record.weights == "adapter" else record
    return model_subject(catalog, record), base


def evaluate_models(
    catalog: Catalog, names: Sequence[str], data: str | DatasetManifest, config: EvalConfig, settings: dict[str, Any]
) -> list[EvalReport]:
    """A report of each named model, in order, on the rows that `data` holds out."""
    subjects = [subject_of(catalog, name) for name in names]
    manifest = data if isinstance(data, DatasetManifest) else dataset_of(catalog, data, subjects[0][1], settings)
    return [evaluate(catalog, subject, manifest, config, name) for name, (subject, _) in zip(names, subjects, strict=True)]
