"""`forge catalog upgrade`: an owner vouches, once, for what earlier versions accepted by rules that hold no more.

Earlier versions let approvals name an id instead of a digest, took API keys and archived versions without a signature,
looked at nothing but the weights of a route, and kept envelopes beside a record without a line in the log. What of that
still decides something is listed; the owner's signature on the list makes it count, where it stands in the log.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from forge_ray.errors import NotFound, PolicyError
from forge_ray.records import Event, hex_of
from forge_ray.records import digest as digest_of_value
from forge_ray.store import audit_log, paths, signing
from forge_ray.store.catalog import Catalog
from forge_ray.store.log_reader import FORMAT

VOUCHED = ("alias", "model", "key", "approval")


@dataclass(frozen=True)
class Vouched:
    """One event or envelope that the upgrade lists. `line` 0: an envelope, which has no line yet."""

    line: int
    what: str
    subject: str
    by: str
    reason: str
    digest: str
    path: str


def plan(catalog: Catalog) -> list[Vouched]:
    """What an upgrade would list; empty where the store needs none."""
    standing = catalog.standing
    if not standing.needs_upgrade:
        return []
    ignored, authority = standing.all_ignored(), catalog.authority()
    vouched = []
    for source in standing.sources(*VOUCHED):
        kind = source.action.partition(".")[0]
        reason = ignored.get(source.number, "")
        body = source.body()
        if kind == "approval" and not reason and isinstance(body, dict) and not body.get("data", {}).get("digest"):
            reason = "it names the id of a record, not its digest"
        if reason and source.format < FORMAT and body is not None:
            by = authority.name_of(source.key)
            vouched.append(Vouched(source.number, source.action, source.subject, by, reason, source.sha256, source.path))
    return sorted(vouched, key=lambda one: one.line) + _envelopes(catalog)


def _envelopes(catalog: Catalog) -> list[Vouched]:
    """Envelopes without a line, of others than those who wrote the record."""
    envelopes = []
    for path in catalog.store.list(paths.SIGNATURES, recursive=True):
        record, _, name = path.removeprefix(f"{paths.SIGNATURES}/").partition("/")
        key = name.removesuffix(".json")
        if path in catalog.standing.files or not catalog.has(record) or key not in catalog.authority().signers:
            continue
        line = next((line for line in catalog.standing.files.values() if line.subject == record), None)
        if line is None or line.key != key:
            digest = hex_of(digest_of_value(catalog.store.read_json(path)))
            by = catalog.authority().name_of(key)
            envelopes.append(Vouched(0, "signature", record, by, "it has no line in the log", digest, path))
    return envelopes


def apply(catalog: Catalog, listed: list[Vouched], without: Collection[int], why: str) -> Event:
    """Sign the list, less the lines in `without`."""
    key = signing.private_key()
    owners = {signer.id for signer in catalog.authority().active("owner")}
    if key is None or signing.key_id(key.public_key()) not in owners:
        raise PolicyError(
            "an upgrade is signed by an owner", hint=f"set {signing.SIGNER} to the key of an owner (`forge signers list`)"
        )
    if unknown := sorted(set(without) - {one.line for one in listed if one.line}):
        raise NotFound(f"--without {unknown[0]}: no such line is listed", hint="`forge catalog upgrade` lists the lines")
    kept = [one for one in listed if not one.line or one.line not in without]
    for one in kept:
        if not one.line:
            audit_log.enter(catalog.store, one.path, "signature.added", one.subject)
    return catalog.append(Event(kind="upgrade", subject="store", data={"events": [one.digest for one in kept], "why": why}))
