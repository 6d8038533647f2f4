"""Records and events of one store: write through the audit log, read by id, walk.

The log holds the content of each record and event at its place; what a catalogue answers is the log as `standing.py` folds
it, and nothing else: there is no index that could say something different. Workers never open it. What decides on releases
and traffic is `release/promotion.py`.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TypeVar

from pydantic import ValidationError

from forge_ray.config.release import AliasRoute
from forge_ray.errors import NotFound, PolicyError, StoreError
from forge_ray.records import (
    RECORD_TYPES,
    DatasetManifest,
    Deployment,
    Event,
    ModelVersion,
    Record,
    RunRecord,
    canonical_json,
)
from forge_ray.store import audit_log, authority, paths, pins, signing
from forge_ray.store.files import Store
from forge_ray.store.placed import WITHDRAWN
from forge_ray.store.signatures import record_path, sign_record, signed_event
from forge_ray.store.standing import Standing

R = TypeVar("R", bound=Record)
OUT_OF_USE = ("archived", "erased")  # states in which nobody is answered by a version
TYPES = {record.prefix: record for record in RECORD_TYPES}


class Catalog:
    """Records and events of one store. Made by `open` or by `read_only`."""

    def __init__(self, store: Store, is_writable: bool) -> None:
        self.store, self.is_writable = store, is_writable
        self.standing = Standing(store)
        self._records: dict[str, Record] = {}
        self._unparsed: dict[str, str] = {}  # id → path
        self._parents: dict[str, tuple[str, ...]] = {}
        self.unreadable: dict[str, str] = {}  # id of a record that was passed over → why

    @classmethod
    def open(cls, store: Store) -> Catalog:
        """For commands that write. Writes at once, of the end of the audit log, the records and events that a killed writer
        left unwritten."""
        catalog = cls(store, is_writable=True)
        audit_log.redo(store)
        catalog.sync()
        return catalog

    @classmethod
    def read_only(cls, store: Store) -> Catalog:
        """For commands that read: the store as it is now, and nothing is written to it."""
        catalog = cls(store, is_writable=False)
        catalog.sync()
        return catalog

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held open; kept so that a catalogue can be used in a `with` statement."""

    def sync(self) -> None:
        """Take what other processes wrote since."""
        is_first = not self.standing.reader.number
        lines = self.standing.refresh()
        if is_first:
            pins.check(self.standing)
            self._take_older()
        if lines:
            pins.note(self.standing)
        for line in lines:
            if line.path.startswith(f"{paths.RECORDS}/") and self.standing.files.get(line.path) is line:
                self._unparsed[_stem(line.path)] = line.path

    def _take_older(self) -> None:
        """Records of a store from before its log."""
        if self.standing.is_older:
            for path in self.store.list(paths.RECORDS, recursive=True):
                if path not in self.standing.files and _stem(path) not in self._records:
                    self._unparsed[_stem(path)] = path

    def put(self, record: R) -> R:
        """Write `record` to the store, once; signed where this process has a key. The first of two equal ones stays. Raises
        `PolicyError` where the policy wants roles and the signer has none for it."""
        self._check_writable()
        path = record_path(record)
        audit_log.redo(self.store)
        self.sync()
        if self.has(record.id):
            if not self.store.exists(path) and (line := self.standing.files.get(path)):
                self.store.write(path, canonical_json(line.body()))
            return self.get_as(type(record), record.id)
        what, head = record.kind, ""
        if isinstance(record, ModelVersion):
            what = "imported models" if record.status == "imported" else what
        if isinstance(record, ModelVersion | Deployment):
            head = audit_log.head(self.store)
        record = record.model_copy(update={"log_head": head} if head else {})
        self.check_may(what)
        content = canonical_json(record.model_dump(mode="json"))
        if self.store.exists(path):  # a file without a line is nobody's
            self.store.delete(path)
        audit_log.publish(self.store, path, content, f"{record.kind}.put", record.id)
        if key := signing.private_key():
            sign_record(self.store, record, content, key)
        self.sync()
        return self.get_as(type(record), record.id)

    def append(self, event: Event) -> Event:
        """Write `event` behind all others. Raises `PolicyError` where this process may not."""
        self._check_writable()
        self.check_may(f"{event.kind} events")
        event = write_event(self.store, event)
        self.sync()
        return event

    def authority(self) -> authority.Authority:
        """Signers and policy as they are now."""
        return self.standing.authority

    def check_may(self, *actions: str) -> None:
        """Raise `PolicyError` unless the signer of this process may write all of `actions` (`authority.MAY`)."""
        if self.standing.needs_upgrade and actions != ("upgrade events",):
            raise PolicyError(
                f"{self.store.place} has signers from before the log decided on the order of events",
                hint="an owner runs `forge catalog upgrade` once; it shows what it signs",
            )
        key = signing.private_key()
        authority.check_may(self.authority(), signing.key_id(key.public_key()) if key else "", *actions)

    def _check_writable(self) -> None:
        if not self.is_writable:
            raise StoreError(
                f"the catalogue of {self.store.place} was opened for reading",
                hint="this is a bug: what writes opens it with `Catalog.open`",
            )

    def get(self, record_id: str) -> Record:
        if record_id in self._unparsed:
            record = self._parsed(self._unparsed[record_id])
            self._records[record_id] = record
            del self._unparsed[record_id]
        if record_id not in self._records:
            raise NotFound(f"no record {record_id!r} in {self.store.place}", hint="`forge models list`, `forge data list`")
        return self._records[record_id]

    def _parsed(self, path: str) -> Record:
        """The record that the log holds for `path`, or, from before the log, the file. Its id follows from its content."""
        line = self.standing.files.get(path)
        content = line.body() if line else self.store.read_json(path)
        identifier = _stem(path)
        try:
            record = TYPES[identifier.split("_", 1)[0]].model_validate(content)
            is_right = record_path(record) == path and (isinstance(record, RunRecord) or record.sealed().id == record.id)
        except (ValidationError, LookupError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise StoreError(f"{path} holds no record: {reason}", hint="restore the store from a backup") from None
        if not is_right:
            raise StoreError(
                f"{path} is not the record of its id: its content gives another", hint="restore the store from a backup"
            )
        return record

    def get_as(self, record_type: type[R], record_id: str) -> R:
        record = self.get(record_id)
        if not isinstance(record, record_type):
            raise NotFound(f"{record_id} is one of {record.kind}, not of {record_type.kind}", hint="check the id")
        return record

    def has(self, record_id: str) -> bool:
        return record_id in self._records or record_id in self._unparsed

    def all(self, record_type: type[R]) -> list[R]:
        """Records of one kind, oldest first. One that cannot be read is left out, and `unreadable` has it."""
        prefix = f"{record_type.prefix}_"
        records = []
        for identifier in [one for one in (*self._records, *self._unparsed) if one.startswith(prefix)]:
            try:
                records.append(self.get_as(record_type, identifier))
            except StoreError as error:
                self.unreadable[identifier] = error.message
        return sorted(records, key=lambda record: (record.created_at, record.id))

    def datasets(self) -> list[DatasetManifest]:
        """Dataset versions whose rows are in the store: those of others were erased, and their records tell of what was."""
        return [manifest for manifest in self.all(DatasetManifest) if self.store.exists(paths.dataset(manifest.id))]

    def events(self, kind: str, subject: str) -> list[Event]:
        """The events of a subject that count, in the order of the log."""
        return self.standing.events(kind, subject)

    def subjects(self, kind: str) -> list[str]:
        """Everything that has an event of this kind, by its first one."""
        return self.standing.subjects(kind)

    def last(self, kind: str) -> dict[str, Event]:
        """subject → its last event of this kind."""
        return self.standing.last(kind)

    def aliases(self) -> dict[str, str]:
        """alias → (stable) model version, after the last move of each; without those that are archived."""
        return {name: route.stable for name, route in self.routes().items()}

    def routes(self) -> dict[str, AliasRoute]:
        """alias → what it stands for now."""
        return self.standing.routes()

    def archived(self) -> set[str]:
        """Model versions that were taken out of use."""
        return {subject for subject, event in self.last("model").items() if event.data["state"] in OUT_OF_USE}

    def withdrawn(self) -> dict[str, str]:
        """Model versions that learned from erased rows → the erasure; no alias may be pointed at one, served or not."""
        return {
            version: event.data["erasure"]
            for version in self.subjects("model")
            for event in self.events("model", version)
            if event.data["state"] in WITHDRAWN
        }

    def model(self, reference: str) -> ModelVersion:
        """A model version by id or alias."""
        aliases = self.aliases()
        version = aliases.get(reference, reference)
        if not self.has(version):
            names = ", ".join(sorted(aliases)) or "none yet"
            raise NotFound(f"no model version or alias {reference!r} in {self.store.place}", hint=f"aliases: {names}")
        return self.get_as(ModelVersion, version)

    def parents(self, record_id: str) -> list[str]:
        return sorted(set(self._all_parents().get(record_id, ())))

    def children(self, record_id: str) -> list[str]:
        return sorted(child for child, parents in self._all_parents().items() if record_id in parents)

    def _all_parents(self) -> dict[str, tuple[str, ...]]:
        for record_type in RECORD_TYPES if self._unparsed or len(self._parents) < len(self._records) else ():
            self._parents |= {record.id: record.parents() for record in self.all(record_type)}
        return self._parents


def event_path(event: Event) -> str:
    """Where an event is stored: names begin with the time that it claims."""
    moment = event.at.partition("+")[0].replace(":", "")  # HDFS has no colons in names
    return paths.event(f"{moment}~{event.id}.json")


def write_event(store: Store, event: Event) -> Event:
    """Write `event`, signed where this process has a key, with its line in the audit log, which is its place."""
    while store.exists(event_path(event := signed_event(event))):  # the same change in the same millisecond
        later = datetime.fromisoformat(event.at) + timedelta(milliseconds=1)
        event = event.model_copy(update={"at": later.isoformat(timespec="milliseconds")})
    why = str(event.data.get("why") or event.data.get("reason") or "")
    change = event.data.get("state") or event.data.get("action") or event.data.get("decision") or "set"
    audit_log.publish(store, event_path(event), event.stored(), f"{event.kind}.{change}", event.subject, why)
    return event


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".json")
