"""What a job of the map stage writes: sorted parts of records, the rows that are not used, and counts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from forge_ray.config.curate import NearDuplicates
from forge_ray.data.build.summaries import MapSummary, PartFile, RuleCounts, SplitCounts, Tally, TrainTokens
from forge_ray.data.build.work import write_batches
from forge_ray.data.curate.neardup import signature
from forge_ray.data.curate.rules import Verdict
from forge_ray.data.dataset.version import SPLITS, place, record_bytes
from forge_ray.data.record.schema import DataRecord, texts
from forge_ray.data.tokens.template import Encoded
from forge_ray.store import paths
from forge_ray.store.files import Store

BATCH_ROWS = 128  # rows of a part that can be read alone: a partition reads little that it does not want
PART_BYTES = 64 << 20
INVALID = -1  # the number of the rule of a row that never became a record
MAX_REASONS, QUOTED = 100, re.compile(r"'[^']*'")
LENGTHS = tuple(2**n for n in range(3, 21))
NOTHING = DataRecord({})  # of a row that never became a record

UNUSED = pa.schema(
    [
        ("chunk", pa.int32()),
        ("line", pa.int64()),
        ("offset", pa.int64()),
        ("reason", pa.string()),
        ("raw_sha256", pa.string()),
        ("rule", pa.int32()),
        ("record", pa.string()),
        ("subject", pa.string()),
        ("content", pa.string()),
    ]
)
PLACED = [
    ("chunk", pa.int32()),
    ("line", pa.int64()),
    ("offset", pa.int64()),
    ("kind", pa.string()),
    ("record", pa.binary(12)),
    ("subject", pa.string()),
    ("flags", pa.string()),
    ("content", pa.string()),
]
ENCODED = pa.schema(
    [
        ("key", pa.uint64()),
        *PLACED,
        ("ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.int8())),
        ("lengths", pa.list_(pa.int32())),
    ]
)
CURATED = pa.schema([*PLACED, ("raw_sha256", pa.string()), ("meta", pa.string()), ("signature", pa.list_(pa.uint32()))])


@dataclass
class MappedRecord:
    """One record on its way through a job."""

    chunk: int
    line: int
    offset: int
    raw_sha256: str
    record: DataRecord
    flags: str = ""
    subject: str | None = None


class Parts:
    """The output of one job: collects rows, writes a part when it is large, and counts."""

    def __init__(self, key: str, store: Store, sources: Sequence[int], rules: Iterable[int]) -> None:
        self.key, self.store = key, store
        self.sources = np.array(sources, np.int64)  # of each chunk
        self.tally = Tally()
        self.steps = {number: RuleCounts() for number in rules}
        self.tables: list[pa.Table] = []
        self.splits: list[npt.NDArray[np.int8]] = []
        self.unused: list[dict[str, Any]] = []
        self.parts: list[PartFile] = []
        self.erased: list[tuple[int, int]] = []  # chunk and line of rows that tombstones leave out
        self.images: set[str] = set()
        self.bytes = 0

    def reject(self, chunk: int, line: int, offset: int, sha256: str, reason: str) -> None:
        """A row that never became a record, or whose record cannot be trained."""
        self.tally.rejected[chunk] += 1
        reasons = self.tally.reasons
        is_counted_alone = reason in reasons or len(reasons) < MAX_REASONS  # quoted values may be as many as the rows
        reasons[reason if is_counted_alone else QUOTED.sub("'…'", reason)] += 1
        self._unused(MappedRecord(chunk, line, offset, sha256, NOTHING), reason, INVALID)

    def erase(self, chunk: int, line: int) -> None:
        """A row that a tombstone leaves out: nothing of it is kept but its place."""
        self.erased.append((chunk, line))

    def drop(self, rule: int, item: MappedRecord, reason: str) -> None:
        self.tally.dropped[item.chunk] += 1
        self.steps[rule].reasons[reason.split(" of rec_")[0]] += 1  # those that name another record are counted as one
        self._unused(item, reason, rule)

    def _unused(self, item: MappedRecord, reason: str, rule: int) -> None:
        is_record = item.record is not NOTHING
        self.unused.append(
            {
                "chunk": item.chunk,
                "line": item.line,
                "offset": item.offset,
                "reason": reason,
                "raw_sha256": item.raw_sha256,
                "rule": rule,
                "record": item.record.id if is_record else "",
                "subject": item.subject,
                "content": item.record.json if is_record else "",
            }
        )

    def judge(self, rule: int, item: MappedRecord, verdict: Verdict) -> bool:
        """Whether the record stays; changes `item` to what the rule made of it."""
        step = self.steps[rule]
        step.before += 1
        step.detections.update(verdict.detections)
        if verdict.record is None:
            self.drop(rule, item, verdict.reason)
            return False
        if verdict.record is not item.record:
            step.changed += 1
            item.record = verdict.record
        if verdict.flag:
            item.flags = f"{item.flags} {verdict.flag}".lstrip()
        return True

    def keep_images(self, batch: Sequence[MappedRecord]) -> None:
        for item in batch:
            for name, data in item.record.images.items():
                if name not in self.images:
                    self.images.add(name)
                    path = paths.image(name)
                    if not self.store.exists(path):
                        self.store.write(path, data)

    def add_curated(self, batch: Sequence[MappedRecord], near: NearDuplicates | None) -> None:
        """Records that wait for a rule over all of them."""
        columns = _placed(batch)
        columns["raw_sha256"] = pa.array([item.raw_sha256 for item in batch], pa.string())
        columns["meta"] = pa.array([json.dumps(item.record.meta) for item in batch], pa.string())
        signatures = [signature(texts(item.record), near) if near else np.zeros(0, np.uint32) for item in batch]
        columns["signature"] = _lists(signatures, pa.uint32())
        self._add(pa.table(columns, schema=CURATED))

    def add_encoded(self, batch: Sequence[MappedRecord], documents: Sequence[list[Encoded]], config: Any) -> None:
        """Records with their tokens: of each no document (it is not packed), one, or several."""
        columns = _placed(batch)
        places = [place(item.record, config) for item in batch]
        splits = np.array([split for split, _ in places], np.int8)
        flat = [document for of_record in documents for document in of_record]
        owner = np.repeat(np.arange(len(batch)), [len(of_record) for of_record in documents])
        lengths = np.array([len(document.ids) for document in flat], np.int64)
        ids = np.concatenate([document.ids for document in flat]) if flat else np.zeros(0, np.int32)
        mask = np.concatenate([document.loss_mask for document in flat]) if flat else np.zeros(0, np.int8)
        tokens = np.bincount(owner, weights=lengths, minlength=len(batch)).astype(np.int64)
        trained = np.bincount(np.repeat(owner, lengths), weights=mask, minlength=len(batch)).astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int32)
        columns["key"] = pa.array(np.array([key for _, key in places], np.uint64))
        columns["ids"] = pa.ListArray.from_arrays(ends, pa.array(ids))
        columns["loss_mask"] = pa.ListArray.from_arrays(ends, pa.array(mask))
        columns["lengths"] = _lists([[len(document.ids) for document in of_record] for of_record in documents], pa.int32())
        self.splits.append(splits)
        self._count(batch, splits, tokens, trained, lengths)
        self.tally.truncated += sum(document.truncated for document in flat)
        self._add(pa.table(columns, schema=ENCODED))

    def _count(
        self,
        batch: Sequence[MappedRecord],
        splits: npt.NDArray[np.int8],
        tokens: npt.NDArray[np.int64],
        trained: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
    ) -> None:
        tally = self.tally
        tally.accepted.update(item.chunk for item in batch)
        tally.kinds.update("multimodal" if is_multimodal(item.record) else item.record.kind for item in batch)
        sources = self.sources[[item.chunk for item in batch]]
        for source, item in zip(sources.tolist(), batch, strict=True):
            tally.licences[source, item.record.meta.get("licence", "")] += 1
        buckets, counts = np.unique(np.searchsorted(LENGTHS, lengths).clip(max=len(LENGTHS) - 1), return_counts=True)
        for bucket, count in zip(buckets.tolist(), counts.tolist(), strict=True):
            tally.lengths[LENGTHS[bucket]] += count
        sizes = np.array([len(item.record.canonical) for item in batch])
        for split in np.unique(splits).tolist():
            in_split = splits == split
            tally.by_split.setdefault(split, SplitCounts()).add(
                SplitCounts(
                    records=int(in_split.sum()),
                    tokens=int(tokens[in_split].sum()),
                    trained=int(trained[in_split].sum()),
                    bytes=int(sizes[in_split].sum()),
                )
            )
        for source in np.unique(sources).tolist():
            from_source = (sources == source) & (splits == SPLITS.index("train"))
            train = tally.by_source.setdefault(source, TrainTokens())
            train.tokens += int(tokens[from_source].sum())
            train.trained += int(trained[from_source].sum())

    def _add(self, table: pa.Table) -> None:
        self.tables.append(table)
        self.bytes += table.nbytes
        if self.bytes >= PART_BYTES:
            self._write()

    def _write(self) -> None:
        if not self.tables:
            return
        name = f"{self.key}-{len(self.parts)}.arrow"
        table = pa.concat_tables(self.tables).combine_chunks()  # or `take` looks for each row's chunk
        batches: list[tuple[int, int, int]] = []
        cuts = [*range(BATCH_ROWS, table.num_rows, BATCH_ROWS), table.num_rows]
        if self.splits:
            keys, splits = table.column("key").to_numpy(), np.concatenate(self.splits)
            order = np.lexsort((keys, splits))
            table, keys, splits = table.take(order), keys[order], splits[order]
            cuts = [min(low + BATCH_ROWS, end) for start, end in _runs(splits) for low in range(start, end, BATCH_ROWS)]
            starts = [0, *cuts[:-1]]
            batches = [
                (int(splits[low]), int(keys[low]), int(keys[high - 1])) for low, high in zip(starts, cuts, strict=True)
            ]
        write_batches(self.store, name, table, cuts)
        self.parts.append(PartFile(name, table.num_rows, tuple(batches)))
        self.tables, self.splits, self.bytes = [], [], 0

    def close(self) -> MapSummary:
        self._write()
        unused = ""
        if self.unused:
            unused = f"{self.key}-unused.arrow"
            write_batches(self.store, unused, pa.Table.from_pylist(self.unused, UNUSED), [len(self.unused)])
        return MapSummary(self.key, tuple(self.parts), unused, self.steps, tuple(self.erased), self.tally)


def is_multimodal(record: DataRecord) -> bool:
    return any(isinstance(message.get("content"), list) for message in record.messages)


def _placed(batch: Sequence[MappedRecord]) -> dict[str, pa.Array]:
    return {
        "chunk": pa.array([item.chunk for item in batch], pa.int32()),
        "line": pa.array([item.line for item in batch], pa.int64()),
        "offset": pa.array([item.offset for item in batch], pa.int64()),
        "kind": pa.array([item.record.kind for item in batch], pa.string()),
        "record": pa.array([record_bytes(item.record.canonical) for item in batch], pa.binary(12)),
        "subject": pa.array([item.subject for item in batch], pa.string()),
        "flags": pa.array([item.flags for item in batch], pa.string()),
        "content": pa.array([item.record.json for item in batch], pa.string()),
    }


def _lists(values: Sequence[Any], kind: pa.DataType) -> pa.ListArray:
    ends = np.cumsum([0, *map(len, values)]).astype(np.int32)
    flat = np.concatenate([np.asarray(value) for value in values]) if len(values) else np.zeros(0)
    return pa.ListArray.from_arrays(ends, pa.array(flat).cast(kind))


def _runs(values: npt.NDArray[Any]) -> list[tuple[int, int]]:
    """Start and end of each run of equal values."""
    cuts = np.flatnonzero(np.diff(values)) + 1
    return list(zip([0, *cuts.tolist()], [*cuts.tolist(), len(values)], strict=True))
