"""Which blocks of a dataset version hold a record, and which records are a person's: answered without reading it (level 2).

    index/<ds>/records.npy      sorted uint64: 40 bits of the record id ‖ 24 bits of the packed block, or a reserved value
    index/<ds>/subjects.npy     sorted uint64: 32 bits of the subject's HMAC ‖ 32 bits of the row's number in records/
    index/<ds>/*-fences.npy     of every `CHUNK` entries the first one, and a digest
    index/<ds>/about.json       format, dataset, rows of each part of records/

Derived from records/, packed/ and dropped/ alone: it may be removed, and is built again where it is absent or does not
verify. A look-up is two searches, one among the fences and one in a chunk whose digest is checked first. What it finds are
candidates, for ids are cut short; they are checked against the dataset's rows, so none is wrong and none is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from forge_ray.config.data import Splits
from forge_ray.data.dataset import SPLITS, shuffle_key, split_of
from forge_ray.data.schema import RECORD_HEX
from forge_ray.data.stream import Rows
from forge_ray.errors import ConfigError, DataError, ForgeError, StoreError
from forge_ray.records import DatasetManifest, canonical_json
from forge_ray.store import Store, sha256_file

__all__ = ["Place", "build", "duplicates_of", "of_subject", "place_of", "place_of_dropped", "rows_with"]

FORMAT = 1
CHUNK = 1 << 16  # entries that share a digest: 512 KiB, hashed in half a millisecond
BLOCK_BITS = 24
BLOCK_MASK = (1 << BLOCK_BITS) - 1
RECORD_DIGITS, SUBJECT_DIGITS = 10, 8  # hex digits that an entry keeps
# Reserved values in the place of a block: the record is held out, is in no packed row, was dropped, or is the one that stays
# of some that were dropped as its duplicates.
VALIDATION, TEST, UNPACKED, DROPPED, KEPT = (BLOCK_MASK - number for number in range(5))
FIRST_RESERVED = KEPT
FENCE = np.dtype([("first", "<u8"), ("digest", "<u8", 2)])
BATCH_ROWS = 1 << 14
SMALL = 1 << 20  # bytes that are read rather than mapped
DUPLICATE = r" of (?P<kept>rec_[0-9a-f]{24})$"
FOUND = ["record", "source", "file", "line", "offset"]
Uint64s = npt.NDArray[np.uint64]
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a dataset version has a record. `split` is `dropped` for one that a rule left out, for `reason`, which names
    the record that stays (`kept`) if it is a duplicate. `blocks` are candidates: see `rows_with`."""

    record: str
    split: str
    file: str
    line: int
    offset: int
    source: int = 0
    reason: str = ""
    kept: str = ""
    blocks: tuple[int, ...] = ()


@dataclass
class Sorted:
    """A sorted array on disk with its fences; a chunk is checked the first time that it is read."""

    values: Uint64s
    fences: npt.NDArray[Any]
    path: str
    checked: set[int] = field(default_factory=set)

    def within(self, low: int, high: int) -> Uint64s:
        """The entries low..high; raises `StoreError` where a chunk is not what was written."""
        first = max(0, int(np.searchsorted(self.fences["first"], np.uint64(low), "left")) - 1)
        last = int(np.searchsorted(self.fences["first"], np.uint64(high), "right"))
        parts = [self._chunk(number) for number in range(first, last)]
        entries = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
        start, end = np.searchsorted(entries, np.uint64(low), "left"), np.searchsorted(entries, np.uint64(high), "right")
        return entries[start:end]

    def _chunk(self, number: int) -> Uint64s:
        entries = np.asarray(self.values[number * CHUNK : (number + 1) * CHUNK])
        if number not in self.checked:
            if _digest(entries) != self.fences["digest"][number].tobytes():
                raise StoreError(f"{self.path}: chunk {number} is not what was written", hint="remove the folder `index`")
            self.checked.add(number)
        return entries


@dataclass(frozen=True)
class Index:
    records: Sorted
    subjects: Sorted
    parts: tuple[tuple[str, int], ...]  # files of records/ and their rows, in the order of row numbers


# ---------------------------------------------------------------- look-ups


def place_of(store: Store, manifest: DatasetManifest, record: str) -> Place | None:
    """Where the record is in the dataset, with the blocks that may hold it; None where it is not."""
    codes = _codes(store, manifest, record)
    if not (codes - {DROPPED, KEPT}):
        return None
    raw = bytes.fromhex(record.removeprefix("rec_"))
    split = SPLITS[split_of(raw, Splits.model_validate(manifest.config["splits"]))]
    key = shuffle_key(raw, manifest.config["shuffle_seed"])
    paths = [path for path, _ in _open(store, manifest.id).parts if path.startswith(f"records/{split}/")]
    if not paths:
        return None
    path = f"datasets/{manifest.id}/{paths[key * len(paths) >> 64]}"  # the parts divide the keys evenly
    filters = pc.field("key") == pa.scalar(key, pa.uint64())
    table = pq.read_table(store.path(path), columns=FOUND, filesystem=store.filesystem, filters=filters)
    row = next((row for row in table.to_pylist() if row["record"] == record), None)
    if row is None:
        return None
    return Place(split=split, blocks=_blocks(manifest, codes), **row)


def place_of_dropped(store: Store, manifest: DatasetManifest, record: str) -> list[Place]:
    """Every row that a rule of `data.curate` dropped when its record was this one."""
    if DROPPED not in _codes(store, manifest, record):
        return []
    return _dropped(store, manifest, pc.field("record") == record)


def duplicates_of(store: Store, manifest: DatasetManifest, record: str) -> list[Place]:
    """The dropped rows that are duplicates of this record."""
    if KEPT not in _codes(store, manifest, record):
        return []
    return _dropped(store, manifest, pc.ends_with(pc.field("reason"), f" of {record}"))


def of_subject(store: Store, manifest: DatasetManifest, subject: str) -> list[str]:
    """Ids of the records whose subject's HMAC is `subject` (`subject.subject_digest`), sorted."""
    low = int(subject[:SUBJECT_DIGITS], 16) << 32
    entries = _asked(store, manifest, lambda index: index.subjects.within(low, low | 0xFFFFFFFF))
    numbers = np.sort(entries & np.uint64(0xFFFFFFFF)).astype(np.int64)
    found, start = [], 0
    for path, count in _open(store, manifest.id).parts:
        mine = numbers[(numbers >= start) & (numbers < start + count)] - start
        if len(mine):
            with store.filesystem.open_input_file(store.path(f"datasets/{manifest.id}/{path}")) as stream:
                rows = list(_rows_at(pq.ParquetFile(stream), mine))
            found += [row["record"] for row in rows if row["subject"] == subject]
        start += count
    return sorted({*found, *_dropped_of(store, manifest, subject)})


def _dropped_of(store: Store, manifest: DatasetManifest, subject: str) -> Iterator[str]:
    for path in store.list(f"datasets/{manifest.id}/dropped"):
        with store.filesystem.open_input_file(store.path(path)) as stream:
            knows = "subject" in pq.read_schema(stream).names  # versions from before do not say whose a dropped row was
        if knows:
            where = pc.field("subject") == subject
            table = pq.read_table(store.path(path), columns=["record"], filesystem=store.filesystem, filters=where)
            yield from table.column("record").to_pylist()


def rows_with(store: Store, manifest: DatasetManifest, record: str, place: Place) -> list[int]:
    """The packed training rows that hold the record, by number; once for each time that it is inside."""
    if not place.blocks or "train" not in manifest.splits:
        return []
    rows = Rows.of(store, manifest, "train")
    shift = _shift(manifest)
    found = []
    for code in place.blocks:
        for block in range(code << shift, min((code + 1) << shift, _num_blocks(manifest))):
            for offset, inside in enumerate(rows.block_records(block)):
                found += [block * rows.block_rows + offset] * (record in inside)
    return sorted(found)


def is_record_id(text: str) -> bool:
    """Whether it is `rec_` and 24 digits of hex."""
    digits = text.removeprefix("rec_")
    return text != digits and len(digits) == RECORD_HEX and not digits.strip("0123456789abcdef")


def _codes(store: Store, manifest: DatasetManifest, record: str) -> set[int]:
    """Blocks and reserved values under the first digits of the id."""
    if not is_record_id(record):
        raise ConfigError(f"{record!r} is no record id", hint="`forge data show ds_…` prints them: rec_ and 24 digits")
    start = len("rec_")
    low = int(record[start : start + RECORD_DIGITS], 16) << BLOCK_BITS
    entries = _asked(store, manifest, lambda index: index.records.within(low, low | BLOCK_MASK))
    return {int(entry) & BLOCK_MASK for entry in entries}


def _blocks(manifest: DatasetManifest, codes: set[int]) -> tuple[int, ...]:
    return tuple(sorted(code for code in codes if code < FIRST_RESERVED))


def _dropped(store: Store, manifest: DatasetManifest, where: pc.Expression) -> list[Place]:
    columns = ["record", "reason", "file", "line", "offset"]
    found = []
    for path in store.list(f"datasets/{manifest.id}/dropped"):
        table = pq.read_table(store.path(path), columns=columns, filesystem=store.filesystem, filters=where)
        for row in table.to_pylist():
            kept = row["reason"].rpartition(" of rec_")[2] if " of rec_" in row["reason"] else ""
            found.append(Place(split="dropped", kept=f"rec_{kept}" if kept else "", **row))
    return found


def _rows_at(file: pq.ParquetFile, numbers: npt.NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """Rows of a file by number; reads only the row groups that they lie in."""
    start = 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        mine = numbers[(numbers >= start) & (numbers < start + count)] - start
        if len(mine):
            yield from file.read_row_group(group, columns=["record", "subject"]).take(pa.array(mine)).to_pylist()
        start += count


def _asked(store: Store, manifest: DatasetManifest, ask: Callable[[Index], T]) -> T:
    """What the index says; one that is absent or does not verify is built first."""
    try:
        return ask(_open(store, manifest.id))
    except (ForgeError, OSError, ValueError, KeyError):
        _open.cache_clear()
        build(store, manifest)
        return ask(_open(store, manifest.id))


@lru_cache(maxsize=128)
def _open(store: Store, dataset: str) -> Index:
    folder = store.fetch_dir(f"index/{dataset}", verify=False)
    about: dict[str, Any] = {}
    for entry in store.files(f"index/{dataset}"):
        path = folder / entry.path
        large = entry.path in ("records.npy", "subjects.npy")  # whose chunks are checked when they are read
        if path.stat().st_size != entry.size or (not large and sha256_file(path) != entry.sha256):
            raise StoreError(f"{path} is not what its manifest says", hint="remove the folder `index`")
    about = json.loads((folder / "about.json").read_bytes())
    if (about["format"], about["dataset"]) != (FORMAT, dataset):
        raise StoreError(f"{folder} is of {about}", hint="remove the folder `index`")
    parts = tuple((path, count) for path, count in about["parts"])
    return Index(_sorted(folder, "records"), _sorted(folder, "subjects"), parts)


def _sorted(folder: Path, name: str) -> Sorted:
    path = folder / f"{name}.npy"
    values = np.load(path, mmap_mode="r" if path.stat().st_size > SMALL else None, allow_pickle=False)
    return Sorted(values, np.load(folder / f"{name}-fences.npy", allow_pickle=False), str(path))


# ---------------------------------------------------------------- building


def build(store: Store, manifest: DatasetManifest) -> None:
    """Write the index of a dataset version; memory is a few times the index (16 bytes a record)."""
    packed = np.unique(np.concatenate([np.zeros(0, np.uint64), *_packed(store, manifest)]))
    known = np.unique(packed >> np.uint64(BLOCK_BITS))
    entries, subjects, parts, number = [packed], [np.zeros(0, np.uint64)], [], 0
    for split in SPLITS:
        for path in store.list(f"datasets/{manifest.id}/records/{split}"):
            table = pq.read_table(store.path(path), columns=["record", "subject"], filesystem=store.filesystem)
            ids = _digits(table.column("record"), len("rec_"), RECORD_DIGITS)
            if split == "train":
                entries.append(_entries(ids[~_among(ids, known)], UNPACKED))
            else:
                entries.append(_entries(ids, VALIDATION if split == "validation" else TEST))
            there = np.flatnonzero(table.column("subject").is_valid().to_numpy())
            whose = _digits(table.column("subject").drop_null(), 0, SUBJECT_DIGITS)
            subjects.append(whose << np.uint64(32) | (there + number).astype(np.uint64))
            parts.append([path.removeprefix(f"datasets/{manifest.id}/"), table.num_rows])
            number += table.num_rows
    entries += _of_dropped(store, manifest)
    write(store, manifest.id, np.unique(np.concatenate(entries)), np.unique(np.concatenate(subjects)), parts)


def write(store: Store, dataset: str, records: Uint64s, subjects: Uint64s, parts: list[list[Any]]) -> None:
    """Publish sorted entries as the index of a dataset."""
    with store.staged_dir(f"index/{dataset}") as folder:
        for name, values in (("records", records), ("subjects", subjects)):
            np.save(folder / f"{name}.npy", values.astype("<u8"), allow_pickle=False)
            np.save(folder / f"{name}-fences.npy", _fences(values), allow_pickle=False)
        (folder / "about.json").write_bytes(canonical_json({"format": FORMAT, "dataset": dataset, "parts": parts}))
    _open.cache_clear()


def _packed(store: Store, manifest: DatasetManifest) -> Iterator[Uint64s]:
    """One entry per record and block, shard after shard."""
    if "train" not in manifest.splits:
        return
    block_rows, shift, row = manifest.splits["train"].block_rows, _shift(manifest), 0
    for path in store.list(f"datasets/{manifest.id}/packed/train"):
        with store.filesystem.open_input_file(store.path(path)) as stream:
            found = [np.zeros(0, np.uint64)]
            for batch in pq.ParquetFile(stream).iter_batches(BATCH_ROWS, columns=["records"]):
                column = batch.column("records")
                rows = np.repeat(np.arange(row, row + len(column)), pc.list_value_length(column).to_numpy())
                ids = _digits(pa.chunked_array([column.flatten()]), len("rec_"), RECORD_DIGITS)
                found.append(_entries(ids, (rows // block_rows >> shift).astype(np.uint64)))
                row += len(column)
        yield np.unique(np.concatenate(found))


def _of_dropped(store: Store, manifest: DatasetManifest) -> Iterator[Uint64s]:
    for path in store.list(f"datasets/{manifest.id}/dropped"):
        table = pq.read_table(store.path(path), columns=["record", "reason"], filesystem=store.filesystem)
        yield _entries(_digits(table.column("record"), len("rec_"), RECORD_DIGITS), DROPPED)
        kept = pc.struct_field(pc.extract_regex(table.column("reason"), DUPLICATE), "kept")
        yield _entries(_digits(kept.drop_null(), len("rec_"), RECORD_DIGITS), KEPT)


def _entries(ids: Uint64s, code: int | Uint64s) -> Uint64s:
    return ids << np.uint64(BLOCK_BITS) | np.asarray(code, np.uint64)


def _among(ids: Uint64s, known: Uint64s) -> npt.NDArray[np.bool_]:
    if not len(known):
        return np.zeros(len(ids), bool)
    return np.asarray(known[np.searchsorted(known, ids).clip(max=len(known) - 1)] == ids)


HEX = np.full(256, 255, np.uint8)
HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16, dtype=np.uint8)


def _digits(column: pa.ChunkedArray, start: int, count: int) -> Uint64s:
    """`count` hex digits of each string, from the character `start`, as numbers."""
    cut = pc.utf8_slice_codeunits(column.cast(pa.string()), start, start + count).combine_chunks()
    if not len(cut):
        return np.zeros(0, np.uint64)
    ends = np.frombuffer(cut.buffers()[1], np.int32)[cut.offset : cut.offset + len(cut) + 1]
    values = HEX[np.frombuffer(cut.buffers()[2], np.uint8)[ends[0] : ends[-1]]]
    if (np.diff(ends) != count).any() or (values > 15).any():
        raise DataError("a record id or a subject of the dataset is not hex", hint="restore the dataset, or build it again")
    found = np.zeros(len(cut), np.uint64)
    for digit in values.reshape(-1, count).T:
        found = found << np.uint64(4) | digit
    return found


def _fences(values: Uint64s) -> npt.NDArray[Any]:
    fences = np.zeros(-(-len(values) // CHUNK), FENCE)
    for number in range(len(fences)):
        chunk = values[number * CHUNK : (number + 1) * CHUNK]
        fences[number] = (chunk[0], np.frombuffer(_digest(chunk), "<u8"))
    return fences


def _digest(entries: Uint64s) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(entries, "<u8").tobytes()).digest()[:16]


def _num_blocks(manifest: DatasetManifest) -> int:
    stats = manifest.splits["train"]
    return -(-stats.num_rows // stats.block_rows)


def _shift(manifest: DatasetManifest) -> int:
    """Blocks of a dataset with more of them than 24 bits can number share an entry, in groups of a power of two."""
    shift = 0
    while _num_blocks(manifest) >> shift >= FIRST_RESERVED:
        shift += 1
    return shift
