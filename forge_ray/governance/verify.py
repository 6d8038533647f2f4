"""Verify digests and signatures of records, folders and certificates, offline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forge_ray.data.build import kept_tombstones
from forge_ray.errors import ConfigError, ForgeError, NotFound, PolicyError, StoreError
from forge_ray.evaluate.items import read_items, verify_sources
from forge_ray.records import DatasetManifest, Deployment, EvalReport, ModelVersion, Record, RunRecord, files_digest
from forge_ray.store import log_check, paths, pins, signing
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import MANIFEST, Store, hash_dir, verify_files
from forge_ray.store.removed import why_absent
from forge_ray.store.signatures import envelope_holds, record_path, signers_of, valid_signers
from forge_ray.store.standing import Standing


@dataclass(frozen=True)
class Checked:
    """The result of checking one record. `signed_by`: names of signers whose signature is valid."""

    id: str
    what: str
    signed_by: tuple[str, ...] = ()
    problem: str = ""


def check_files(store: Store, record: Record) -> str:
    """Compare a record's files with the digests in it, and say what was compared. Raises `StoreError` at the first
    difference."""
    if isinstance(record, ModelVersion):
        verify_files(store.fetch_dir(paths.model(record.id), verify=False, files=record.files), record.files)
        if files_digest(record.files) != record.files_digest:
            raise PolicyError(f"{record.id}: files_digest does not match its files", hint="the record was changed")
        return f"{len(record.files)} files"
    if isinstance(record, RunRecord):
        verify_files(store.fetch_dir(paths.export(record.id), verify=False, files=record.export), record.export)
        return f"{len(record.export)} files"
    if isinstance(record, DatasetManifest):
        verify_files(store.fetch_dir(paths.dataset(record.id), verify=False, files=record.files), record.files)
        return f"{len(record.files)} files"
    if isinstance(record, EvalReport):
        read_items(store, record)
        verify_sources(store, record)
        return "its items"
    return "the record"


def folder_of(record: Record) -> str:
    """The folder of a record's files."""
    match record:
        case ModelVersion():
            return paths.model(record.id)
        case RunRecord():
            return paths.export(record.id)
        case DatasetManifest():
            return paths.dataset(record.id)
    return paths.report(record.id)


def verify_record(catalog: Catalog, record_id: str, keys: Iterable[signing.PublicKey] = ()) -> list[Checked]:
    """Verify ids, files and signatures of a record and everything it was derived from. Problems are returned, not raised.
    `keys`: trusted instead of the store's signers, whose roles and places in the log are then not asked."""
    checked: list[Checked] = []
    seen: set[str] = set()
    waiting = [record_id]
    trusted = {signing.key_id(key): key for key in keys}
    while waiting:
        identifier = waiting.pop(0)
        if identifier in seen:
            continue
        seen.add(identifier)
        if not catalog.has(identifier):
            checked.append(Checked(identifier, "a parent", problem="its record is not in this store"))
            continue
        try:
            record = catalog.get(identifier)
        except StoreError as error:
            checked.append(Checked(identifier, "a record", problem=error.message))
            continue
        checked.append(_verify_one(catalog.standing, record, trusted))
        waiting += record.parents()
    return checked


def _verify_one(standing: Standing, record: Record, trusted: dict[str, signing.PublicKey]) -> Checked:
    store, authority, path = standing.store, standing.authority, record_path(record)
    names: tuple[str, ...] = ()
    try:
        content = store.read(path)
        stored = _parsed(type(record), content, path)
        if not isinstance(record, RunRecord) and stored.sealed().id != record.id:
            raise PolicyError("the record's content does not match its id: it was changed", hint="restore it from a backup")
        # a released version is never removed: its missing files are a problem, whatever an event says
        is_released = isinstance(stored, ModelVersion) and stored.status == "accepted"
        absent = "" if is_released else why_absent(standing, folder_of(stored))
        what = f"its files were {absent}" if absent else check_files(store, stored)
        sha256 = hashlib.sha256(content).hexdigest()
        keys = trusted or authority.keys
        beside = {
            key: envelope_holds(store, record, sha256, keys[key]) for key in signers_of(store, record.id) if key in keys
        }
        valid = [key for key, holds in beside.items() if holds] if trusted else valid_signers(standing, stored)
        names = tuple(authority.name_of(key) for key in valid)
        if broken := [key for key, holds in beside.items() if not holds]:
            raise PolicyError(f"the signature of {authority.name_of(broken[0])} is not valid", hint="the record was changed")
        line = standing.line_of(path)
        if line and line.sha256 != sha256:
            raise PolicyError("the record is not what the audit log says: it was changed", hint="restore it from a backup")
        if authority.policy.signatures and not valid and record.kind != "deployments":
            raise PolicyError("policy.signatures: it is not signed", hint=f"forge sign {record.id}")
    except ForgeError as error:
        return Checked(record.id, record.kind, names, error.message)
    return Checked(record.id, f"{record.kind}: {what}", names)


def _parsed(record_type: type[Record], content: bytes, path: str) -> Record:
    try:
        return record_type.model_validate_json(content)
    except ValueError:
        raise StoreError(f"{path} holds no record", hint="restore it from a backup") from None


def trusted_keys(paths: Iterable[str]) -> list[signing.PublicKey]:
    keys = []
    for path in paths:
        if not Path(path).is_file():
            raise NotFound(f"--key {path!r} is not a file", hint="the public half, NAME.pub")
        keys.append(signing.load_public(Path(path).read_bytes()))
    return keys


def requiring(checked: list[Checked], keys: list[signing.PublicKey]) -> list[Checked]:
    """The same results, where the first record, which was asked for, has a problem unless one of `keys` signed it."""
    first = checked[0]
    if not keys or first.problem or first.signed_by:
        return checked
    names = ", ".join(signing.key_id(key) for key in keys)
    return [replace(first, problem=f"it is not signed by any of the keys that --key names ({names})"), *checked[1:]]


def verify_path(path: Path, keys: list[signing.PublicKey]) -> dict[str, Any]:
    """Verify a folder with a `model.sig` (OpenSSF), or a file with a DSSE envelope (a certificate, provenance, or a record's
    signature). Needs no store. Raises `PolicyError` if the signature is not valid."""
    if not keys:
        raise ConfigError("a path is verified with the public keys that you trust", hint="--key alice.pub")
    if path.is_dir():
        signature = path / signing.BUNDLE_FILE
        if not signature.is_file():
            raise PolicyError(
                f"{path} has no {signing.BUNDLE_FILE}", hint="`forge sign VERSION --openssf --out DIR` writes one"
            )
        files = tuple(entry for entry in hash_dir(path) if entry.path not in (signing.BUNDLE_FILE, MANIFEST))
        signing.check_bundle(_json(signature), files, keys)
        return {"path": str(path), "what": signing.BUNDLE_FILE, "files": len(files)}
    stated = json.loads(signing.opened(_json(path), keys))
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in stated["subject"]}
    return {"path": str(path), "what": stated["predicateType"], "subjects": subjects, "predicate": stated["predicate"]}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        raise PolicyError(
            f"{path} is not a signature: it is not JSON", hint="the file may have been changed or truncated"
        ) from None
    except FileNotFoundError:
        raise NotFound(f"no file {path}", hint="give a path, or an id or alias of the store") from None


def verify_log(store: Store, every_signature: bool, head: str = "") -> log_check.Verified:
    """Verify the audit log against its own chain, the files it covers, and every head that was noted: in model versions and
    deployments, on this machine, and `head` if given."""
    anchors = {"this machine's note": noted} if (noted := pins.head_of(store)) else {}
    anchors |= {"--head": head} if head else {}
    try:
        catalog = Catalog.read_only(store)
    except (StoreError, PolicyError) as error:
        report = log_check.verify(store, None, anchors, every_signature)
        return report if report.problems else replace(report, problems=(error.message,))
    with catalog:
        records: list[ModelVersion | Deployment] = [*catalog.all(ModelVersion), *catalog.all(Deployment)]
        anchors |= {record.id: record.log_head for record in records if record.log_head}
        report = log_check.verify(store, catalog.authority(), anchors, every_signature)
        ignored = [f"line {line} has no effect: {reason}" for line, reason in catalog.standing.all_ignored().items()]
        # what the log does not tell of at all: erasures on record without tombstones
        erasures = [problem for problem in kept_tombstones.problems(store) if problem.startswith("the tombstones of")]
        problems = (*report.problems, *catalog.unreadable.values(), *erasures)
        return replace(report, ignored=tuple(ignored), problems=problems)
