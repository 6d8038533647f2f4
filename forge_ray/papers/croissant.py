"""A dataset as Croissant 1.1, with its responsible-AI and provenance fields. docs.mlcommons.org/croissant."""

from __future__ import annotations

import json
from typing import Any

from forge_ray.evaluate.items import splits_of
from forge_ray.papers.facts import NOT_RECORDED, Facts, sha256_of, spdx
from forge_ray.records import DatasetManifest

Json = dict[str, Any]
CONTEXT: Json = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "prov": "http://www.w3.org/ns/prov#",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
FIELDS = (  # of a record, as `data/dataset/version.py` writes it
    ("record", "sc:Text", "id of the record: a hash of its content"),
    ("kind", "sc:Text", "chat, text, preference or feedback"),
    ("file", "sc:Text", "source file that the record was read from"),
    ("line", "sc:Integer", "its line, from 1"),
    ("offset", "sc:Integer", "its first byte"),
    ("content", "sc:Text", "the record as JSON"),
)
SENSITIVE = ("secrets", "personal_data")


def croissant(facts: Facts, dataset: DatasetManifest) -> bytes:
    splits = [name for name in dataset.splits if any(_is_record(entry.path, name) for entry in dataset.files)]
    licences = {tag: spdx(tag) or tag for source in dataset.mixture for tag in source.licences if tag}
    total = sum(split.num_records for split in dataset.splits.values())
    value: Json = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "@id": dataset.id,
        "conformsTo": ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": dataset.name,
        "identifier": dataset.id,
        "description": f"{total:,} records for language models, packed for {dataset.base_model}; {_counts(dataset)}.",
        "version": f"1.0.0+{dataset.id.removeprefix('ds_')}",
        "license": list(licences.values()) or NOT_RECORDED,
        "url": f"urn:forge-ray:{dataset.id}",
        "creator": {"@type": "sc:Organization", "name": NOT_RECORDED},
        "datePublished": dataset.created_at,
        "dateCreated": dataset.created_at,
        "sha256": sha256_of(dataset),
        "prov:wasDerivedFrom": [
            {
                "@id": f"urn:sha256:{source.sha256}",
                "@type": "prov:Entity",
                "name": source.path,
                "contentSize": f"{source.size} B",
                "description": f"records used: {source.num_records}, rejected: {source.num_rejected},"
                f" dropped: {source.num_dropped}",
            }
            for source in dataset.sources
        ],
        "prov:wasGeneratedBy": _activities(facts, dataset),
        "rai:dataCollection": NOT_RECORDED,
        "rai:dataPreprocessingProtocol": _preprocessing(dataset),
        "rai:personalSensitiveInformation": _sensitive(dataset),
        "rai:dataLimitations": NOT_RECORDED,
        "rai:dataBiases": NOT_RECORDED,
        "rai:dataUseCases": _uses(facts, dataset),
        "distribution": [
            *(
                {
                    "@type": "cr:FileObject",
                    "@id": entry.path,
                    "name": entry.path,
                    "contentUrl": entry.path,
                    "contentSize": f"{entry.size} B",
                    "encodingFormat": "application/x-parquet",
                    "sha256": entry.sha256,
                }
                for entry in dataset.files
                if entry.path.endswith(".parquet")
            ),
            *(
                {
                    "@type": "cr:FileSet",
                    "@id": f"{split}-records",
                    "name": f"{split}-records",
                    "encodingFormat": "application/x-parquet",
                    "includes": f"records/{split}/*.parquet",
                }
                for split in splits
            ),
        ],
        "recordSet": [_record_set(split, dataset.splits[split].num_records) for split in splits],
    }
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _is_record(path: str, split: str) -> bool:
    return path.startswith(f"records/{split}/")


def _counts(dataset: DatasetManifest) -> str:
    return ", ".join(f"{name} {split.num_records:,}" for name, split in dataset.splits.items())


def _record_set(split: str, count: int) -> Json:
    return {
        "@type": "cr:RecordSet",
        "@id": split,
        "name": split,
        "description": f"{count:,} records",
        "key": {"@id": f"{split}/record"},
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{split}/{name}",
                "name": name,
                "description": description,
                "dataType": kind,
                "source": {"fileSet": {"@id": f"{split}-records"}, "extract": {"column": name}},
            }
            for name, kind, description in FIELDS
        ],
    }


def _preprocessing(dataset: DatasetManifest) -> list[str]:
    rejected = ", ".join(f"{reason} {count}" for reason, count in dataset.rejects.items()) or "none"
    steps = [f"rows that are no record were put into quarantine: {rejected}", f"exact duplicates: {dataset.num_duplicates}"]
    for step in dataset.curation:
        reasons = ", ".join(f"{reason} {count}" for reason, count in step.reasons.items())
        dropped = f" (dropped for: {reasons})" if reasons else ""
        steps.append(f"rule {step.rule}: {step.before} records before, {step.after} after, {step.changed} masked{dropped}")
    return steps


def _sensitive(dataset: DatasetManifest) -> list[str]:
    looked = [step for step in dataset.curation if step.rule in SENSITIVE]
    findings = [
        f"{step.rule}: {', '.join(f'{kind} {count}' for kind, count in step.found.items()) or 'nothing found'};"
        f" {step.changed} records masked, {step.before - step.after} dropped"
        for step in looked
    ]
    return findings or [f"{NOT_RECORDED}: no rule looked for it"]


def _activities(facts: Facts, dataset: DatasetManifest) -> Json:
    return {
        "@type": "prov:Activity",
        "name": "forge data prepare",
        "prov:endedAtTime": dataset.created_at,
        "prov:used": {"@id": f"urn:forge-ray:{dataset.base_model}", "name": "tokenizer and template"},
        "description": f"settings of the dataset: see record {dataset.id}; tokenizer {dataset.tokenizer_digest}",
    }


def _uses(facts: Facts, dataset: DatasetManifest) -> list[str]:
    trained = [f"trained {t.run.id} (train split)" for t in facts.trainings if t.run.dataset == dataset.id]
    judged = [
        f"judged by {report.id} ({split} split)"
        for report in facts.evals
        for scored, split in splits_of(report)
        if scored == dataset.id
    ]
    return trained + judged
