"""The records that a request covers: those that it names, their variants and near duplicates, and what they were read as."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from forge_ray.data.build import tombstones as erased
from forge_ray.data.dataset import index
from forge_ray.data.dataset.index import Place, is_record_id
from forge_ray.data.record.normal import row_digest
from forge_ray.data.record.schema import DataRecord
from forge_ray.data.record.subject import OTHER_CASE, erased_digests, subject_key
from forge_ray.errors import ConfigError, DataError, NotFound
from forge_ray.governance.erasure import answers, closure
from forge_ray.governance.erasure.variants import SAME, SIMILARITY, Texts, Variant, alike, contents
from forge_ray.governance.trace import of_each, rows_of_file, subject_digests, subject_records
from forge_ray.records import DatasetManifest
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

T = TypeVar("T")
BY_RULE = "near duplicate, by a rule of its dataset version"


@dataclass(frozen=True)
class ErasureRequest:
    """The rows to erase. `values`: one subject, record ids, ids of kept answers, or one path of a file with rows.
    `similarity`: Jaccard index from which near duplicates go, None where they are only listed; `any_case`: rows of a subject
    go in whatever case it is written; `keep`: ids of variants that stay."""

    by: Literal["subject", "record", "file", "answer"]
    values: tuple[str, ...]
    near_duplicates: bool = True
    key_file: str = ""
    similarity: float | None = None
    any_case: bool = False
    keep: tuple[str, ...] = ()

    def fingerprint(self, store: Store) -> str:
        """An HMAC of the request: equal for equal requests, and not guessable without the store's key."""
        if self.by == "file":
            return erased.fingerprint_of(store, Path(self.values[0]).read_bytes().hex() + self._choices())
        return erased.fingerprint_of(store, "\n".join(sorted(value.strip() for value in self.values)) + self._choices())

    def _choices(self) -> str:
        """What decides on variants, where it is not what it is without saying so."""
        choices = [] if self.similarity is None else [f"similarity {self.similarity:g}"]
        choices += ["any case"] if self.any_case else []
        return "".join(f"\n{choice}" for choice in [*choices, *(f"keep {record}" for record in sorted(set(self.keep)))])


@dataclass(frozen=True)
class ReachedRecords:
    """The records that a request covers. `near` are the variants and near duplicates of `asked`; `read` the ids of rows
    before rules masked them; `subjects` the names of the person (`subject.erased_digests`); `texts` the digests of the
    normal forms of all these rows; `places` where they are, by dataset version; `variants` every match for a decision.
    `answers`: ids of answers that were asked for, `num_answers` the kept ones that all of this covers."""

    asked: frozenset[str]
    near: frozenset[str]
    read: frozenset[str]
    subjects: frozenset[str]
    places: dict[str, list[Place]]
    notes: tuple[str, ...]
    texts: frozenset[str] = frozenset()
    variants: tuple[Variant, ...] = ()
    answers: frozenset[str] = frozenset()
    num_answers: int = 0

    @property
    def records(self) -> set[str]:
        return {*self.asked, *self.near}

    @property
    def tombstones(self) -> set[str]:
        named = {*(erased.TEXT + text for text in self.texts), *(erased.ANSWER + answer for answer in self.answers)}
        return {*self.asked, *self.near, *self.read, *self.subjects, *named}


@dataclass
class Asked:
    """What a request names: record ids; rows that it brings along; names of a person; and matches with their reasons, of
    which those in `open_matches` wait for a decision."""

    records: set[str] = field(default_factory=set)
    rows: list[DataRecord] = field(default_factory=list)
    subjects: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    open_matches: dict[str, str] = field(default_factory=dict)
    answers: set[str] = field(default_factory=set)


def search(catalog: Catalog, request: ErasureRequest) -> ReachedRecords:
    """The records of a request and all further records that must be erased with them. Raises `NotFound`."""
    store, manifests = catalog.store, catalog.datasets()
    if wrong := [value for value in request.keep if not is_record_id(value)]:
        raise ConfigError(f"--keep {wrong[0]!r} is not a record id", hint="`forge erase … --plan` lists the variants: rec_…")
    asked = _asked(catalog, manifests, request)
    rows = [*asked.rows, *contents(store, manifests, asked.records)]
    threshold = (request.similarity or SIMILARITY) if request.near_duplicates else None
    matches = alike(store, manifests, Texts.of(rows), asked.records, threshold)
    if request.similarity is None:
        asked.open_matches |= {record: f"{why}; --similarity erases it" for record, why in matches.items() if why != SAME}
        matches = {record: why for record, why in matches.items() if why == SAME}
    kept = set(request.keep) - asked.records
    near = matches.keys() - kept
    if request.near_duplicates:
        by_rule = _near(store, manifests, asked.records | near) - kept
        matches |= dict.fromkeys(by_rule - matches.keys(), BY_RULE)
        near = near | by_rule
    places = _everywhere(manifests, lambda manifest: _places(store, manifest, asked.records | near))
    rows += contents(store, manifests, near)
    read: set[str] = set()
    notes: list[str] = []
    for manifest in manifests:
        if held := places[manifest.id]:
            as_read, problems = closure.as_read(manifest, held)
            read |= {record.id for record in as_read}
            rows += as_read
            notes += problems
    stay = {row_digest(row) for row in contents(store, manifests, kept | asked.open_matches.keys())}
    chosen = {*matches, *asked.open_matches, *asked.reasons}
    where = _everywhere(manifests, lambda manifest: _places(store, manifest, chosen)) if chosen else {}
    reached = ReachedRecords(
        asked=frozenset(asked.records),
        near=frozenset(near),
        read=frozenset(read),
        subjects=frozenset(asked.subjects),
        places={dataset: held for dataset, held in places.items() if held},
        notes=tuple(dict.fromkeys(notes)),
        texts=frozenset({row_digest(row) for row in rows} - stay - {""}),
        variants=tuple(_variants(asked, matches, near, where)),
        answers=frozenset(asked.answers),
    )
    return replace(reached, num_answers=answers.count_covered(store, reached.tombstones))


def _asked(catalog: Catalog, manifests: list[DatasetManifest], request: ErasureRequest) -> Asked:
    if request.by == "record":
        if wrong := [value for value in request.values if not is_record_id(value)]:
            raise ConfigError(f"{wrong[0]!r} is not a record id", hint="forge data show ds_… prints them: rec_…")
        return Asked(set(request.values))
    if request.by == "file":
        rows = list(rows_of_file(catalog, request.values[0]))
        if unread := [row for row in rows if not row.records]:
            raise DataError(
                f"{unread[0].place} is {unread[0].note} ({len(unread)} of {len(rows)} rows)",
                hint="give the rows in the form that the sources have",
            )
        records = [record for row in rows for record in row.records]
        return Asked({record.id for record in records}, records)
    if request.by == "answer":
        return _of_answers(catalog.store, request.values)
    return _of_subject(catalog.store, manifests, request)


def _of_answers(store: Store, values: tuple[str, ...]) -> Asked:
    """The kept answers of these ids, and the rows that can have been made of them."""
    kept = answers.named(store, values)
    names = set().union(*map(answers.names_of, kept))
    if unknown := sorted(set(values) - names):
        raise NotFound(
            f"no kept answer has the id {unknown[0]}",
            hint="it may have been removed; erase rows that were made of it with --record, --file or --subject",
        )
    rows = [record for answer in kept for record in answers.records_of(answer)]
    return Asked({record.id for record in rows}, rows, answers=names)


def _of_subject(store: Store, manifests: list[DatasetManifest], request: ErasureRequest) -> Asked:
    """The records of a person in every spelling; those in another case only where the column or the request says so."""
    value = request.values[0]
    digests = subject_digests(store, manifests, value, request.key_file)
    if not digests:
        names = set(erased_digests(subject_key(store, request.key_file), value, request.any_case))
        if answers.count_covered(store, names):
            return Asked(subjects=names)
        raise ConfigError(
            "no dataset version of this store has data.subject set, so rows cannot be found by subject, and no kept"
            " answer is of this user",
            hint="use --record or --file; data.subject applies to datasets that are prepared from now on",
        )
    files = {str(manifest.config["subject"].get("key_file", "")) for manifest in manifests if manifest.id in digests}
    keys = {subject_key(store, file) for file in ({request.key_file} if request.key_file else files) | {""}}
    asked = Asked(subjects={name for key in keys for name in erased_digests(key, value, request.any_case)})
    theirs = [manifest for manifest in manifests if manifest.id in digests]
    by_dataset = _everywhere(theirs, lambda manifest: subject_records(store, manifest, digests[manifest.id]))
    for record, difference in (item for records in by_dataset.values() for item in records.items()):
        is_open = difference == OTHER_CASE and not request.any_case
        if is_open:
            asked.open_matches[record] = f"subject differs in {difference}; --any-case erases it"
        else:
            asked.reasons[record] = difference
    asked.records = set(asked.reasons)
    asked.open_matches = {record: why for record, why in asked.open_matches.items() if record not in asked.records}
    return asked


def _variants(
    asked: Asked, matches: dict[str, str], near: Iterable[str], places: dict[str, list[Place]]
) -> Iterable[Variant]:
    """Each match that is more than equality, with those that stay last."""
    where: dict[str, list[str]] = {}
    for dataset, held in places.items():
        for place in held:
            where.setdefault(place.record, []).append(dataset)
    reasons = {record: f"subject in another spelling: {why}" for record, why in asked.reasons.items() if why}
    reasons |= asked.open_matches | matches
    covered = {*asked.records, *near}
    for record, why in sorted(reasons.items(), key=lambda item: (item[0] not in covered, item)):
        yield Variant(record=record, why=why, erased=record in covered, where=tuple(sorted(set(where.get(record, ())))))


def _everywhere(manifests: list[DatasetManifest], look: Callable[[DatasetManifest], T]) -> dict[str, T]:
    """The result of `look` for each dataset version; raises `DataError` if one of them cannot be searched."""
    by_dataset, broken = of_each(manifests, look)
    if broken:
        reason = next(iter(broken.values()))
        raise DataError(f"a dataset version cannot be searched: {reason}", hint="restore it from a backup, then erase")
    return by_dataset


def _near(store: Store, manifests: list[DatasetManifest], asked: set[str]) -> set[str]:
    """Near duplicates of the records over all dataset versions, transitively."""
    near: set[str] = set()
    while True:
        reached = asked | near
        look = partial(closure.near_duplicates, store, records=reached)
        if not (more := set().union(*_everywhere(manifests, look).values()) - reached):
            return near
        near |= more


def _places(store: Store, manifest: DatasetManifest, records: set[str]) -> list[Place]:
    if not records:
        return []
    return [*index.places(store, manifest, records), *index.dropped(store, manifest, records)]
