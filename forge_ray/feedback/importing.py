"""Files of feedback → rows: read, join, leave out, write. What is not used is listed with its reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from forge_ray.config.curate import HeldOut
from forge_ray.config.data import DataConfig, Splits
from forge_ray.data.build.tombstones import ANSWER, Erased, tombstones
from forge_ray.data.build.tombstones import read as read_tombstones
from forge_ray.data.curate.heldout import held_out_reason, index_of
from forge_ray.data.read.ingest import expand, index_listed
from forge_ray.data.read.readers import Raw, read_raw
from forge_ray.data.read.strict_json import Reject, decode
from forge_ray.data.record.schema import DataRecord
from forge_ray.data.record.subject import Whose, subject_key
from forge_ray.feedback.entries import FeedbackEntry, entry_of
from forge_ray.feedback.join import Judged, judged, with_conversations
from forge_ray.feedback.rows import Contradictions, Form, contradiction, rows_of, verdicts_of
from forge_ray.progress import Stage
from forge_ray.store import kept_answers
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.kept_answers import KeptAnswer

HELD_OUT = "the conversation is of a test row of a dataset version of this store"
ERASED = "the row, or its user, was erased"
REPEATED = "the same question, answer and verdict as another row"


@dataclass(frozen=True)
class Unused:
    """An entry that gives no row. `is_invalid`: it could not be read or joined; else a rule leaves it out."""

    place: str
    answer_id: str
    reason: str
    is_invalid: bool


@dataclass
class Import:
    """The result of an import: rows to write, and what was not used."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    unused: list[Unused] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)  # column → rows in which it is filled
    num_entries: int = 0
    num_divided: int = 0  # conversations whose parts begin differently

    @property
    def num_invalid(self) -> int:
        return sum(one.is_invalid for one in self.unused)

    @property
    def reasons(self) -> dict[str, int]:
        """Reason → entries, the most frequent first."""
        return dict(Counter(one.reason for one in self.unused).most_common())


def import_feedback(
    catalog: Catalog,
    files: Iterable[str],
    form: Form = "chat",
    good_from: float | None = None,
    contradictions: Contradictions = "leave-out",
    stage: Stage | None = None,
) -> Import:
    """Read the files and join them with the kept answers of the store. Raises `ForgeError` where a file cannot be read."""
    result = Import()
    entries = list(_entries(files, good_from, result, stage))
    items = list(_joined(catalog.store, entries, result))
    items = list(_allowed(catalog, items, result))
    items, result.num_divided = with_conversations(items)
    verdicts = verdicts_of(items)
    seen: set[str] = set()
    for item in items:
        if why := contradiction(item, verdicts, contradictions):
            _leave(result, item, why)
            continue
        try:
            rows = [(row, record.id) for row, record in rows_of(item, form)]
        except Reject as error:
            _leave(result, item, str(error))
            continue
        new = [(row, record) for row, record in rows if record not in seen]
        if not new:
            _leave(result, item, REPEATED)
        seen.update(record for _, record in new)
        result.rows += [row for row, _ in new]
    result.unused.sort(key=_file_and_line)
    return result


def _entries(files: Iterable[str], good_from: float | None, result: Import, stage: Stage | None) -> Iterator[FeedbackEntry]:
    """Every row of the files that says something; the others are noted."""
    config = DataConfig.model_validate({"sources": [{"path": file} for file in files]})
    for listed in expand(config, any_split=True):
        for chunk in index_listed(listed).chunks:
            for raw in read_raw(chunk, config.max_line_bytes):
                result.num_entries += 1
                if stage is not None and result.num_entries % 1000 == 0:
                    stage.update(result.num_entries, result.num_entries, "rows read")
                place = f"{listed.name}:{raw.line}"
                value: Any = None
                try:
                    value = _decoded(raw)
                    entry = entry_of(value, place, good_from)
                except Reject as error:
                    result.unused.append(Unused(place, _id_of(value), str(error), is_invalid=True))
                    continue
                result.unread.update(entry.unread)
                yield entry


def _decoded(raw: Raw) -> Any:
    if raw.reason:
        raise Reject(raw.reason)
    return decode(raw.raw) if raw.raw is not None else raw.value


def _id_of(value: Any) -> str:
    return str(value.get("id") or value.get("answer_id") or "")[:80] if isinstance(value, dict) else ""


def _joined(store: Store, entries: list[FeedbackEntry], result: Import) -> Iterator[Judged]:
    ids = {entry.answer_id for entry in entries if entry.answer_id}
    kept: dict[str, list[KeptAnswer]] = {}
    for answer in kept_answers.kept_answers(store) if ids else ():
        if answer.id in ids:
            kept.setdefault(answer.id, []).append(answer)
    for entry in entries:
        try:
            yield judged(entry, kept)
        except Reject as error:
            result.unused.append(Unused(entry.place, entry.answer_id, str(error), is_invalid=True))


def _allowed(catalog: Catalog, items: list[Judged], result: Import) -> Iterator[Judged]:
    """Without what was erased, and without conversations that a dataset version of the store tests on: by its `splits` a row
    of such a conversation is another record, and could be trained on."""
    store = catalog.store
    erased = read_tombstones(store, tombstones(store))
    tested = tuple(one.id for one in catalog.datasets() if one.splits["test"].num_records) if items else ()
    rule = HeldOut(rule="held_out", by="conversation", against=tested, ngram=0) if tested else None
    index = index_of(rule, store) if rule else None
    nothing_tested = Splits(validation=0.0, test=0.0)
    for item in items:
        if is_erased(item, erased, store):
            _leave(result, item, ERASED)
        elif rule is not None and index is not None and held_out_reason(item.record, rule, index, nothing_tested):
            _leave(result, item, HELD_OUT)
        else:
            yield item


def is_erased(item: Judged, erased: Erased, store: Store) -> bool:
    """Whether tombstones name the answer, or the person who asked or rated."""
    if not erased.keys and not erased.texts:
        return False
    people = [item.notes[name] for name in ("user", "rated_by") if item.notes.get(name)]
    digests = (digest for value in people for digest in Whose(value, (subject_key(store, ""),)).digests())
    is_named = bool(item.notes["answer_id"]) and erased.has(ANSWER + item.notes["answer_id"])
    return is_named or any(map(erased.has, digests)) or any(erased.holds(record, None) for record in _as_rows(item))


def _file_and_line(unused: Unused) -> tuple[str, int]:
    file, _, line = unused.place.rpartition(":")
    return file, int(line)


def _as_rows(item: Judged) -> Iterator[DataRecord]:
    """The judged answer as a row of feedback and as a chat, and the better one as a chat."""
    content = item.record.content
    yield item.record
    for answer in (content["answer"], list(item.better)):
        if answer:
            yield DataRecord({"messages": [*content["messages"], *answer]})


def _leave(result: Import, item: Judged, reason: str) -> None:
    result.unused.append(Unused(item.place, item.notes["answer_id"], reason, is_invalid=False))


def lines_of(rows: Iterable[dict[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
