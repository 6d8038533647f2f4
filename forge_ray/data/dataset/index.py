"""Which blocks of a dataset version hold a record, and which records are a person's: answered without reading it.

    index/<ds>/records.bin      sorted, 7 bytes each: 36 bits of the record id ‖ 20 of the packed block, or a reserved value
    index/<ds>/subjects.bin     sorted, 8 bytes each: 32 bits of the subject's HMAC ‖ 32 of the row's number in records/
    index/<ds>/*-fences.npy     first entries and digests of the chunks: see `sorted_numbers`
    index/<ds>/about.json       format, dataset, rows of each part of records/

Derived from records/, packed/ and dropped/ alone: it may be removed, and is built again where it is absent or does not
verify. A look-up is two searches, one among the fences and one in a chunk whose digest is checked first; nothing else is
read, of a remote store neither. What it finds are candidates, for ids are cut short; they are checked against the dataset's
rows, so none is wrong and none is missing.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from forge_ray.data.dataset.sorted_numbers import Sorted, Uint64s, write_sorted
from forge_ray.data.dataset.stream import Rows
from forge_ray.data.dataset.version import SPLITS, listed, places_of
from forge_ray.data.record.schema import RECORD_HEX
from forge_ray.errors import ConfigError, DataError, ForgeError, StoreError
from forge_ray.records import DatasetManifest, canonical_json
from forge_ray.store import paths
from forge_ray.store.files import Store

__all__ = ["Place", "build", "dropped", "duplicates", "is_record_id", "of_subject", "places", "rows_with"]

FORMAT = 2
BLOCK_BITS = 20
BLOCK_MASK = (1 << BLOCK_BITS) - 1
RECORD_DIGITS, SUBJECT_DIGITS = 9, 8  # hex digits that an entry keeps
MOST_ROWS = 1 << 32  # of records/ that an entry of subjects can number
WIDTHS = {"records": 7, "subjects": 8}  # bytes of an entry
# Reserved values in the place of a block: the record is held out, is in no packed row, was dropped, or is the one that stays
# of some that were dropped as its duplicates.
VALIDATION, TEST, UNPACKED, DROPPED, KEPT = (BLOCK_MASK - number for number in range(5))
FIRST_RESERVED = KEPT
BATCH_ROWS = 1 << 14
DUPLICATE = re.compile(r" of (?P<kept>rec_[0-9a-f]{24})$")
FOUND = ["record", "source", "file", "line", "offset"]
T = TypeVar("T")
BUILDING = threading.Lock()  # one at a time, for its memory


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


@dataclass(frozen=True)
class Index:
    records: Sorted
    subjects: Sorted
    parts: tuple[tuple[str, int], ...]  # files of records/ and their rows, in the order of row numbers


# ---------------------------------------------------------------- look-ups


def places(store: Store, manifest: DatasetManifest, records: Collection[str]) -> list[Place]:
    """Where those of the records are that the dataset holds, with the blocks that may hold them; by record."""
    codes = {record: values for record, values in _codes(store, manifest, records).items() if values - {DROPPED, KEPT}}
    if not codes:
        return []
    parts = _parts_by_split(_open(store, manifest.id))
    keys_by_file: dict[tuple[str, str], dict[int, None]] = {}
    for record in codes:
        for split, key in places_of(bytes.fromhex(record.removeprefix("rec_")), manifest.config):
            if files := parts[split]:  # which divide the keys evenly
                keys_by_file.setdefault((split, files[key * len(files) >> 64]), {})[key] = None
    held = []
    for (split, path), keys in keys_by_file.items():
        where = pc.field("key").isin(pa.array(keys, pa.uint64()))
        table = pq.read_table(
            store.path(paths.dataset(manifest.id, path)), columns=FOUND, filesystem=store.filesystem, filters=where
        )
        for row in table.to_pylist():
            if row["record"] in codes:
                held.append(Place(split=split, blocks=_blocks(codes[row["record"]]), **row))
    return sorted(held, key=lambda place: place.record)


def dropped(store: Store, manifest: DatasetManifest, records: Collection[str]) -> list[Place]:
    """Every row that a rule of `data.curate` dropped when its record was one of these."""
    dropped_ids = [record for record, codes in _codes(store, manifest, records).items() if DROPPED in codes]
    return _dropped(store, manifest, "record", dropped_ids) if dropped_ids else []


def duplicates(store: Store, manifest: DatasetManifest, records: Collection[str]) -> list[Place]:
    """The dropped rows that are duplicates of one of these records (`kept`)."""
    kept_ids = [record for record, codes in _codes(store, manifest, records).items() if KEPT in codes]
    return _dropped(store, manifest, "kept", kept_ids) if kept_ids else []


def of_subject(store: Store, manifest: DatasetManifest, subject: str) -> list[str]:
    """Ids of the records whose subject's HMAC is `subject` (`subject.subject_digest`), sorted."""
    low = np.array([int(subject[:SUBJECT_DIGITS], 16) << 32], np.uint64)
    _, entries = _asked(store, manifest, lambda index: index.subjects.within(low, 0xFFFFFFFF))
    numbers = np.sort(entries & np.uint64(0xFFFFFFFF)).astype(np.int64)
    owned, start = [], 0
    for path, count in _open(store, manifest.id).parts:
        in_file = numbers[(numbers >= start) & (numbers < start + count)] - start
        if len(in_file):
            with store.filesystem.open_input_file(store.path(paths.dataset(manifest.id, path))) as stream:
                rows = list(_rows_at(pq.ParquetFile(stream), in_file))
            owned += [row["record"] for row in rows if row["subject"] == subject]
        start += count
    return sorted({*owned, *_dropped_of(store, manifest, subject)})


def _dropped_of(store: Store, manifest: DatasetManifest, subject: str) -> Iterator[str]:
    for path in listed(store, manifest, "dropped"):
        with store.filesystem.open_input_file(store.path(path)) as stream:
            knows = "subject" in pq.read_schema(stream).names  # versions from before do not say whose a dropped row was
        if knows:
            where = pc.field("subject") == subject
            table = pq.read_table(store.path(path), columns=["record"], filesystem=store.filesystem, filters=where)
            yield from table.column("record").to_pylist()


def rows_with(store: Store, manifest: DatasetManifest, held_at: Iterable[Place]) -> dict[str, list[int]]:
    """Record → numbers of the packed training rows that hold it, ascending, for those that are in one."""
    if "train" not in manifest.splits:
        return {}
    rows, shift, num_blocks = Rows.of(store, manifest, "train"), _shift(manifest), _num_blocks(manifest)
    asked: dict[int, set[str]] = {}
    for place in held_at:
        for code in place.blocks:
            for block in range(code << shift, min((code + 1) << shift, num_blocks)):
                asked.setdefault(block, set()).add(place.record)
    held: dict[str, list[int]] = {}
    for block in sorted(asked):
        for offset, inside in enumerate(rows.block_records(block)):
            for record in asked[block].intersection(inside):
                held.setdefault(record, []).append(block * rows.block_rows + offset)
    return held


def is_record_id(text: str) -> bool:
    """Whether it is `rec_` and 24 digits of hex."""
    digits = text.removeprefix("rec_")
    return text != digits and len(digits) == RECORD_HEX and not digits.strip("0123456789abcdef")


def _codes(store: Store, manifest: DatasetManifest, records: Collection[str]) -> dict[str, set[int]]:
    """Record → blocks and reserved values under the first digits of its id; only those that have any."""
    if wrong := [record for record in records if not is_record_id(record)]:
        raise ConfigError(f"{wrong[0]!r} is no record id", hint="`forge data show ds_…` prints them: rec_ and 24 digits")
    ordered, start = sorted(set(records)), len("rec_")
    lows = np.array([int(record[start : start + RECORD_DIGITS], 16) << BLOCK_BITS for record in ordered], np.uint64)
    owners, entries = _asked(store, manifest, lambda index: index.records.within(lows, BLOCK_MASK))
    codes: dict[str, set[int]] = {}
    for owner, entry in zip(owners.tolist(), entries.tolist(), strict=True):
        codes.setdefault(ordered[owner], set()).add(entry & BLOCK_MASK)
    return codes


def _blocks(codes: set[int]) -> tuple[int, ...]:
    return tuple(sorted(code for code in codes if code < FIRST_RESERVED))


def _parts_by_split(index: Index) -> dict[str, list[str]]:
    return {split: [path for path, _ in index.parts if path.startswith(f"records/{split}/")] for split in SPLITS}


def _dropped(store: Store, manifest: DatasetManifest, column: str, records: list[str]) -> list[Place]:
    """Rows of dropped/ whose `record`, or the one that stays for them (`kept`), is one of `records`."""
    columns, rows = ["record", "reason", "file", "line", "offset"], []
    ends = pa.array([f" of {record}" for record in records])
    for path in listed(store, manifest, "dropped"):
        table = pq.read_table(store.path(path), columns=columns, filesystem=store.filesystem)
        if column == "kept":
            matches = pc.is_in(pc.utf8_slice_codeunits(table.column("reason"), -len(f" of {records[0]}")), value_set=ends)
        else:
            matches = pc.is_in(table.column("record"), value_set=pa.array(records))
        for row in table.filter(matches).to_pylist():
            kept = DUPLICATE.search(row["reason"])
            rows.append(Place(split="dropped", kept=kept["kept"] if kept else "", **row))
    return rows


def _rows_at(file: pq.ParquetFile, numbers: npt.NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """Rows of a file by number; reads only the row groups that they lie in."""
    start = 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        in_group = numbers[(numbers >= start) & (numbers < start + count)] - start
        if len(in_group):
            yield from file.read_row_group(group, columns=["record", "subject"]).take(pa.array(in_group)).to_pylist()
        start += count


def _asked(store: Store, manifest: DatasetManifest, ask: Callable[[Index], T]) -> T:
    """What the index says; one that is absent or does not verify is built first."""
    try:
        return ask(_open(store, manifest.id))
    except (ForgeError, OSError, ValueError, KeyError):
        with BUILDING:
            build(store, manifest)
        return ask(_open(store, manifest.id))


@lru_cache(maxsize=128)
def _open(store: Store, dataset: str) -> Index:
    read: dict[str, bytes] = {}
    for entry in store.files(paths.index(dataset)):
        path = paths.index(dataset, entry.path)
        if entry.path.endswith(".bin"):  # whose chunks are checked when they are read
            whole = store.size(path) == entry.size
        else:
            read[entry.path] = store.read(path)
            whole = hashlib.sha256(read[entry.path]).hexdigest() == entry.sha256
        if not whole:
            raise StoreError(f"{path} is not what its manifest says", hint="remove the folder `index`")
    about: dict[str, Any] = json.loads(read["about.json"])
    if (about["format"], about["dataset"]) != (FORMAT, dataset):
        raise StoreError(f"{paths.index(dataset)} is of {about}", hint="remove the folder `index`")
    arrays = {
        name: Sorted.of(store, paths.index(dataset, f"{name}.bin"), width, read[f"{name}-fences.npy"])
        for name, width in WIDTHS.items()
    }
    return Index(**arrays, parts=tuple((path, count) for path, count in about["parts"]))


# ---------------------------------------------------------------- building


def build(store: Store, manifest: DatasetManifest) -> None:
    """Write the index of a dataset version; memory is a few times the index (15 bytes a record). Raises `DataError` for ids
    that are not hex."""
    try:
        records, subjects, parts = _read(store, manifest)
    except ValueError as error:
        raise DataError(f"{manifest.id}: {error}", hint="restore the dataset, or build it again") from None
    write(store, manifest.id, records, subjects, parts)


def _read(store: Store, manifest: DatasetManifest) -> tuple[Uint64s, Uint64s, list[list[Any]]]:
    packed = np.unique(np.concatenate([np.zeros(0, np.uint64), *_packed(store, manifest)]))
    packed_ids = np.unique(packed >> np.uint64(BLOCK_BITS))
    entries, subjects, parts, number = [packed], [np.zeros(0, np.uint64)], [], 0
    for split in SPLITS:
        for path in listed(store, manifest, f"records/{split}"):
            table = pq.read_table(store.path(path), columns=["record", "subject"], filesystem=store.filesystem)
            ids = _digits(table.column("record"), len("rec_"), RECORD_DIGITS)
            if split == "train":
                entries.append(_entries(ids[~_among(ids, packed_ids)], UNPACKED))
            else:
                entries.append(_entries(ids, VALIDATION if split == "validation" else TEST))
            there = np.flatnonzero(table.column("subject").is_valid().to_numpy())
            whose = _digits(table.column("subject").drop_null(), 0, SUBJECT_DIGITS)
            subjects.append(whose << np.uint64(32) | (there + number).astype(np.uint64))
            parts.append([path.removeprefix(paths.dataset(manifest.id, "")), table.num_rows])
            number += table.num_rows
    entries += _of_dropped(store, manifest)
    if number > MOST_ROWS and any(map(len, subjects)):
        raise DataError(
            f"{manifest.id} has {number:,} records with subjects; the index of people numbers {MOST_ROWS:,}",
            hint="build several datasets, each of a part of the sources; each is traced and erased from alike",
        )
    return np.unique(np.concatenate(entries)), np.unique(np.concatenate(subjects)), parts


def write(store: Store, dataset: str, records: Uint64s, subjects: Uint64s, parts: list[list[Any]]) -> None:
    """Publish sorted entries as the index of a dataset."""
    with store.staged_dir(paths.index(dataset)) as folder:
        for name, values in (("records", records), ("subjects", subjects)):
            write_sorted(folder, name, values, WIDTHS[name])
        (folder / "about.json").write_bytes(canonical_json({"format": FORMAT, "dataset": dataset, "parts": parts}))
    _open.cache_clear()


def _packed(store: Store, manifest: DatasetManifest) -> Iterator[Uint64s]:
    """One entry per record and block, shard after shard."""
    if "train" not in manifest.splits:
        return
    block_rows, shift, row = manifest.splits["train"].block_rows, _shift(manifest), 0
    for path in listed(store, manifest, "packed/train"):
        with store.filesystem.open_input_file(store.path(path)) as stream:
            entries = [np.zeros(0, np.uint64)]
            for batch in pq.ParquetFile(stream).iter_batches(BATCH_ROWS, columns=["records"]):
                column = batch.column("records")
                rows = np.repeat(np.arange(row, row + len(column)), pc.list_value_length(column).to_numpy())
                ids = _digits(pa.chunked_array([column.flatten()]), len("rec_"), RECORD_DIGITS)
                entries.append(_entries(ids, (rows // block_rows >> shift).astype(np.uint64)))
                row += len(column)
        yield np.unique(np.concatenate(entries))


def _of_dropped(store: Store, manifest: DatasetManifest) -> Iterator[Uint64s]:
    for path in listed(store, manifest, "dropped"):
        table = pq.read_table(store.path(path), columns=["record", "reason"], filesystem=store.filesystem)
        yield _entries(_digits(table.column("record"), len("rec_"), RECORD_DIGITS), DROPPED)
        kept = pc.struct_field(pc.extract_regex(table.column("reason"), DUPLICATE.pattern), "kept")
        yield _entries(_digits(kept.drop_null(), len("rec_"), RECORD_DIGITS), KEPT)


def _entries(ids: Uint64s, code: int | Uint64s) -> Uint64s:
    return ids << np.uint64(BLOCK_BITS) | np.asarray(code, np.uint64)


def _among(ids: Uint64s, ascending: Uint64s) -> npt.NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(ids), bool)
    return np.asarray(ascending[np.searchsorted(ascending, ids).clip(max=len(ascending) - 1)] == ids)


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
        raise ValueError("a record id or a subject is not hex")
    numbers = np.zeros(len(cut), np.uint64)
    for digit in values.reshape(-1, count).T:
        numbers = numbers << np.uint64(4) | digit
    return numbers


def _num_blocks(manifest: DatasetManifest) -> int:
    stats = manifest.splits["train"]
    return -(-stats.num_rows // stats.block_rows)


def _shift(manifest: DatasetManifest) -> int:
    """Blocks of a dataset with more of them than 20 bits can number share an entry, in groups of a power of two."""
    shift = 0
    while _num_blocks(manifest) >> shift >= FIRST_RESERVED:
        shift += 1
    return shift
