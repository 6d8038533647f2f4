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
        own, starts = [job.dataset.id], [job.initial or job.base, *([job.frozen.version] if job.frozen else [])]
    else:
        record = catalog.get(resolve(catalog, name))
        if isinstance(record, RunRecord):
            own, starts = [record.dataset], [*_starts(catalog, record)]
        else:
            own, starts = [], [catalog.get_as(ModelVersion, record.id)]
    datasets, seen = dict.fromkeys(own), set[str]()
    while starts:
        for version in chain_of(catalog, starts.pop(0)):
            if version.id not in seen and version.run and catalog.has(version.run):
                run = catalog.get_as(RunRecord, version.run)
                datasets.setdefault(run.dataset)
                starts += [each for each in _starts(catalog, run) if each.id == run.frozen_model]
            seen.add(version.id)
    return list(datasets)


def _starts(catalog: Catalog, run: RunRecord) -> Iterator[ModelVersion]:
    """The versions that a run started from, and whose numbers its loss read."""
    for version in (run.initial_adapter or run.base_model, run.frozen_model):
        if version and (version == run.base_model or catalog.has(version)):
            yield catalog.get_as(ModelVersion, version)


def _record_ids(catalog: Catalog, dataset: str, split: str) -> Iterator[list[str]]:
    """Of a split, part after part; none where the rows were removed."""
    if catalog.has(dataset):
        for table in records(catalog.store, catalog.get_as(DatasetManifest, dataset), split, ["record"]):
            yield table.column("record").to_pylist()
