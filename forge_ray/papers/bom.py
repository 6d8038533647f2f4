"""A bill of materials as CycloneDX 1.6 JSON, with a model card in it. ecma-international.org, ECMA-424."""

from __future__ import annotations

import json
import uuid
from typing import Any

from forge_ray.evaluate.items import split_of
from forge_ray.papers.facts import NOT_RECORDED, Facts, Package, sha256_of, spdx
from forge_ray.records import DatasetManifest, FileEntry, ModelVersion, hex_of

Json = dict[str, Any]
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:forge-ray")


def bom(facts: Facts) -> bytes:
    version = facts.version
    code = hex_of(facts.training.run.code_digest) if facts.training else ""
    forge: Json = {"type": "application", "bom-ref": "forge-ray", "name": "forge-ray"}
    if code:
        forge |= {"description": "the code that trained", "hashes": [_sha256(code)]}
    if facts.training and facts.training.run.code_commit:
        forge["version"] = facts.training.run.code_commit
    packages = [_package(package) for package in facts.packages]
    runs = {training.run.id: training.run for training in facts.trainings}
    initial = {each.id: runs[each.run].initial_adapter for each in facts.chain if each.run in runs}
    components = [
        *(_model(each, initial.get(each.id, "")) for each in facts.chain[1:]),
        *(_model(each, "") for each in facts.frozen if each not in facts.chain),
        *(_dataset(dataset) for dataset in facts.datasets),
        *([forge] if facts.training else []),
        *packages,
    ]
    value = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, version.id)}",
        "version": 1,
        "metadata": {
            "timestamp": facts.at,
            "tools": {"components": [{"type": "application", "name": "forge-ray", "version": facts.forge_version}]},
            "component": _model(version, initial.get(version.id, "")) | {"modelCard": _model_card(facts)},
        },
        "components": components,
        "dependencies": _dependencies(facts, [package["bom-ref"] for package in packages]),
        # Python packages only: the packages of the operating system are not on record
        "compositions": [{"aggregate": "incomplete", "assemblies": [version.id]}],
    }
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _model(version: ModelVersion, initial_adapter: str) -> Json:
    """A version; `initial_adapter` is the one whose adapter it was trained on from, "" where it began with a new one."""
    value: Json = {
        "type": "machine-learning-model",
        "bom-ref": version.id,
        "name": version.name,
        "version": version.id,
        "licenses": _licences(version.licence),
        "components": [_file(version.id, entry) for entry in version.files],
        "properties": _properties(
            {
                "forge:status": version.status,
                "forge:weights": version.weights,
                "forge:files_digest": version.files_digest,
                "forge:run": version.run,
                "forge:source": version.source,
                "forge:created_at": version.created_at,
                **{f"forge:reason:{number}": reason for number, reason in enumerate(version.reasons, start=1)},
            }
        ),
    }
    ancestors = [name for name in (version.base_model, initial_adapter) if name]
    if ancestors:
        value["pedigree"] = {
            "ancestors": [{"type": "machine-learning-model", "name": name, "version": name} for name in ancestors]
        }
    return value


def _dataset(dataset: DatasetManifest) -> Json:
    counts = {f"forge:records:{name}": str(split.num_records) for name, split in dataset.splits.items()}
    counts |= {f"forge:rows_digest:{name}": split.rows_digest for name, split in dataset.splits.items()}
    tags = [tag for source in dataset.mixture for tag in source.licences if tag]
    value: Json = {
        "type": "data",
        "bom-ref": dataset.id,
        "name": dataset.name,
        "version": dataset.id,
        "hashes": [_sha256(sha256_of(dataset))],
        "data": [
            {
                "type": "dataset",
                "name": dataset.name,
                "contents": {"properties": _properties(counts)},
                "sensitiveData": [
                    f"{step.rule}: {kind} {count} times, {step.changed} records masked, {step.before - step.after} dropped"
                    for step in dataset.curation
                    if step.rule in ("secrets", "personal_data")
                    for kind, count in step.found.items()
                ],
            }
        ],
        "components": [
            {
                "type": "file",
                "bom-ref": f"{dataset.id}/source/{number}/{source.sha256}",
                "name": source.path,
                "hashes": [_sha256(source.sha256)],
            }
            for number, source in enumerate(dataset.sources)
        ],
    }
    if tags:
        value["licenses"] = [{"license": _named(tag)} for tag in dict.fromkeys(tags)]
    return value


def _model_card(facts: Facts) -> Json:
    kinds = facts.architecture.get("architectures") or []
    parameters: Json = {"task": "text generation"}
    if facts.training:
        kind = {"sft": "supervised"}.get(facts.training.run.method)
        parameters |= {"approach": {"type": kind}} if kind else {}
    if family := facts.architecture.get("model_type"):
        parameters["architectureFamily"] = str(family)
    if kinds:
        parameters["modelArchitecture"] = str(kinds[0])
    parameters["datasets"] = [{"ref": dataset.id} for dataset in facts.datasets]
    parameters["inputs"] = parameters["outputs"] = [{"format": "text"}]
    metrics = [
        {"type": name, "value": f"{value:.10g}", "slice": f"{split} of {dataset}; {report.id}"}
        for report in facts.own_evals
        for name, value in report.metrics.items()
        for dataset, split in [split_of(report, name)]
    ]
    metrics += [
        {"type": name, "value": f"{value:.10g}", "slice": f"{kind} {of}; {report.split} of {report.dataset}; {report.id}"}
        for report in facts.own_evals
        for kind, groups in ({"class": report.per_class} | report.per_slice).items()
        for of, scores in groups.items()
        for name, value in scores.items()
    ]
    compute = {
        "forge:training_flops_estimate": None if facts.flops is None else f"{facts.flops:.6g}",
        "forge:worker_hours": None if facts.worker_hours is None else f"{facts.worker_hours:.6g}",
        "forge:energy_kwh_from_stated_power": None if facts.energy_kwh is None else f"{facts.energy_kwh:.6g}",
        "forge:share_of_base_training_compute": None if facts.share is None else f"{facts.share:.6g}",
        "forge:considerations": None,  # users, use cases and limits are in no record
    }
    card: Json = {"modelParameters": parameters}
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    card["properties"] = [{"name": name, "value": value or NOT_RECORDED} for name, value in compute.items()]
    return card


def _dependencies(facts: Facts, packages: list[str]) -> list[Json]:
    """What each component was derived from."""
    present = {record.id for record in facts.records}
    rows: dict[str, list[str]] = {}
    runs = {training.run.id: training.run for training in facts.trainings}
    for version in facts.chain:
        run = runs.get(version.run)
        made_from = [version.base_model, *([run.initial_adapter, run.frozen_model] if run else [])]
        made_from.append(run.dataset if run else version.dataset)
        rows[version.id] = [name for name in made_from if name in present]
    for version in facts.frozen:
        rows.setdefault(version.id, [version.base_model] if version.base_model in present else [])
    if facts.training:
        rows[facts.version.id] += ["forge-ray", *packages]
    for dataset in facts.datasets:
        rows[dataset.id] = [dataset.base_model] if dataset.base_model in present else []  # its tokenizer
    return [{"ref": ref, "dependsOn": list(dict.fromkeys(names))} for ref, names in rows.items()]


def _package(package: Package) -> Json:
    name, version = package.name, package.version
    purl = f"pkg:generic/python@{version}" if name == "python" else f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
    value: Json = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    if package.licence:
        value["licenses"] = [{"expression": package.licence}]
    if package.record:
        value["properties"] = [{"name": "forge:sha256_of_RECORD", "value": package.record}]
    return value


def _file(owner: str, entry: FileEntry) -> Json:
    return {
        "type": "file",
        "bom-ref": f"{owner}/{entry.path}",
        "name": entry.path,
        "hashes": [_sha256(entry.sha256)],
        "properties": [{"name": "forge:size", "value": str(entry.size)}],
    }


def _licences(text: str) -> list[Json]:
    return [{"expression": spdx(text)}] if spdx(text) else [{"license": {"name": text}}]


def _named(tag: str) -> Json:
    expression = spdx(tag)
    return {"id": expression} if expression and " " not in expression and "LicenseRef" not in expression else {"name": tag}


def _sha256(value: str) -> Json:
    return {"alg": "SHA-256", "content": value}


def _properties(values: dict[str, str]) -> list[Json]:
    return [{"name": name, "value": value} for name, value in values.items() if value]
