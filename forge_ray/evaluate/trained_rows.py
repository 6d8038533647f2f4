"""Which of the evaluated rows a model was trained on: it may be scored on any rows, and their scores then say less."""

from __future__ import annotations

from collections.abc import Iterator

from forge_ray.data.dataset.version import records
from forge_ray.evaluate.standalone import checkpoint_of
from forge_ray.records import DatasetManifest, EvalReport, ModelVersion, RunRecord
from forge_ray.store.catalog import Catalog
from forge_ray.store.resolve import resolve
from forge_ray.train.start import chain_of


def trained_rows(catalog: Catalog, name: str, report: EvalReport) -> dict[str, int]:
    """Dataset version → rows of the report's split that a version, alias, run or checkpoint was trained on from there, or a
    version that it started from. Counted by the id of a record: the same text in a pair and in a chat is two rows."""
    evaluated = {record for ids in _record_ids(catalog, report.dataset, report.split) for record in ids}
    counts = {
        dataset: sum(len(evaluated.intersection(ids)) for ids in _record_ids(catalog, dataset, "train"))
        for dataset in _datasets(catalog, name)
    }
    return {dataset: count for dataset, count in counts.items() if count}


def _datasets(catalog: Catalog, name: str) -> list[str]:
    """What the model was trained on, newest first."""
    if checkpoint := checkpoint_of(catalog, name):
        job = checkpoint.job
        own, start = [job.dataset.id], job.initial or job.base
    else:
        record = catalog.get(resolve(catalog, name))
        if isinstance(record, RunRecord):
            own, start = [record.dataset], catalog.get_as(ModelVersion, record.initial_adapter or record.base_model)
        else:
            own, start = [], catalog.get_as(ModelVersion, record.id)
    runs = [version.run for version in chain_of(catalog, start) if version.run and catalog.has(version.run)]
    return list(dict.fromkeys([*own, *(catalog.get_as(RunRecord, run).dataset for run in runs)]))


def _record_ids(catalog: Catalog, dataset: str, split: str) -> Iterator[list[str]]:
    """Of a split, part after part; none where the rows were removed."""
    if catalog.has(dataset):
        for table in records(catalog.store, catalog.get_as(DatasetManifest, dataset), split, ["record"]):
            yield table.column("record").to_pylist()
