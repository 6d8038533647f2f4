"""The certificate of an erasure: the request and what was done, verifiable with the signer's public key."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from forge_ray.errors import ConfigError
from forge_ray.governance.erasure.plan import ErasurePlan
from forge_ray.progress import stage
from forge_ray.records import DatasetManifest, Erasure, ModelVersion, canonical_json, hex_of
from forge_ray.store import paths, signing
from forge_ray.store.catalog import Catalog

PREDICATE = "urn:forge-ray:erasure:1"
Facts = dict[str, Any]


def certify(catalog: Catalog, record: Erasure, plan: ErasurePlan, facts: Facts, options: Facts) -> Facts:
    """Write the certificate, an in-toto statement of the request and its result; signed where FORGE_SIGNER names a key."""
    store = catalog.store
    with stage("certify") as it:
        datasets = []
        outside: dict[str, list[int]] = {name: list(lines) for name, lines in plan.outside.items()}
        for old, new in facts["rebuilt"]["datasets"].items():
            rows = {}
            for name, identifier in (("old", old), ("new", new)):
                if identifier:
                    manifest = catalog.get_as(DatasetManifest, identifier)
                    rows[name] = {split: stats.rows_digest for split, stats in manifest.splits.items()}
                    for file, lines in manifest.erased.items():
                        outside[file] = sorted({*outside.get(file, []), *lines})
            datasets.append({"old": old, "new": new, "rows": rows})
        rebuilt = {one["old"] for one in datasets}
        datasets += [{"old": one.id, "new": "", "rows": {}} for one in plan.datasets if one.id not in rebuilt]
        replaced = facts["retrained"]["versions"]
        versions = [
            {
                "version": version.id,
                "weights": catalog.get_as(ModelVersion, version.id).files_digest,
                "replaced_by": replaced.get(version.id, ""),
                "kept": version.id in facts["purged"]["weights_left"],
            }
            for version in plan.versions
        ]
        tombstones = hashlib.sha256(store.read(paths.erasure(f"{record.id}.json"))).hexdigest()
        purged = hashlib.sha256(store.read(facts["purged"]["list"])).hexdigest()
        subjects = {paths.erasure(f"{record.id}.json"): tombstones, facts["purged"]["list"]: purged}
        for run in facts["retrained"]["runs"]:
            if "weights" in run:
                subjects[run.get("version", run["new_run"])] = hex_of(run["weights"])
        predicate = {
            "erasure": record.id,
            "asked": {"by": record.asked_by, "hmac": record.asked, "records": record.num_records, "at": record.created_at},
            "near_duplicates": plan.num_near_duplicates if record.near_duplicates else None,
            "why": record.why,
            "who": {"asked": record.by, "finished": signing.who()},
            "options": options,
            "datasets": datasets,
            "runs": facts["retrained"]["runs"],
            "versions": versions,
            "aliases": facts["moved"]["aliases"],
            "waiting": facts["moved"].get("waiting", {}),
            "deployments": [deployment.model_dump(mode="json") for deployment in plan.deployments],
            "purged": {name: facts["purged"][name] for name in ("files", "bytes", "digest", "list")},
            "remains": {
                "source files": outside,
                "weights": facts["purged"]["weights_left"],
                "not reached": "backups and snapshots of the store, copies that were exported or downloaded",
            },
        }
        statement = canonical_json(signing.statement(subjects, PREDICATE, predicate))
        key = signing.private_key()
        if key:
            envelope = signing.envelope(statement, signing.IN_TOTO, key)
        else:
            payload = base64.b64encode(statement).decode()
            envelope = {"payloadType": signing.IN_TOTO, "payload": payload, "signatures": []}
        path = path_of(record.id)
        store.write(path, json.dumps(envelope, indent=1).encode())
        it.done(
            f"{path}  {'signed by ' + signing.key_id(key.public_key()) if key else 'not signed: FORGE_SIGNER is not set'}"
        )
    return {"certificate": hashlib.sha256(store.read(path)).hexdigest()}


def path_of(erasure: str) -> str:
    return paths.erasure(erasure, "certificate.json")


def statement_of(envelope: Facts) -> Facts:
    """The statement of a certificate. Its signature is not checked here; `forge verify` does that."""
    statement: Facts = json.loads(base64.b64decode(envelope["payload"]))
    if statement["predicateType"] != PREDICATE:
        raise ConfigError(
            f"this is a statement of {statement['predicateType']}, not of an erasure", hint="give certificate.json"
        )
    return statement
