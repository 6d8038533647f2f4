"""The version's history as OpenLineage events 2-0-2, one JSON object a line. openlineage.io/spec.

Only a file is written; post its lines to a collector if there is one. Run ids are UUIDs derived from record ids, so the
same record is the same run everywhere.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from forge_ray.evaluate.items import splits_of
from forge_ray.papers.bom import NAMESPACE
from forge_ray.papers.facts import Facts, RunFacts, sha256_of
from forge_ray.records import DatasetManifest, EvalReport, ModelVersion, SourceFile, hex_of

Json = dict[str, Any]
SPEC = "https://openlineage.io/spec/2-0-2/OpenLineage.json"
FACETS = "https://openlineage.io/spec/facets"
SPACE = "forge"
STATISTICS = "OutputStatisticsOutputDatasetFacet"


@dataclass(frozen=True)
class LineageStep:
    """One step of the history, as the START and COMPLETE events of a run: of `record` (its id), from `inputs` to `outputs`.
    `facet` are the fields of the record that the run shows."""

    kind: str
    record: str
    name: str
    began: str
    ended: str
    inputs: list[Json]
    outputs: list[Json]
    facet: Json


def openlineage(facts: Facts) -> bytes:
    """The events of all steps, in the order of their times."""
    events = [event for step in _steps(facts) for event in _events(facts, step)]
    events.sort(key=lambda item: item[:2])
    return "".join(json.dumps(event, sort_keys=True, ensure_ascii=False) + "\n" for _, _, event in events).encode()


def _steps(facts: Facts) -> Iterator[LineageStep]:
    """Rows become a dataset, the dataset a run; the run is evaluated and becomes a version."""
    for dataset in facts.datasets:
        yield LineageStep(
            kind="prepare",
            record=dataset.id,
            name=dataset.name,
            began=_start_of(dataset),
            ended=dataset.created_at,
            inputs=[_source(facts, source) for source in dataset.sources],
            outputs=[_dataset(facts, dataset) | _statistics(facts, dataset)],
            facet={"tokenizer_digest": dataset.tokenizer_digest, "rejects": dataset.rejects, "kinds": dataset.kinds},
        )
    for training in facts.trainings:
        yield _training(facts, training)
    for report in facts.evals:
        yield LineageStep(
            kind="evaluate",
            record=report.id,
            name=report.split,
            began=_start_of(report),
            ended=report.created_at,
            inputs=[
                _named(facts, report.subject, report.subject_digest),
                *(_dataset_named(facts, dataset) for dataset in dict.fromkeys(dataset for dataset, _ in splits_of(report))),
            ],
            outputs=[_named(facts, report.id, report.items_sha256)],
            facet={"scores": report.metrics, "split": report.split, "examples": report.num_examples},
        )
    for version in facts.chain:
        names = [version.run, *version.evals] if version.run else []
        names += [version.base_model] if version.status == "merged" else []
        yield LineageStep(
            kind={"imported": "import", "merged": "merge"}.get(version.status, "release"),
            record=version.id,
            name=version.name,
            began=version.created_at,
            ended=version.created_at,
            inputs=[_named(facts, name, "") for name in names if name],
            outputs=[_version(facts, version)],
            facet={"status": version.status, "reasons": list(version.reasons), "licence": version.licence},
        )


def _training(facts: Facts, training: RunFacts) -> LineageStep:
    run = training.run
    return LineageStep(
        kind="train",
        record=run.id,
        name=run.name,
        began=training.started_at or run.created_at,
        ended=run.created_at,
        inputs=[
            _dataset_named(facts, run.dataset),
            _named(facts, run.base_model, run.base_digest),
            *([_named(facts, run.initial_adapter, run.initial_digest)] if run.initial_adapter else []),
            *([_named(facts, run.frozen_model, run.frozen_digest)] if run.frozen_model else []),
        ],
        outputs=[_named(facts, run.id, run.order_digest, [entry.model_dump() for entry in run.export])],
        facet={
            "method": run.method,
            "steps": run.num_steps,
            "samples": run.samples_seen,
            "seed": run.seed,
            "config_digest": run.config_digest,
            "code_digest": run.code_digest,
            "order_digest": run.order_digest,
            "metrics": run.metrics,
            "incidents": len(run.incidents),
            "environment": run.environment,
        },
    )


def _events(facts: Facts, step: LineageStep) -> list[tuple[str, int, Json]]:
    """START and COMPLETE of one step as (time, order, event): at equal times START comes first."""
    facet = {"_producer": producer(facts), "_schemaURL": f"{SPEC}#/$defs/RunFacet"} | step.facet | {"id": step.record}
    job_type = {
        "_producer": producer(facts),
        "_schemaURL": f"{FACETS}/2-0-4/JobTypeJobFacet.json#/$defs/JobTypeJobFacet",
        "processingType": "BATCH",
        "integration": "FORGE_RAY",
        "jobType": step.kind.upper(),
    }
    return [
        (
            at,
            order,
            {
                "eventType": kind,
                "eventTime": at,
                "producer": producer(facts),
                "schemaURL": f"{SPEC}#/$defs/RunEvent",
                "run": {"runId": str(uuid.uuid5(NAMESPACE, step.record)), "facets": {"forge_record": facet}},
                "job": {"namespace": SPACE, "name": f"{step.kind}.{step.name}", "facets": {"jobType": job_type}},
                "inputs": step.inputs,
                "outputs": step.outputs if kind == "COMPLETE" else [],
            },
        )
        for order, (kind, at) in enumerate((("START", step.began), ("COMPLETE", step.ended)))
    ]


def producer(facts: Facts) -> str:
    return f"urn:forge-ray:{facts.forge_version}"


def _start_of(record: DatasetManifest | EvalReport) -> str:
    """When the work on a record began: its end less the seconds on record."""
    ended = datetime.fromisoformat(record.created_at)
    return (ended - timedelta(seconds=record.seconds)).isoformat(timespec="milliseconds")


def _dataset_named(facts: Facts, identifier: str) -> Json:
    for dataset in facts.datasets:
        if dataset.id == identifier:
            return _dataset(facts, dataset)
    return _named(facts, identifier, "")


def _dataset(facts: Facts, dataset: DatasetManifest) -> Json:
    return _named(facts, dataset.id, sha256_of(dataset))


def _statistics(facts: Facts, dataset: DatasetManifest) -> Json:
    facet = {
        "_producer": producer(facts),
        "_schemaURL": f"{FACETS}/1-0-2/{STATISTICS}.json#/$defs/{STATISTICS}",
        "rowCount": sum(split.num_records for split in dataset.splits.values()),
        "size": sum(entry.size for entry in dataset.files),
        "fileCount": len(dataset.files),
    }
    return {"outputFacets": {"outputStatistics": facet}}


def _version(facts: Facts, version: ModelVersion) -> Json:
    return _named(facts, version.id, version.files_digest, [entry.model_dump() for entry in version.files])


def _source(facts: Facts, source: SourceFile) -> Json:
    return _named(facts, source.path, source.sha256) | {"namespace": "file"}


def _named(facts: Facts, name: str, digest: str, files: list[Json] | None = None) -> Json:
    """A dataset in OpenLineage's sense (rows, weights or a report); its version is its digest, else its name."""
    value = hex_of(digest)
    version = {
        "_producer": producer(facts),
        "_schemaURL": f"{FACETS}/1-0-1/DatasetVersionDatasetFacet.json#/$defs/DatasetVersionDatasetFacet",
        "datasetVersion": f"sha256:{value}" if value else name,
    }
    facets: Json = {"version": version}
    if files:
        facets["forge_files"] = {
            "_producer": producer(facts),
            "_schemaURL": f"{SPEC}#/$defs/DatasetFacet",
            "files": files,
        }
    return {"namespace": SPACE, "name": name, "facets": facets}
