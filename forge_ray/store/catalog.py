"""SQLite index over the store's records and events.

The store's files are the truth. The index holds nothing that `rebuild` cannot recreate; it lives beside a local store, or
in the user's cache for a remote one. Workers never open it. What decides on releases and traffic is `release/promotion.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from forge_ray.config.release import AliasRoute
from forge_ray.errors import NotFound, StoreError
from forge_ray.records import RECORD_TYPES, DatasetManifest, Event, ModelVersion, Record, canonical_json
from forge_ray.store import audit_log, authority, modes, paths, signing
from forge_ray.store.aliases import route_of
from forge_ray.store.files import Store
from forge_ray.store.signatures import record_path, sign_record, signed_event

R = TypeVar("R", bound=Record)
WITHDRAWN = ("withdrawn", "erased")  # states of a version that learned from erased rows: still there, and gone
OUT_OF_USE = ("archived", "erased")  # states in which nobody is answered by a version
TYPES = {record.prefix: record for record in RECORD_TYPES}

SCHEMA = """
create table if not exists records (id text primary key, kind text, created_at text, name text, body text);
create table if not exists edges (child text, parent text, primary key (child, parent));
create table if not exists events (id text primary key, at text, kind text, subject text, body text);
create index if not exists edges_parent on edges (parent);
create index if not exists events_subject on events (kind, subject, at);
"""


class Catalog:
    """Records and events of one store: write through, read by id, walk. Made by `open` or by `read_only`."""

    def __init__(self, store: Store, index: sqlite3.Connection, is_writable: bool) -> None:
        self.store, self.is_writable = store, is_writable
        self._db = index

    @classmethod
    def open(cls, store: Store) -> Catalog:
        """For commands that write. Writes at once: the index file, and, of the end of the audit log, the records and events
        that a killed writer left unwritten."""
        catalog = cls(store, _index_on_disk(store), is_writable=True)
        audit_log.redo(store)
        catalog.sync()
        return catalog

    @classmethod
    def read_only(cls, store: Store) -> Catalog:
        """For commands that read: the store as it is now, and nothing is written to it.

        The index file of a local store is copied into memory, where what it lacks is added. For a remote store the index in
        the user's cache is brought up to date, because reading every record over the network each time takes minutes."""
        catalog = cls(store, _index_to_read(store), is_writable=False)
        catalog.sync()
        return catalog

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def sync(self) -> None:
        """Index what other processes wrote to the store since; writes nothing but the index."""
        indexed = {row[0] for row in self._db.execute("select id from records union select id from events")}
        for path in self.store.list(paths.RECORDS, recursive=True):
            if _stem(path) not in indexed:
                self._index(_parse(self.store, path))
        for path in self.store.list(paths.EVENTS):
            if _stem(path).rsplit("~", 1)[-1] not in indexed:
                self._index_event(Event.model_validate(self.store.read_json(path)))
        self._db.commit()

    def rebuild(self) -> int:
        """Drop the index and read every record and event again; returns how many."""
        self._check_writable()
        self._db.executescript("delete from records; delete from edges; delete from events;")
        self.sync()
        (count,) = self._db.execute("select (select count(*) from records) + (select count(*) from events)").fetchone()
        return int(count)

    def put(self, record: R) -> R:
        """Write `record` to the store, once, and index it; signed where this process has a key. The first of two equal ones
        stays. Raises `PolicyError` where the policy wants roles and the signer has none for it."""
        self._check_writable()
        path = record_path(record)
        if self.store.exists(path):
            record = type(record).model_validate(self.store.read_json(path))
        else:
            what = record.kind
            if isinstance(record, ModelVersion):
                what = "imported models" if record.status == "imported" else what
                record = record.model_copy(update={"log_head": audit_log.head(self.store)})
            self.check_may(what)
            content = canonical_json(record.model_dump(mode="json"))
            audit_log.publish(self.store, path, content, f"{record.kind}.put", record.id)
            if key := signing.private_key():
                sign_record(self.store, record, content, key)
        self._index(record)
        self._db.commit()
        return record

    def append(self, event: Event) -> Event:
        """Write `event` behind all others of its subject, whatever this machine's clock says: the last move wins."""
        self._check_writable()
        self.check_may(f"{event.kind} events")
        query = "select max(at) from events where kind = ? and subject = ?"
        (last,) = self._db.execute(query, (event.kind, event.subject)).fetchone()
        event = write_event(self.store, event, last)
        self._index_event(event)
        self._db.commit()
        return event

    def authority(self) -> authority.Authority:
        """Signers and policy as they are now."""
        rows = self._db.execute("select body from events where kind in ('signer', 'policy') order by at, id")
        return authority.folded(Event.model_validate_json(row[0]) for row in rows)

    def check_may(self, *actions: str) -> None:
        """Raise `PolicyError` unless the signer of this process may write all of `actions` (`authority.MAY`)."""
        key = signing.private_key()
        authority.check_may(self.authority(), signing.key_id(key.public_key()) if key else "", *actions)

    def _check_writable(self) -> None:
        if not self.is_writable:
            raise StoreError(
                f"the catalogue of {self.store.place} was opened for reading",
                hint="this is a bug: what writes opens it with `Catalog.open`",
            )

    def _index(self, record: Record) -> None:
        row = (record.id, record.kind, record.created_at, getattr(record, "name", ""), record.model_dump_json())
        self._db.execute("insert or replace into records values (?, ?, ?, ?, ?)", row)
        self._db.executemany("insert or ignore into edges values (?, ?)", [(record.id, p) for p in record.parents()])

    def _index_event(self, event: Event) -> None:
        row = (event.id, event.at, event.kind, event.subject, event.model_dump_json())
        self._db.execute("insert or ignore into events values (?, ?, ?, ?, ?)", row)

    def get(self, record_id: str) -> Record:
        row = self._db.execute("select id, body from records where id = ?", (record_id,)).fetchone()
        if row is None:
            raise NotFound(f"no record {record_id!r} in {self.store.place}", hint="`forge models list`, `forge data list`")
        return TYPES[row[0].split("_", 1)[0]].model_validate_json(row[1])

    def get_as(self, record_type: type[R], record_id: str) -> R:
        record = self.get(record_id)
        if not isinstance(record, record_type):
            raise NotFound(f"{record_id} is one of {record.kind}, not of {record_type.kind}", hint="check the id")
        return record

    def has(self, record_id: str) -> bool:
        return self._db.execute("select 1 from records where id = ?", (record_id,)).fetchone() is not None

    def all(self, record_type: type[R]) -> list[R]:
        """Records of one kind, oldest first."""
        rows = self._db.execute("select body from records where kind = ? order by created_at, id", (record_type.kind,))
        return [record_type.model_validate_json(row[0]) for row in rows]

    def datasets(self) -> list[DatasetManifest]:
        """Dataset versions whose rows are in the store: those of others were erased, and their records tell of what was."""
        return [manifest for manifest in self.all(DatasetManifest) if self.store.exists(paths.dataset(manifest.id))]

    def events(self, kind: str, subject: str) -> list[Event]:
        rows = self._db.execute("select body from events where kind = ? and subject = ? order by at, id", (kind, subject))
        return [Event.model_validate_json(row[0]) for row in rows]

    def subjects(self, kind: str) -> list[str]:
        """Everything that has an event of this kind, by its first one."""
        rows = self._db.execute("select subject from events where kind = ? group by subject order by min(at)", (kind,))
        return [row[0] for row in rows]

    def last(self, kind: str) -> dict[str, Event]:
        """subject → its last event of this kind."""
        rows = self._db.execute("select body from events where kind = ? order by at, id", (kind,))
        return {event.subject: event for row in rows if (event := Event.model_validate_json(row[0]))}

    def aliases(self) -> dict[str, str]:
        """alias → (stable) model version, after the last move of each; without those that are archived."""
        return {name: route.stable for name, route in self.routes().items()}

    def routes(self) -> dict[str, AliasRoute]:
        """alias → what it stands for now. Where the policy wants signatures, moves that no releaser signed do not count."""
        last = {event.subject: event for event in authority.accepted_moves(self.authority(), self.moves())}
        routes = {alias: route_of(event) for alias, event in last.items()}
        return {alias: route for alias, route in routes.items() if route}

    def moves(self) -> list[Event]:
        """Every move of every alias, oldest first."""
        rows = self._db.execute("select body from events where kind = 'alias' order by at, id")
        return [Event.model_validate_json(row[0]) for row in rows]

    def archived(self) -> set[str]:
        """Model versions that were taken out of use."""
        return {subject for subject, event in self.last("model").items() if event.data["state"] in OUT_OF_USE}

    def withdrawn(self) -> dict[str, str]:
        """Model versions that learned from erased rows → the erasure; no alias may be pointed at one, served or not."""
        rows = self._db.execute("select body from events where kind = 'model' order by at, id")
        events = (Event.model_validate_json(row[0]) for row in rows)
        return {event.subject: event.data["erasure"] for event in events if event.data["state"] in WITHDRAWN}

    def model(self, reference: str) -> ModelVersion:
        """A model version by id or alias."""
        aliases = self.aliases()
        version = aliases.get(reference, reference)
        if not self.has(version):
            names = ", ".join(sorted(aliases)) or "none yet"
            raise NotFound(f"no model version or alias {reference!r} in {self.store.place}", hint=f"aliases: {names}")
        return self.get_as(ModelVersion, version)

    def parents(self, record_id: str) -> list[str]:
        return [row[0] for row in self._db.execute("select parent from edges where child = ? order by 1", (record_id,))]

    def children(self, record_id: str) -> list[str]:
        return [row[0] for row in self._db.execute("select child from edges where parent = ? order by 1", (record_id,))]


def event_path(event: Event) -> str:
    """Where an event is stored: names sort by time."""
    moment = event.at.partition("+")[0].replace(":", "")  # HDFS has no colons in names
    return paths.event(f"{moment}~{event.id}.json")


def write_event(store: Store, event: Event, last: str | None) -> Event:
    """Write `event` behind the moment `last`, signed where this process has a key, with its line in the audit log."""
    event = signed_event(following(event, last))
    why = str(event.data.get("why") or event.data.get("reason") or "")
    change = event.data.get("state") or event.data.get("action") or event.data.get("decision") or "set"
    audit_log.publish(store, event_path(event), event.stored(), f"{event.kind}.{change}", event.subject, why)
    return event


def following(event: Event, last: str | None) -> Event:
    """`event`, moved behind the moment `last` whatever this machine's clock says: the last move wins."""
    if last is None or event.at > last:
        return event
    later = datetime.fromisoformat(last) + timedelta(milliseconds=1)
    return event.model_copy(update={"at": later.isoformat(timespec="milliseconds")})


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".json")


def _parse(store: Store, path: str) -> Record:
    return TYPES[_stem(path).split("_", 1)[0]].model_validate(store.read_json(path))


def _index_path(store: Store) -> Path:
    if store.is_local:
        return Path(store.root) / paths.INDEX_FILE
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "forge_ray"
    return cache / f"catalog-{hashlib.sha256(store.uri.encode()).hexdigest()[:16]}.sqlite"


def _index_on_disk(store: Store) -> sqlite3.Connection:
    path = _index_path(store)
    if store.is_local:
        modes.make_root(Path(store.root))
    path.parent.mkdir(parents=True, exist_ok=True)
    return _with_schema(sqlite3.connect(path, timeout=30))


def _index_to_read(store: Store) -> sqlite3.Connection:
    if not store.is_local:
        with contextlib.suppress(OSError, sqlite3.OperationalError):  # a cache that cannot be written: memory does
            index = _index_on_disk(store)
            index.execute("begin immediate")
            index.rollback()
            return index
    index = sqlite3.connect(":memory:")
    path = _index_path(store)
    if path.is_file():
        # an index that cannot be read without writing, after a crash, holds nothing that the store's files do not
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", timeout=30, uri=True)) as on_disk,
        ):
            on_disk.backup(index)
    return _with_schema(index)


def _with_schema(index: sqlite3.Connection) -> sqlite3.Connection:
    index.executescript(SCHEMA)
    return index
