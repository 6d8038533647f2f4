"""Rows that are the rows of a request in other bytes, or nearly them: found by their texts in every dataset version.

A row is the same where its normal form is (`data/record/normal.py`): blanks, case, Unicode forms, invisible characters, a
system prompt and the shape do not count. It is similar where the Jaccard index of their runs of five words reaches the
threshold, computed over all runs, not estimated; rows of fewer words are one run. Each text is looked at once, in however
many dataset versions it lies.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forge_ray.data.curate.words import hashes, runs, words
from forge_ray.data.record.normal import row_digest, row_form
from forge_ray.data.record.schema import DataRecord
from forge_ray.governance.erasure import closure
from forge_ray.records import DatasetManifest, Frozen
from forge_ray.store.files import Store

SAME = "same text"
SIMILARITY = 0.8  # Jaccard index from which near duplicates are listed, unless the request says otherwise
NGRAM = 5


class Variant(Frozen):
    """A record that a request covers though it did not name it, or that it might cover. `why`: how it matches; `erased`:
    whether it goes; `where`: dataset versions that hold it."""

    record: str
    why: str
    erased: bool
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class Texts:
    """What rows are compared by: the digests of their normal forms, and each one's runs of words."""

    digests: frozenset[str]
    runs: tuple[frozenset[int], ...]

    @classmethod
    def of(cls, records: Iterable[DataRecord]) -> Texts:
        by_digest = {row_digest(record): record for record in records}
        by_digest.pop("", None)
        return cls(frozenset(by_digest), tuple(filter(None, map(_runs, by_digest.values()))))

    def similarity(self, record: DataRecord) -> float:
        """The highest Jaccard index with one of the rows."""
        own = _runs(record)
        return max((len(own & other) / len(own | other) for other in self.runs if not own.isdisjoint(other)), default=0.0)


def _runs(record: DataRecord) -> frozenset[int]:
    hashed = hashes(words(row_form(record)))
    return frozenset(runs(hashed, min(NGRAM, max(1, len(hashed)))).tolist()) if len(hashed) else frozenset()


def contents(store: Store, manifests: Iterable[DatasetManifest], records: Collection[str]) -> Iterator[DataRecord]:
    """The records of these ids as the dataset versions hold them, those that rules dropped too."""
    missing = set(records)
    for manifest in manifests:
        if missing:
            for table in _tables(store, manifest):
                for record, content in _rows(
                    table, pc.is_in(table.column("record"), value_set=pa.array(sorted(missing), pa.string()))
                ):
                    if record in missing:
                        missing.discard(record)
                        yield DataRecord(json.loads(content))


def alike(
    store: Store, manifests: Iterable[DatasetManifest], texts: Texts, records: Collection[str], threshold: float | None
) -> dict[str, str]:
    """Record → why it matches, for those besides `records` whose text is one of `texts` or, with a threshold, nearly."""
    matches: dict[str, str] = {}
    seen = set(records)
    if not texts.digests:
        return matches
    for manifest in manifests:
        for table in _tables(store, manifest):
            for record, content in _rows(table, None):
                if not record or record in seen:
                    continue
                seen.add(record)
                row = DataRecord(json.loads(content))
                if row_digest(row) in texts.digests:
                    matches[record] = SAME
                elif threshold is not None and (similarity := texts.similarity(row)) >= threshold:
                    matches[record] = f"similarity {np.floor(similarity * 100) / 100:.2f}"
    return matches


def _tables(store: Store, manifest: DatasetManifest) -> Iterator[pa.Table]:
    columns = ["record", "content"]
    return (table for _, table in closure.tables(store, manifest.id, columns) if table.column_names == columns)


def _rows(table: pa.Table, where: pa.Array | None) -> Iterator[tuple[str, str]]:
    chosen = table if where is None else table.filter(where)
    return zip(chosen.column("record").to_pylist(), chosen.column("content").to_pylist(), strict=True)
