"""The version's history as OpenLineage events 2-0-2, one JSON object a line. openlineage.io/spec.

A file and nothing else: whoever runs a collector posts the lines to it. Run ids are UUIDs made of our ids, so the same
record is the same run everywhere.
"""

from __future__ import annotations

import json
import uuid
from datetime import datetime, timedelta
from typing import Any

from forge_ray.papers.bom import NAMESPACE
from forge_ray.papers.facts import Facts, RunFacts, sha256_of
from forge_ray.records import DatasetManifest, EvalReport, ModelVersion, SourceFile

Json = dict[str, Any]
SPEC = "https://openlineage.io/spec/2-0-2/OpenLineage.json"
FACETS = "https://openlineage.io/spec/facets"
SPACE = "forge"
STATISTICS = "OutputStatisticsOutputDatasetFacet"


def openlineage(facts: Facts) -> bytes:
    """In the order of what happened: rows became a dataset, the dataset a run, the run was judged and became a version."""
    events: list[tuple[str, int, Json]] = []
    for dataset in facts.datasets:
        sources = [_source(facts, source) for source in dataset.sources]
        found = {"tokenizer_digest": dataset.tokenizer_digest, "rejects": dataset.rejects, "kinds": dataset.kinds}
        made = [_dataset(facts, dataset) | _statistics(facts, dataset)]
        events += _pair(
            facts, "prepare", dataset.id, dataset.name, _before(dataset), dataset.created_at, sources, made, found
        )
    for training in facts.trainings:
        events += _training(facts, training)
    for report in facts.evals:
        inputs = [_named(facts, report.subject, report.subject_digest), *_of(facts, report.dataset)]
        record = {"scores": report.metrics, "split": report.split, "examples": report.num_examples}
        outputs = [_named(facts, report.id, report.items_sha256)]
        events += _pair(
            facts, "evaluate", report.id, report.split, _before(report), report.created_at, inputs, outputs, record
        )
    for version in facts.chain:
        step = "import" if version.status == "imported" else "release"
        names = [version.run, *version.evals] if version.run else []
        inputs = [_named(facts, name, "") for name in names if name]
        record = {"status": version.status, "reasons": list(version.reasons), "licence": version.licence}
        at = version.created_at
        events += _pair(facts, step, version.id, version.name, at, at, inputs, [_version(facts, version)], record)
    events.sort(key=lambda item: item[:2])
    return "".join(json.dumps(event, sort_keys=True, ensure_ascii=False) + "\n" for _, _, event in events).encode()


def _training(facts: Facts, training: RunFacts) -> list[tuple[str, int, Json]]:
    run = training.run
    record = {
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
    }
    inputs = [*_of(facts, run.dataset), _named(facts, run.base_model, run.base_digest)]
    outputs = [_named(facts, run.id, run.order_digest, [entry.model_dump() for entry in run.export])]
    began = training.started_at or run.created_at
    return _pair(facts, "train", run.id, run.name, began, run.created_at, inputs, outputs, record)


def _pair(
    facts: Facts,
    step: str,
    record: str,
    name: str,
    began: str,
    ended: str,
    inputs: list[Json],
    outputs: list[Json],
    said: Json,
) -> list[tuple[str, int, Json]]:
    """START and COMPLETE of one step; equal times keep that order."""
    facet = {"_producer": producer(facts), "_schemaURL": f"{SPEC}#/$defs/RunFacet"} | said
    job_type = {
        "_producer": producer(facts),
        "_schemaURL": f"{FACETS}/2-0-4/JobTypeJobFacet.json#/$defs/JobTypeJobFacet",
        "processingType": "BATCH",
        "integration": "FORGE_RAY",
        "jobType": step.upper(),
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
                "run": {"runId": str(uuid.uuid5(NAMESPACE, record)), "facets": {"forge_record": facet | {"id": record}}},
                "job": {"namespace": SPACE, "name": f"{step}.{name}", "facets": {"jobType": job_type}},
                "inputs": inputs,
                "outputs": outputs if kind == "COMPLETE" else [],
            },
        )
        for order, (kind, at) in enumerate((("START", began), ("COMPLETE", ended)))
    ]


def producer(facts: Facts) -> str:
    return f"urn:forge-ray:{facts.forge_version}"


def _before(record: DatasetManifest | EvalReport) -> str:
    """When the work on a record began: its end less the seconds on record."""
    ended = datetime.fromisoformat(record.created_at)
    return (ended - timedelta(seconds=record.seconds)).isoformat(timespec="milliseconds")


def _of(facts: Facts, identifier: str) -> list[Json]:
    known = next((dataset for dataset in facts.datasets if dataset.id == identifier), None)
    return [_dataset(facts, known) if known else _named(facts, identifier, "")]


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
    """A dataset in OpenLineage's sense: rows, weights or a report; its version is its id and digest."""
    value = digest.removeprefix("sha256:")
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
