"""What was signed: records by envelopes beside them, events inside.

    signatures/<record id>/<key id>.json     a DSSE envelope around an in-toto statement of the record's sha256

A record names its files by sha256 and its parents by hashes, so one signature over a model version stands for its weights,
its run and its dataset.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from forge_ray.errors import PolicyError
from forge_ray.records import Event, Record
from forge_ray.store import paths, signing
from forge_ray.store.authority import Authority
from forge_ray.store.files import Store

PREDICATE = "urn:forge-ray:record:1"


def record_path(record: Record) -> str:
    return paths.record(record.kind, record.id)


def sign_record(store: Store, record: Record, content: bytes, key: signing.PrivateKey) -> str:
    """Sign the stored bytes of a record; returns the envelope's path. Signing again with the same key writes nothing new."""
    path = paths.signatures(record.id, f"{signing.key_id(key.public_key())}.json")
    if not store.exists(path):
        subject = {record_path(record): hashlib.sha256(content).hexdigest()}
        predicate = {"id": record.id, "kind": record.kind, "who": signing.who()}
        envelope = signing.signed_statement(subject, PREDICATE, predicate, key)
        store.write(path, json.dumps(envelope, indent=1).encode())
    return path


def signers_of(store: Store, record_id: str) -> list[str]:
    """Key ids whose envelopes lie beside a record, checked or not."""
    return [path.rsplit("/", 1)[-1].removesuffix(".json") for path in store.list(paths.signatures(record_id))]


def valid_signers(store: Store, authority: Authority, record: Record) -> list[str]:
    """Key ids of signers whose envelope holds for the record as it is stored now. A retired signer's counts for records from
    before."""
    path = record_path(record)
    sha256 = hashlib.sha256(store.read(path)).hexdigest()
    valid = []
    for key, public in authority.keys.items():
        name = paths.signatures(record.id, f"{key}.json")
        retired = authority.signers[key].retired_at
        if not store.exists(name) or (retired and record.created_at >= retired):
            continue
        try:
            stated: dict[str, Any] = json.loads(signing.opened(store.read_json(name), [public]))
        except PolicyError:
            continue
        if stated["subject"] == [{"name": path, "digest": {"sha256": sha256}}]:
            valid.append(key)
    return valid


def require_signed(store: Store, authority: Authority, record: Record) -> None:
    if valid_signers(store, authority, record):
        return
    there = [authority.name_of(key) for key in signers_of(store, record.id)]
    could = " or ".join(signer.name for signer in authority.active("trainer", "validator")) or "a signer"
    raise PolicyError(
        f"policy.signatures: no valid signature of a signer is on {record.id}"
        + (f" (there is one of {', '.join(there)}, which does not hold)" if there else ""),
        hint=f"`forge sign {record.id}` by {could}",
    )


def signed_event(event: Event) -> Event:
    """The event with its signature, where this process has a key."""
    key = signing.private_key()
    if key is None:
        return event
    event = event.model_copy(update={"key": signing.key_id(key.public_key())})
    return event.model_copy(update={"signature": base64.b64encode(signing.sign(event.to_sign(), key)).decode()})
