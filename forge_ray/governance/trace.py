"""Which runs, versions, aliases and deployments used a record, from the records and files that the stages wrote.

    rows → records → blocks of dataset versions → packed rows → steps of runs → model versions → aliases, deployments

A record is identified by its id, by its subject (a person), or as a row of a file, which is read as each dataset version
would have read it. A use that cannot be determined exactly (of a run whose settings are missing) counts as a use.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

from forge_ray.config.base import parse
from forge_ray.config.data import DataConfig
from forge_ray.config.encodings import UTF_8
from forge_ray.data.curate.rules import compile_rule
from forge_ray.data.dataset.index import Place, dropped, duplicates, is_record_id, of_subject, places, rows_with
from forge_ray.data.read.ingest import IndexedFile, index_listed
from forge_ray.data.read.readers import image_reader, read_raw
from forge_ray.data.read.sources import expand
from forge_ray.data.record.schema import DataRecord, Reject, parse_line, parse_record
from forge_ray.data.record.subject import KEY, OTHER_CASE, subject_digest, subject_key, written_digest, written_forms
from forge_ray.errors import ConfigError, DataError
from forge_ray.governance.impact import Affected, Reached, StoreUses
from forge_ray.governance.uses import Use
from forge_ray.records import DatasetManifest
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

__all__ = ["Affected", "Query", "Traced", "of_file", "of_record", "of_subject_value", "trace"]

T = TypeVar("T")
Reading = tuple[DataConfig, int, tuple[Any, ...]]  # settings of a dataset version, number of a source, rules that mask
LOOKERS = 8  # dataset versions that are searched at once: a look-up mostly waits for the disk


@dataclass(frozen=True)
class Query:
    """A query and the records that it denotes; none where no dataset version could have read one from it (`note` says why).
    `unsearched` are dataset versions that cannot answer, because they keep no subject or no sources."""

    asked: str
    records: tuple[str, ...]
    note: str = ""
    unsearched: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordPlace:
    """A place of a record, or of a duplicate of it (`relation` says how), in one dataset version."""

    dataset: str
    name: str
    place: Place
    relation: str = ""


@dataclass(frozen=True)
class TracedRecord:
    """One record: its places, those of its duplicates, and how runs used it."""

    record: str
    asked: tuple[str, ...]
    held: tuple[RecordPlace, ...]
    alike: tuple[RecordPlace, ...]
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Traced:
    """The result of a trace. `records` are those that a dataset version holds or dropped; `nowhere` are queries without any
    such record. `broken`: dataset version → why it cannot be searched."""

    num_datasets: int
    broken: dict[str, str]
    queries: tuple[Query, ...]
    records: tuple[TracedRecord, ...]
    nowhere: tuple[str, ...]
    reached: Reached
    affected: Affected


@dataclass(frozen=True)
class Inside:
    """What one dataset version has of the records: record → its places, those of its duplicates, and its packed rows."""

    held: dict[str, tuple[RecordPlace, ...]]
    alike: dict[str, tuple[RecordPlace, ...]]
    rows: dict[str, list[int]]


def trace(catalog: Catalog, queries: Sequence[Query]) -> Traced:
    """Everything that used the records of `queries`, and everything derived from it."""
    facts, manifests = StoreUses.of(catalog), catalog.datasets()
    asked: dict[str, list[str]] = {}
    for query in queries:
        for record in query.records:
            asked.setdefault(record, []).append(query.asked)
    inside, broken = of_each(manifests, lambda manifest: _inside(catalog.store, manifest, asked, facts))
    traced = []
    for record, names in asked.items():
        if held := _joined(one.held.get(record, ()) for one in inside.values()):
            uses = tuple(_uses(facts, manifests, inside, record))
            alike = _joined(one.alike.get(record, ()) for one in inside.values())
            traced.append(TracedRecord(record, tuple(dict.fromkeys(names)), held, alike, uses))
    splits = [(one.record, held.dataset, held.place.split) for one in traced for held in one.held]
    reached = facts.reached([use for one in traced for use in one.uses], splits)
    there = {one.record for one in traced}
    nowhere = tuple(query.asked for query in queries if there.isdisjoint(query.records))
    return Traced(len(inside), broken, tuple(queries), tuple(traced), nowhere, reached, _affected(traced, reached))


def of_each(
    manifests: Sequence[DatasetManifest], look: Callable[[DatasetManifest], T]
) -> tuple[dict[str, T], dict[str, str]]:
    """The result of `look` by dataset version, and for versions that cannot be searched the reason."""

    def tried(manifest: DatasetManifest) -> T | DataError:
        try:
            return look(manifest)
        except DataError as error:
            return error

    with ThreadPoolExecutor(LOOKERS) as pool:
        answers = dict(zip((manifest.id for manifest in manifests), pool.map(tried, manifests), strict=True))
    broken = {name: answer.message for name, answer in answers.items() if isinstance(answer, DataError)}
    return {name: answer for name, answer in answers.items() if not isinstance(answer, DataError)}, broken


def _joined(parts: Iterable[tuple[RecordPlace, ...]]) -> tuple[RecordPlace, ...]:
    return tuple(held for part in parts for held in part)


def _affected(records: Sequence[TracedRecord], reached: Reached) -> Affected:
    held = [held for one in records for held in one.held if held.place.split != "dropped"]
    measured = {use.run for one in records for use in one.uses if use.how == "validated"}
    runs = {run.run for run in reached.runs}
    return Affected(
        datasets=tuple(sorted({item.dataset for item in held})),
        runs=tuple(sorted(runs)),
        versions=tuple(sorted({item.version for item in reached.versions})),
        aliases=tuple(sorted({item.alias for item in reached.aliases})),
        deployments=tuple(sorted({item.deployment for item in reached.deployments})),
        evals=tuple(sorted({item.report for item in reached.evals})),
        validated=tuple(sorted(measured - runs)),
    )


# ---------------------------------------------------------------- what is asked


def of_record(record: str) -> Query:
    if not is_record_id(record):
        raise ConfigError(f"{record!r} is not a record id", hint="rec_ and 24 digits; `forge data show ds_…` prints them")
    return Query(record, (record,))


def of_subject_value(catalog: Catalog, value: str, asked: str = "subject") -> Query:
    """Every record of a person, found with the key of each dataset version; `asked` names the query in the answer."""
    manifests = catalog.datasets()
    digests = subject_digests(catalog.store, manifests, value)
    by_dataset, _ = of_each(
        [manifest for manifest in manifests if manifest.id in digests],
        lambda manifest: subject_records(catalog.store, manifest, digests[manifest.id]),
    )
    without = tuple(manifest.id for manifest in manifests if manifest.id not in digests)
    records = dict.fromkeys(
        record for ids in by_dataset.values() for record, difference in ids.items() if difference != OTHER_CASE
    )
    return Query(asked, tuple(records), unsearched=without)  # `trace` reports the versions that cannot be searched


def subject_digests(
    store: Store, manifests: Sequence[DatasetManifest], value: str, key_file: str = ""
) -> dict[str, dict[str, str]]:
    """Dataset version → HMACs of a person, for the versions with data.subject, under their own key or that of `key_file`;
    each with how its spelling differs from the value's normal form, "" where it does not."""
    digests = {}
    for manifest in manifests:
        subject = manifest.config.get("subject")
        if not subject:
            continue
        if not (file := key_file or subject.get("key_file", "")) and not store.exists(KEY):  # a new key would find nobody
            raise ConfigError(
                f"{manifest.id} identifies its subjects with the store's key, and {KEY} is missing",
                hint="restore it from a backup",
            )
        key = subject_key(store, file)
        spellings = {written_digest(key, form): difference for form, difference in reversed([*written_forms(value)])}
        digests[manifest.id] = spellings | dict.fromkeys(
            (subject_digest(key, value, bool(subject.get("caseless"))), written_digest(key, value)), ""
        )
    return digests


def subject_records(store: Store, manifest: DatasetManifest, digests: dict[str, str]) -> dict[str, str]:
    """Record → how the spelling of its subject differs, for each whose subject is one of `digests`."""
    records: dict[str, str] = {}
    for subject, difference in sorted(digests.items(), key=lambda item: item[1] != ""):
        for record in of_subject(store, manifest, subject):
            records.setdefault(record, difference)
    return records


@dataclass(frozen=True)
class ReadRow:
    """A row of a file, as each dataset version would have read it, before and after each rule that changes it."""

    place: str
    records: tuple[DataRecord, ...]
    note: str
    unsearched: tuple[str, ...]


def of_file(catalog: Catalog, path: str) -> list[Query]:
    """One query for each row of a file, in any format that data.sources accepts."""
    return [
        Query(row.place, tuple(dict.fromkeys(record.id for record in row.records)), row.note, row.unsearched)
        for row in rows_of_file(catalog, path)
    ]


def rows_of_file(catalog: Catalog, path: str) -> Iterator[ReadRow]:
    """Every row of a file, in any format that data.sources accepts."""
    manifests = catalog.all(DatasetManifest)
    readings = _readings(manifests)
    unsearched = tuple(manifest.id for manifest in manifests if not manifest.config.get("sources"))
    limit = max((config.max_line_bytes for config, _, _ in readings), default=16 << 20)
    for read_files in _as_each_reads_it(path, readings, limit):
        by_line = heapq.merge(*(_rows_of(file, own, limit) for file, own in read_files), key=itemgetter(0))
        for line, rows_of_line in groupby(by_line, key=itemgetter(0)):
            rows = list(rows_of_line)
            records = tuple(record for row in rows for record in row[1])
            reasons = [reason for row in rows for reason in row[2]]
            note = "" if records else f"no record: {'; '.join(dict.fromkeys(reasons)) or 'no dataset version reads it'}"
            yield ReadRow(f"{read_files[0][0].name}:{line}", records, note, unsearched)


def _as_each_reads_it(
    path: str, readings: Sequence[Reading], limit: int
) -> Iterator[list[tuple[IndexedFile, list[Reading]]]]:
    """Each file of the path in every way in which dataset versions read its bytes, with the readings of that way. A way that
    cannot read it is left out where another one can."""
    by_way: dict[tuple[str, str], list[Reading]] = {(UTF_8, ""): []}
    for reading in readings:
        source = reading[0].sources[reading[1]]
        by_way.setdefault((source.encoding, source.sheet), []).append(reading)
    indexed: dict[str, list[tuple[IndexedFile, list[Reading]]]] = {}
    errors: list[DataError] = []
    for (encoding, sheet), own in by_way.items():
        try:
            config = parse(DataConfig, {"sources": [{"path": path, "encoding": encoding, "sheet": sheet}]})
            for file in expand(config, any_split=True):
                indexed.setdefault(file.path, []).append((index_listed(file, limit), own))
        except DataError as error:  # the file has no such sheet, or no encoding
            errors.append(error)
    if errors and not indexed:
        raise errors[0]
    for ways in indexed.values():
        yield [way for way in ways if not any(chunk.reason for chunk in way[0].chunks)] or ways[:1]


def _rows_of(
    file: IndexedFile, readings: Sequence[Reading], limit: int
) -> Iterator[tuple[int, list[DataRecord], list[str]]]:
    """Line, records and reasons against one of each row."""
    for chunk in file.chunks:
        images = image_reader(chunk)
        for raw in read_raw(chunk, limit):
            records: list[DataRecord] = []
            reasons = [raw.reason] if raw.reason else []
            for config, source, masks in readings if not raw.reason else ():
                shape, mapping = config.sources[source].shape, config.sources[source].mapping
                try:
                    if raw.raw is not None:
                        record = parse_line(raw.raw, shape, mapping, (), images)
                    else:
                        record = parse_record(raw.value, shape, mapping, (), images)
                except Reject as reason:
                    reasons.append(str(reason))
                    continue
                records += _stages(record, masks)
            yield raw.line, records, reasons


def _readings(manifests: Sequence[DatasetManifest]) -> list[Reading]:
    """The distinct ways in which dataset versions read rows."""
    readings: dict[str, Reading] = {}
    for manifest in manifests:
        if not manifest.config.get("sources"):
            continue  # reported as unsearched
        config = parse(DataConfig, manifest.config)
        masks = tuple(rule for rule in config.curate if getattr(rule, "action", "") == "mask")
        for number, source in enumerate(config.sources):
            key = repr((source.encoding, source.sheet, source.shape, source.mapping, masks))
            readings.setdefault(key, (config, number, masks))
    return list(readings.values())


def _stages(record: DataRecord, masks: Sequence[Any]) -> Iterator[DataRecord]:
    """A record before and after each rule that changes it: a rule may have dropped it in between."""
    yield record
    for rule in masks:
        changed = compile_rule(rule)(record).record
        if changed is not None:
            record = changed
        yield record


# ---------------------------------------------------------------- where it is, and what used it


def _inside(store: Store, manifest: DatasetManifest, records: Collection[str], facts: StoreUses) -> Inside:
    located = [*places(store, manifest, records), *dropped(store, manifest, records)]
    held: dict[str, tuple[RecordPlace, ...]] = {}
    for place in located:
        held[place.record] = (*held.get(place.record, ()), RecordPlace(manifest.id, manifest.name, place))
    trained = [place for place in located if place.split == "train"]
    rows = rows_with(store, manifest, trained) if trained and facts.runs_on(manifest.id) else {}
    return Inside(held, _alike(store, manifest, records, held), rows)


def _alike(
    store: Store, manifest: DatasetManifest, records: Collection[str], held: dict[str, tuple[RecordPlace, ...]]
) -> dict[str, tuple[RecordPlace, ...]]:
    """The duplicates of each record in a dataset version: the one that was kept, and those that were dropped for it."""
    heads = {record: [held.place.kept for held in held.get(record, ()) if held.place.kept] for record in records}
    clusters: dict[str, list[Place]] = {}
    for place in duplicates(store, manifest, {*records, *(head for kept in heads.values() for head in kept)}):
        clusters.setdefault(place.kept, []).append(place)
    stay = {place.record: place for place in places(store, manifest, {head for kept in heads.values() for head in kept})}
    alike: dict[str, tuple[RecordPlace, ...]] = {}
    for record, own_heads in heads.items():
        cluster: list[tuple[Place, str]] = []
        for head in dict.fromkeys([*own_heads, record]):
            if head != record:
                cluster.append((stay.get(head) or Place(head, "unknown", "", 0, -1), "stays for it"))  # masked, or dropped
            relation = "dropped with it" if head != record else "dropped for it"
            cluster += [(other, relation) for other in clusters.get(head, ()) if other.record != record]
        if cluster:
            alike[record] = tuple(RecordPlace(manifest.id, manifest.name, place, how) for place, how in cluster)
    return alike


def _uses(facts: StoreUses, manifests: Sequence[DatasetManifest], inside: dict[str, Inside], record: str) -> Iterator[Use]:
    for manifest in manifests:
        one = inside.get(manifest.id)
        for held in one.held.get(record, ()) if one else ():
            for run in facts.runs_on(manifest.id):
                if held.place.split == "train" and one and record in one.rows:
                    yield from run.trained_on(manifest, record, one.rows[record])
                elif held.place.split == "validation":
                    yield from run.validated_on(manifest, record)
