"""Which runs, versions, aliases and deployments used a record: joined from what the stages wrote down (level 3).

    rows → records → blocks of dataset versions → packed rows → steps of runs → model versions → aliases, deployments

A record is given by its id, as a person's (`subject`), or as a row of a file, which is read as each dataset version would
have read it. Where something cannot be known exactly (a run whose settings are gone) it is counted as used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from forge_ray.catalog import Catalog
from forge_ray.config.base import parse
from forge_ray.config.data import DataConfig
from forge_ray.data.curate import compile_rule
from forge_ray.data.find import expand
from forge_ray.data.index import (
    Place,
    duplicates_of,
    is_record_id,
    of_subject,
    place_of,
    place_of_dropped,
    rows_with,
)
from forge_ray.data.ingest import index_file
from forge_ray.data.readers import image_reader, read_raw
from forge_ray.data.schema import DataRecord, Reject, parse_line, parse_record
from forge_ray.data.subject import KEY, subject_digest, subject_key
from forge_ray.errors import ConfigError
from forge_ray.impact import Affected, Facts, Reached, Use
from forge_ray.records import DatasetManifest
from forge_ray.store import Store

__all__ = ["Affected", "Query", "Traced", "of_file", "of_record", "of_subject_value", "trace"]


@dataclass(frozen=True)
class Query:
    """What was asked, and the records that it stands for: none if no dataset version could have made one of it (`note`).
    `unsearched` are dataset versions that cannot answer, for they keep no subject, or not how their rows were read."""

    asked: str
    records: tuple[str, ...]
    note: str = ""
    unsearched: tuple[str, ...] = ()


@dataclass(frozen=True)
class Held:
    """A place of a record in one dataset version, or of one that is its duplicate (`relation` says how)."""

    dataset: str
    name: str
    place: Place
    relation: str = ""


@dataclass(frozen=True)
class TracedRecord:
    """One record: where it is, what is alike, and what runs did with it."""

    record: str
    asked: tuple[str, ...]
    held: tuple[Held, ...]
    alike: tuple[Held, ...]
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Traced:
    """`records` are those that some dataset version holds or dropped; `nowhere` are queries of which there is no trace."""

    num_datasets: int
    queries: tuple[Query, ...]
    records: tuple[TracedRecord, ...]
    nowhere: tuple[str, ...]
    reached: Reached
    affected: Affected


def trace(catalog: Catalog, queries: Sequence[Query]) -> Traced:
    """Everything that saw the records of `queries`, and everything that came of that."""
    manifests, facts = catalog.datasets(), Facts.of(catalog)
    asked: dict[str, list[str]] = {}
    for query in queries:
        for record in query.records:
            asked.setdefault(record, []).append(query.asked)
    found, by_record = [], {}
    for record, names in asked.items():
        held = tuple(_held(catalog.store, manifests, record))
        if held:
            by_record[record] = held
            uses = tuple(_uses(catalog.store, facts, manifests, record, held))
            alike = tuple(_alike(catalog.store, manifests, record, held))
            found.append(TracedRecord(record, tuple(dict.fromkeys(names)), held, alike, uses))
    splits = [(one.record, held.dataset, held.place.split) for one in found for held in one.held]
    reached = facts.reached([use for one in found for use in one.uses], splits)
    nowhere = tuple(query.asked for query in queries if not any(record in by_record for record in query.records))
    return Traced(len(manifests), tuple(queries), tuple(found), nowhere, reached, _affected(found, reached))


def _affected(found: Sequence[TracedRecord], reached: Reached) -> Affected:
    held = [held for one in found for held in one.held if held.place.split != "dropped"]
    measured = {use.run for one in found for use in one.uses if use.how == "validated"}
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
        raise ConfigError(f"{record!r} is no record id", hint="rec_ and 24 digits; `forge data show ds_…` prints them")
    return Query(record, (record,))


def of_subject_value(catalog: Catalog, value: str, asked: str = "subject") -> Query:
    """Every record of a person, under the key of each dataset version; `asked` is what the answer calls them."""
    records: dict[str, None] = {}
    without = []
    for manifest in catalog.datasets():
        subject = manifest.config.get("subject")
        if not subject:
            without.append(manifest.id)
            continue
        if not subject["key_file"] and not catalog.store.exists(KEY):  # a new key would find nobody
            raise ConfigError(
                f"{manifest.id} names its subjects under the store's key, and {KEY} is gone", hint="restore it from a backup"
            )
        digest = subject_digest(subject_key(catalog.store, subject["key_file"]), value)
        records |= dict.fromkeys(of_subject(catalog.store, manifest, digest))
    return Query(asked, tuple(records), unsearched=tuple(without))


def of_file(catalog: Catalog, path: str) -> list[Query]:
    """One query a row of a file (any format that a run file's sources may have)."""
    manifests = catalog.all(DatasetManifest)
    readings = _readings(manifests)
    unsearched = tuple(manifest.id for manifest in manifests if not manifest.config.get("sources"))
    limit = max((config.max_line_bytes for config, _, _ in readings), default=16 << 20)
    found = []
    for file in expand(parse(DataConfig, {"sources": [{"path": path}]})):
        for chunk in index_file(file.path, file.name, file.format, max_line_bytes=limit).chunks:
            images = image_reader(chunk)
            for raw in read_raw(chunk, limit):
                ids: dict[str, None] = {}
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
                    ids |= dict.fromkeys(_stages(record, masks))
                note = "" if ids else f"no record: {'; '.join(dict.fromkeys(reasons)) or 'no dataset version reads it'}"
                found.append(Query(f"{file.name}:{raw.line}", tuple(ids), note, unsearched))
    return found


def _readings(manifests: Sequence[DatasetManifest]) -> list[tuple[DataConfig, int, tuple[Any, ...]]]:
    """The distinct ways in which dataset versions make records of rows: (settings, number of the source, masking rules)."""
    found: dict[str, tuple[DataConfig, int, tuple[Any, ...]]] = {}
    for manifest in manifests:
        if not manifest.config.get("sources"):
            continue  # told as not searched
        config = parse(DataConfig, manifest.config)
        masks = tuple(rule for rule in config.curate if getattr(rule, "action", "") == "mask")
        for number, source in enumerate(config.sources):
            key = repr((source.shape, source.mapping, masks))
            found.setdefault(key, (config, number, masks))
    return list(found.values())


def _stages(record: DataRecord, masks: Sequence[Any]) -> Iterator[str]:
    """The ids of a record before and after each rule that changes it: a rule may have dropped it in between."""
    yield record.id
    for rule in masks:
        changed = compile_rule(rule)(record).record
        if changed is not None:
            record = changed
        yield record.id


# ---------------------------------------------------------------- where it is, and what used it


def _held(store: Store, manifests: Sequence[DatasetManifest], record: str) -> Iterator[Held]:
    for manifest in manifests:
        if place := place_of(store, manifest, record):
            yield Held(manifest.id, manifest.name, place)
        for dropped in place_of_dropped(store, manifest, record):
            yield Held(manifest.id, manifest.name, dropped)


def _alike(store: Store, manifests: Sequence[DatasetManifest], record: str, held: Sequence[Held]) -> Iterator[Held]:
    """The cluster of the record in each dataset version: the one that stays, and those that were dropped for it."""
    for manifest in manifests:
        heads = [item.place.kept for item in held if item.dataset == manifest.id and item.place.kept]
        for head in dict.fromkeys([*heads, record]):
            if head != record:
                stays = place_of(store, manifest, head) or Place(head, "unknown", "", 0, -1)  # masked later, or dropped
                yield Held(manifest.id, manifest.name, stays, "stays for it")
            for other in duplicates_of(store, manifest, head):
                if other.record != record:
                    yield Held(manifest.id, manifest.name, other, "dropped with it" if head != record else "dropped for it")


def _uses(
    store: Store, facts: Facts, manifests: Sequence[DatasetManifest], record: str, held: Sequence[Held]
) -> Iterator[Use]:
    by_id = {manifest.id: manifest for manifest in manifests}
    for item in held:
        manifest, split = by_id[item.dataset], item.place.split
        runs = facts.runs_on(item.dataset)
        if split == "train" and runs:
            rows = rows_with(store, manifest, record, item.place)
            for run in runs if rows else ():
                yield from run.trained_on(manifest, record, rows)
        elif split == "validation":
            for run in runs:
                yield from run.validated_on(manifest, record)
