"""The certificate of an erasure: the request and what was done, verifiable with the signer's public key."""

from __future__ import annotations

import base64
import hashlib
import json

from forge_ray.data.build.tombstones import files_of as tombstone_files
from forge_ray.errors import ConfigError
from forge_ray.governance.erasure.examine import SEARCHES
from forge_ray.governance.erasure.options import Done, Facts
from forge_ray.governance.erasure.outside import OutsidePlaces
from forge_ray.governance.erasure.plan import sent_of
from forge_ray.governance.erasure.purging import StoreCheck
from forge_ray.progress import stage
from forge_ray.records import DatasetManifest, Erasure, ModelVersion, canonical_json, hex_of
from forge_ray.store import paths, signing
from forge_ray.store.catalog import Catalog
from forge_ray.store.exports import exported

PREDICATE = "urn:forge-ray:erasure:1"
ANSWERS_REMOVED = "answers removed"  # the state of an event
NAMED = 100  # files that forge_ray did not write, by name
NOT_REACHED = (
    "backups and snapshots of the store; copies that were exported, downloaded or logged to other systems, an MLflow server"
    " among them; caches, scratch folders and spilled objects of other machines; blocks of deleted files on the disks"
)


def certify(
    catalog: Catalog,
    record: Erasure,
    done: Done,
    checked: StoreCheck,
    places: OutsidePlaces,
    unconfirmed: dict[str, str],
    options: Facts,
) -> Facts:
    """Write the certificate, an in-toto statement of the request and its result; signed where FORGE_SIGNER names a key.
    `unconfirmed`: what may still hold something, and why."""
    store = catalog.store
    with stage("certify") as it:
        datasets, outside = _datasets(catalog, done)
        tombstones = tombstone_files(store, record.id)
        lists = [purged["list"] for purged in done.purged]
        subjects = {path: hashlib.sha256(store.read(path)).hexdigest() for path in (*tombstones, *lists)}
        for run in done.runs:
            if "weights" in run:
                subjects[run.get("version", run["new_run"])] = hex_of(run["weights"])
        predicate = {
            "store": catalog.authority().genesis,
            "log head": catalog.standing.reader.head,
            "erasure": record.id,
            "asked": {"by": record.asked_by, "hmac": record.asked, "records": record.num_records, "at": record.created_at},
            "near_duplicates": done.plans[0].num_near_duplicates if record.near_duplicates else None,
            "why": record.why,
            "who": {"asked": record.by, "finished": signing.who()},
            "options": options,
            "datasets": datasets,
            "runs": done.runs,
            "versions": _versions(catalog, done),
            "aliases": done.aliases,
            "waiting": done.waiting,
            "deployments": [deployment.model_dump(mode="json") for plan in done.plans for deployment in plan.deployments],
            "purged": {
                "files": sum(purged["files"] for purged in done.purged),
                "bytes": sum(purged["bytes"] for purged in done.purged),
                "lists": {purged["list"]: purged["digest"] for purged in done.purged},
                "leftovers": list(checked.removed),
                "outside the store": places.removed,
                "kept answers": sum(
                    event.data["count"]
                    for event in catalog.events("erasure", record.id)
                    if event.data["state"] == ANSWERS_REMOVED
                ),
            },
            "searched": {
                "files": checked.examined.num_files,
                "bytes": checked.examined.num_bytes,
                "of files": len(checked.accounts.files),
            },
            "unconfirmed": unconfirmed,
            "remains": {
                "source files": outside,
                "weights": done.weights_left,
                "copies that left the store": _exported(catalog, done),
                "rows that were sent to other systems": _sent(catalog, done),
                "more names of deleted files outside the store": {
                    path: count for purged in done.purged for path, count in purged.get("names_elsewhere", {}).items()
                },
                "files that forge_ray did not write": _strangers(checked),
                "links that were not followed": checked.accounts.links,
                "imports that were running": list(checked.accounts.imports),
                "outside the store": places.left,
                "not reached": NOT_REACHED,
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


def _datasets(catalog: Catalog, done: Done) -> tuple[list[Facts], dict[str, list[int]]]:
    """Dataset versions, old and new, with the digests of their rows; and the lines of source files that hold the rows."""
    datasets: list[Facts] = []
    outside: dict[str, list[int]] = {name: list(lines) for plan in done.plans for name, lines in plan.outside.items()}
    for old, new in done.datasets.items():
        rows = {}
        for name, identifier in (("old", old), ("new", new)):
            if identifier:
                manifest = catalog.get_as(DatasetManifest, identifier)
                rows[name] = {split: stats.rows_digest for split, stats in manifest.splits.items()}
                for file, lines in manifest.erased.items():
                    outside[file] = sorted({*outside.get(file, []), *lines})
        datasets.append({"old": old, "new": new, "rows": rows})
    affected = {one.id for plan in done.plans for one in plan.datasets}
    return datasets + [{"old": one, "new": "", "rows": {}} for one in sorted(affected - done.datasets.keys())], outside


def _versions(catalog: Catalog, done: Done) -> list[Facts]:
    return [
        {
            "version": version.id,
            "weights": catalog.get_as(ModelVersion, version.id).files_digest,
            "replaced_by": done.replaced.get(version.id, ""),
            "kept": version.id in done.weights_left,
        }
        for plan in done.plans
        for version in plan.versions
    ]


def _exported(catalog: Catalog, done: Done) -> list[Facts]:
    """Copies of the versions that commands wrote out of the store, whether they are still there or not."""
    versions = {version.id for plan in done.plans for version in plan.versions}
    return [copy.model_dump(mode="json") for copy in exported(catalog, versions)]


def _sent(catalog: Catalog, done: Done) -> list[Facts]:
    """Rows of the splits that held the erased ones, which a comparison with another system sent there."""
    datasets = {one.id: one for plan in done.plans for one in plan.datasets}
    return [rows.model_dump(mode="json") for rows in sent_of(catalog, datasets.values())]


def _strangers(checked: StoreCheck) -> dict[str, str]:
    """Their first names, each with what was found in it."""
    holding, unreadable = checked.examined.holding, checked.examined.unreadable
    names = sorted(checked.accounts.strangers, key=lambda path: (path not in holding, path))
    strangers = {}
    for path in names[:NAMED]:
        can_search = path.endswith(tuple(SEARCHES)) and path not in unreadable
        strangers[path] = (
            f"{holding[path]} of the rows" if path in holding else "none of the rows" if can_search else "unknown"
        )
    if len(names) > NAMED:
        strangers["…"] = f"{len(names) - NAMED} more"
    return strangers


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
