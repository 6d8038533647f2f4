"""Test records of earlier cycles: what an earlier version was judged by, a later one must not learn.

Equal records are found by their ids: a record's split follows from its id and the shares of `data.splits` alone, so one
stays a test record while the share of the test split does not fall. Edited copies are found by runs of words: a copy is
another record, and falls into a split of its own. Both look-ups are binary searches, so the work is linear in the rows; the
index has one entry for each test record and for each run of words in one. With `by: conversation` other answers to a test
row's question, and its later turns, are found too, by how their conversations begin.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.config.curate import HeldOut
from forge_ray.config.data import Splits
from forge_ray.data.curate.decontaminate import MIN_WORDS
from forge_ray.data.curate.words import hashes, mixed, runs, words
from forge_ray.data.dataset.version import SPLITS, decisive_bytes, records, split_of
from forge_ray.data.record.conversation import conversation_marks
from forge_ray.data.record.schema import TURNS, DataRecord, texts
from forge_ray.progress import visible
from forge_ray.records import DatasetManifest
from forge_ray.store import paths
from forge_ray.store.files import Store

TEST = SPLITS.index("test")
BY_ID, BY_CONVERSATION, BY_WORDS = KINDS = (0, 1, 2)
# A run of words in more records of its dataset version than this is the wording of the task, not of a test record
TEMPLATE_SHARE, MOST_RECORDS, FEWEST_RECORDS = 0.1, 10, 2


def index_of(rule: HeldOut, store: Store) -> npt.NDArray[np.uint64]:
    """What the rule looks up, [2, num_entries]: sorted 64-bit hashes of ids and of runs of words; and for each hash its
    kind + 3 × the place of its dataset version in `rule.against`. Of a version whose rows are gone, which is
    reported, there are none."""
    parts = [np.zeros((2, 0), np.uint64)]
    for place, dataset in enumerate(rule.against):
        manifest = DatasetManifest.model_validate(store.read_json(paths.record("datasets", dataset)))
        if not store.is_published(paths.dataset(dataset)):
            print(f"  {visible(dataset)}: its rows are gone, and its test rows are not held out", file=sys.stderr)
            continue
        ids = [row["record"] for row in _rows(store, manifest, "test", ["record"])]
        parts.append(_entries([_number(record) for record in ids], _code(place, BY_ID)))
        if rule.by == "conversation":
            marks = {mark for record in _contents(store, manifest, ("test",)) for mark in _marks(record)}
            parts.append(_entries(sorted(marks), _code(place, BY_CONVERSATION)))
        if rule.ngram:
            parts.append(_entries(_own_runs(store, manifest, rule.ngram), _code(place, BY_WORDS)))
    entries = np.concatenate(parts, axis=1)
    _, first = np.unique(entries[0], return_index=True)  # of equal hashes that of the version that is named first
    return entries[:, first]


def held_out_reason(record: DataRecord, rule: HeldOut, index: npt.NDArray[np.uint64], splits: Splits) -> str:
    """Why a record is not used; "" where it is: neither a test record of an earlier cycle nor like one, or these shares
    make it a test record here too."""
    if not index.shape[1] or split_of(decisive_bytes(record, splits), splits) == TEST:
        return ""
    number = np.array([_number(record.id)], np.uint64)
    if len(by_id := _looked_up(number, index, BY_ID)):
        return f"a test row of {rule.against[by_id[0]]}"
    if rule.by == "conversation" and (by_marks := _looked_up(np.array(_marks(record), np.uint64), index, BY_CONVERSATION)):
        return f"of the conversation of a test row of {rule.against[min(by_marks)]}"
    by_words = _looked_up(_distinct(input_runs(record, rule.ngram)), index, BY_WORDS) if rule.ngram else ()
    return f"shares {rule.ngram} words with a test row of {rule.against[min(by_words)]}" if len(by_words) else ""


def input_runs(record: DataRecord, ngram: int) -> list[npt.NDArray[np.uint64]]:
    """Hashes of every run of `ngram` words, in their order, in each text that a record poses: its text, or its messages
    without the system's and the assistant's, since different questions may have one answer. Where all of them are shorter:
    of each run in an answer together with all that is posed; of a record that is shorter still, of the whole."""
    posed, answers = _sides(record)
    hashed = [hashes(words(text)) for text in posed]
    if own := [runs(one, ngram) for one in hashed if len(one) >= ngram]:
        return own
    question = np.concatenate([np.zeros(0, np.uint64), *hashed])
    of_answers = [hashes(words(text)) for text in answers]
    if len(question) and (long := [runs(one, ngram) for one in of_answers if len(one) >= ngram]):
        return [mixed(one ^ runs(question, len(question))) for one in long]
    whole = np.concatenate([question, *of_answers])
    return [mixed(runs(whole, len(whole)))] if len(whole) >= MIN_WORDS else []


def _sides(record: DataRecord) -> tuple[list[str], list[str]]:
    turns = [turn for column in TURNS for turn in record.content.get(column, ())]
    if not turns:
        return texts(record), []
    sides: dict[bool, list[str]] = {True: [], False: []}
    for turn in turns:
        if turn["role"] != "system":
            sides[turn["role"] == "assistant"] += texts(DataRecord({"messages": [turn]}))
    return sides[False], sides[True]


def _own_runs(store: Store, manifest: DatasetManifest, ngram: int) -> list[int]:
    """Hashes of the runs of words in test records that have no word of the wording of the task: of a run that many records
    of the dataset version have."""
    of_test = [input_runs(record, ngram) for record in _contents(store, manifest, ("test",))]
    counts = Counter(mark for lists in of_test for mark in _distinct(lists).tolist())
    index = np.array(sorted(counts), np.uint64)
    for record in _contents(store, manifest, tuple(split for split in SPLITS if split != "test")):
        own = _distinct(input_runs(record, ngram))
        counts.update(own[np.isin(own, index, assume_unique=True)].tolist())
    num_records = sum(split.num_records for split in manifest.splits.values())
    most = max(FEWEST_RECORDS, min(MOST_RECORDS, int(TEMPLATE_SHARE * num_records)))
    wording = np.array([mark for mark, count in counts.items() if count > most], np.uint64)
    own_runs: list[int] = _distinct([_apart(one, wording, ngram) for lists in of_test for one in lists]).tolist()
    return own_runs


def _apart(own: npt.NDArray[np.uint64], wording: npt.NDArray[np.uint64], ngram: int) -> npt.NDArray[np.uint64]:
    """Those of the consecutive runs of a text that share no word with a run of the wording."""
    near = np.convolve(np.isin(own, wording), np.ones(2 * ngram - 1))[ngram - 1 : ngram - 1 + len(own)]
    apart: npt.NDArray[np.uint64] = own[near == 0]
    return apart


def _distinct(lists: Sequence[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *lists]))


def _contents(store: Store, manifest: DatasetManifest, splits: Iterable[str]) -> Iterator[DataRecord]:
    for split in splits:
        for row in _rows(store, manifest, split, ["content", "kind"]):
            yield DataRecord(json.loads(row["content"]), row["kind"])


def _rows(store: Store, manifest: DatasetManifest, split: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    for table in records(store, manifest, split, columns):
        yield from table.to_pylist()


def _entries(values: list[int], code: int) -> npt.NDArray[np.uint64]:
    hashed = np.array(values, np.uint64)
    return np.stack([hashed, np.full_like(hashed, code)])


def _looked_up(values: npt.NDArray[np.uint64], index: npt.NDArray[np.uint64], kind: int) -> list[int]:
    """Places in `against` of the dataset versions whose entries of this kind are among the values."""
    hashed, codes = index
    places = np.minimum(np.searchsorted(hashed, values), len(hashed) - 1)
    hit = codes[places[hashed[places] == values]]
    return [int(code) // len(KINDS) for code in hit if int(code) % len(KINDS) == kind]


def _code(place: int, kind: int) -> int:
    return len(KINDS) * place + kind


def _marks(record: DataRecord) -> list[int]:
    """The first 64 bits of each mark of the record's conversation."""
    return sorted(int.from_bytes(mark[:8], "big") for mark in conversation_marks(record))


def _number(record: str) -> int:
    """The first 64 bits of a record's id."""
    return int(record.removeprefix("rec_")[:16], 16)
