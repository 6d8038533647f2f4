"""What was signed: records by envelopes beside them, events inside.

    signatures/<record id>/<key id>.json     a DSSE envelope around an in-toto statement of the record's sha256

A record names its files by sha256 and its parents by hashes, so one signature over a model version stands for its weights,
its run and its dataset.
"""

from __future__ import annotations

import base64
import hashlib
import json

from forge_ray.errors import ForgeError, PolicyError
from forge_ray.records import Event, ModelVersion, Record, canonical_json
from forge_ray.store import audit_log, paths, signing
from forge_ray.store.authority import MAY, Role
from forge_ray.store.files import Store
from forge_ray.store.standing import Standing

PREDICATE = "urn:forge-ray:record:1"


def record_path(record: Record) -> str:
    return paths.record(record.kind, record.id)


def sign_record(store: Store, record: Record, content: bytes, key: signing.PrivateKey) -> str:
    """Sign the stored bytes of a record; returns the envelope's path. Signing again with the same key writes nothing new."""
    path = paths.signatures(record.id, f"{signing.key_id(key.public_key())}.json")
    if not store.exists(path):
        store.write(path, _envelope(record, content, key))
    return path


def add_signature(store: Store, record: Record, content: bytes, key: signing.PrivateKey) -> str:
    """The same for a record that somebody else wrote: the envelope has its line in the log, for when it was signed
    counts."""
    path = paths.signatures(record.id, f"{signing.key_id(key.public_key())}.json")
    audit_log.publish(store, path, _envelope(record, content, key), "signature.added", record.id)
    return path


def _envelope(record: Record, content: bytes, key: signing.PrivateKey) -> bytes:
    subject = {record_path(record): hashlib.sha256(content).hexdigest()}
    predicate = {"id": record.id, "kind": record.kind, "who": signing.who()}
    return canonical_json(signing.signed_statement(subject, PREDICATE, predicate, key))


def signers_of(store: Store, record_id: str) -> list[str]:
    """Key ids whose envelopes lie beside a record, checked or not."""
    return [path.rsplit("/", 1)[-1].removesuffix(".json") for path in store.list(paths.signatures(record_id))]


def envelope_holds(store: Store, record: Record, sha256: str, key: signing.PublicKey) -> bool:
    """Whether the envelope of this key beside a record is signed by it, over a record of this digest."""
    try:
        stated = json.loads(
            signing.opened(store.read_json(paths.signatures(record.id, f"{signing.key_id(key)}.json")), [key])
        )
        return bool(stated["subject"] == [{"name": record_path(record), "digest": {"sha256": sha256}}])
    except (ForgeError, ValueError, LookupError, TypeError):
        return False


def roles_for(record: Record) -> tuple[Role, ...]:
    """The roles that may sign such a record."""
    return MAY["imported models" if isinstance(record, ModelVersion) and record.status == "imported" else record.kind]


def valid_signers(standing: Standing, record: Record) -> list[str]:
    """Key ids of signers whose signature on the record counts: by a role that may write it, at a line where the key
    could."""
    return standing.record_signers(record.kind, record.id, *roles_for(record))


def require_signed(standing: Standing, record: Record) -> None:
    if valid_signers(standing, record):
        return
    authority, roles = standing.authority, roles_for(record)
    there = [authority.name_of(key) for key in signers_of(standing.store, record.id)]
    could = " or ".join(signer.name for signer in authority.active(*roles)) or "a signer"
    raise PolicyError(
        f"policy.signatures: no valid signature of a signer who may write {record.kind} is on {record.id}"
        + (f" (there is one of {', '.join(there)}, which does not count)" if there else ""),
        hint=f"`forge sign {record.id}` by {could}",
    )


def signed_event(event: Event) -> Event:
    """The event with its signature, where this process has a key."""
    key = signing.private_key()
    if key is None:
        return event
    event = event.model_copy(update={"key": signing.key_id(key.public_key())})
    return event.model_copy(update={"signature": base64.b64encode(signing.sign(event.to_sign(), key)).decode()})
