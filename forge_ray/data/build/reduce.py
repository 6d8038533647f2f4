"""The reduce stage: one partition of the shuffled keys → packed rows and records.

A partition is a range of keys of one split. Its task takes that run of rows from every part of the map stage, uses equal
records once, repeats them as the mixture says, packs, and writes whole blocks; the rows beyond go to the split's last shard.
The result is named by the records inside, so a partition that did not change is taken from the build before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.config.data import DataConfig
from forge_ray.data.build import mixture
from forge_ray.data.build.pack import Documents, PackedRows, pack_flat
from forge_ray.data.build.plan import PartitionTask, ReducePlan, TailTask, UnusedTask, reduce_plan
from forge_ray.data.build.summaries import Partition, PartitionSummary, SourceCounts, WorkFile
from forge_ray.data.build.work import WORK, once, read_batches
from forge_ray.data.dataset.version import GRADED, LABELLED, PACKED, RECORDS, SPLITS, UNUSED, content_digest, load_tokenizer
from forge_ray.data.tokens.labels import label_text
from forge_ray.data.tokens.proof import prove_packed
from forge_ray.data.tokens.units import UNITS
from forge_ray.errors import DataError
from forge_ray.records import FileEntry
from forge_ray.store.files import Store

RECORD_GROUP = 1024


@dataclass(frozen=True)
class Shard:
    """A shard that is in its place."""

    split: str
    num_rows: int
    digest: str  # of the rows
    file: FileEntry


def run_partition(task: PartitionTask, config: DataConfig, base: str, store: Store, mark: str = "") -> Partition:
    """A task of the reduce stage."""
    plan = reduce_plan(store, task.plan)
    table, copies = _load(store, plan, task)
    table, copies, num_duplicates = _once_each(table, copies)
    key = _key(table, copies, plan.settings)
    summary = once(store, key, PartitionSummary, lambda: _write(store, key, table, copies, plan, config, base), mark)
    return Partition(task.split, task.partition, num_duplicates, summary)


def _load(store: Store, plan: ReducePlan, task: PartitionTask) -> tuple[pa.Table, npt.NDArray[Any]]:
    """The rows of this partition with columns `rank` (order of reading) and `source` added, and each row's copy number."""
    num_partitions, is_train = task.num_partitions, SPLITS[task.split] == "train"
    epochs = np.array(plan.epochs, np.float64)
    rounds = mixture.num_copies(plan.epochs) if is_train else 1
    index = _batch_index(store, task.plan)
    tables, copies = [], []
    for copy in range(rounds):
        home = mixture.home_partition(task.partition, copy, num_partitions)
        low, high = -(-(home << 64) // num_partitions), -(-(home + 1 << 64) // num_partitions) - 1
        overlapping = index[(index["split"] == task.split) & (index["first"] <= high) & (index["last"] >= low)]
        for number in np.unique(overlapping["part"]).tolist():
            part = plan.parts[number]
            numbers = overlapping["batch"][overlapping["part"] == number].tolist()
            batches = read_batches(store, part.file.path, numbers)
            keys = np.concatenate([batch.column("key").to_numpy() for batch in batches])
            chunks = np.concatenate([batch.column("chunk").to_numpy() for batch in batches])
            sources = np.array([plan.chunks[rank].source for rank in part.chunks], np.int16)[chunks]
            keep = (keys >= np.uint64(low)) & (keys <= np.uint64(high))
            if is_train:
                keep &= mixture.used(keys, epochs[sources], copy)
            if keep.any():
                where = np.flatnonzero(keep)
                table = pa.Table.from_batches(batches).take(where)
                table = table.append_column("rank", pa.array(np.array(part.chunks, np.int64)[chunks[where]]))
                tables.append(table.append_column("source", pa.array(sources[where])))
                copies.append(np.full(len(where), copy, np.int64))
    if not tables:
        return pa.table({}), np.zeros(0, np.int64)
    return pa.concat_tables(tables).combine_chunks(), np.concatenate(copies)


@lru_cache(maxsize=2)
def _batch_index(store: Store, plan_name: str) -> npt.NDArray[Any]:
    """Every record batch of the map stage: in which part, of which split, with which keys."""
    rows = [
        (number, place, *batch)
        for number, part in enumerate(reduce_plan(store, plan_name).parts)
        for place, batch in enumerate(part.file.batches)
    ]
    kinds = [("part", np.int32), ("batch", np.int32), ("split", np.int8), ("first", np.uint64), ("last", np.uint64)]
    return np.array(rows, kinds)


def _once_each(table: pa.Table, copies: npt.NDArray[Any]) -> tuple[pa.Table, npt.NDArray[Any], int]:
    """In shuffled order, each (record, copy) once: the one that was read first. Duplicates of first copies are counted."""
    if not table.num_rows:
        return table, copies, 0
    keys = table.column("key").to_numpy()
    places = np.empty(len(keys), np.uint64)
    for copy in np.unique(copies).tolist():
        places[copies == copy] = mixture.copy_key(keys[copies == copy], copy)
    order = np.lexsort((table.column("line").to_numpy(), table.column("rank").to_numpy(), copies, keys, places))
    records, copies = _fixed(table.column("record"))[order], copies[order]
    same = np.zeros(len(records), bool)
    same[1:] = (records[1:] == records[:-1]).all(axis=1) & (copies[1:] == copies[:-1])
    num_duplicates = int((same & (copies == 0)).sum())
    return table.take(order[~same]), copies[~same], num_duplicates


def _key(table: pa.Table, copies: npt.NDArray[Any], settings: str) -> str:
    hasher = hashlib.sha256(settings.encode())
    if table.num_rows:
        for name in ("record", "rank", "line", "source"):
            hasher.update(np.ascontiguousarray(_fixed(table.column(name))).tobytes())
        for content in table.column("content").to_pylist():  # equal records may be written differently (`DataRecord.json`)
            hasher.update(content.encode())
        for name in ("subject", "flags"):
            hasher.update(json.dumps(table.column(name).dictionary_encode().combine_chunks().to_pylist()).encode())
        hasher.update(copies.tobytes())
    return "partition-" + hasher.hexdigest()[:32]


def _fixed(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column of numbers or of record ids as an array of numbers; ids are [n, 12] bytes."""
    if not pa.types.is_fixed_size_binary(column.type):
        numbers: npt.NDArray[Any] = column.to_numpy()
        return numbers
    array, width = column.combine_chunks(), column.type.byte_width
    data = np.frombuffer(array.buffers()[1], np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


def _write(
    store: Store, key: str, table: pa.Table, copies: npt.NDArray[Any], plan: ReducePlan, config: DataConfig, base: str
) -> PartitionSummary:
    if not table.num_rows:
        return PartitionSummary()
    once_only = np.flatnonzero(copies == 0)
    records = None
    if len(once_only):
        content = _records(table.drop_columns(["ids", "loss_mask", "lengths"]), once_only, plan)
        records = write_parquet(store, f"{WORK}/{key}-records.parquet", content, RECORD_GROUP)
    packed, counts = _packed(table, config, load_tokenizer(store, base).pad_id)
    num_rows = packed.num_rows // config.block_rows * config.block_rows
    blocks, blocks_digest, tail = None, "", ""
    if num_rows:
        whole = packed.slice(0, num_rows)
        blocks = write_parquet(store, f"{WORK}/{key}-packed.parquet", whole, config.block_rows)
        blocks_digest = content_digest(whole)
    if packed.num_rows > num_rows:
        tail = write_parquet(store, f"{WORK}/{key}-tail.parquet", packed.slice(num_rows), config.block_rows).path
    return PartitionSummary(
        num_records=len(once_only),
        num_rows=num_rows,
        tail_rows=packed.num_rows - num_rows,
        num_tokens=sum(count.num_tokens for count in counts.values()),
        num_trained_tokens=sum(count.num_trained_tokens for count in counts.values()),
        records=records,
        packed=blocks,
        digest=blocks_digest,
        tail=tail,
        sources=counts,
    )


def _records(table: pa.Table, rows: npt.NDArray[np.int64], plan: ReducePlan) -> pa.Table:
    table = table.take(rows[np.argsort(table.column("key").to_numpy()[rows], kind="stable")])
    columns = {
        "key": table.column("key"),
        "record": pa.array(_names(table), pa.string()),
        "kind": table.column("kind"),
        "source": table.column("source"),
        "subject": table.column("subject"),
        "flags": table.column("flags"),
        "file": pa.array([plan.chunks[rank].name for rank in table.column("rank").to_pylist()], pa.string()),
        "line": table.column("line"),
        "offset": table.column("offset"),
        "content": table.column("content"),
    }
    return pa.table(columns, schema=RECORDS)


def _names(table: pa.Table) -> list[str]:
    return ["rec_" + value.hex() for value in table.column("record").to_pylist()]


def _packed(table: pa.Table, config: DataConfig, pad_id: int) -> tuple[pa.Table, dict[int, SourceCounts]]:
    """Packed rows, and per source the documents, tokens and trained tokens inside."""
    column = table.column("lengths").combine_chunks()
    lengths = column.flatten().to_numpy().astype(np.int64)
    owner = np.repeat(np.arange(table.num_rows), np.diff(column.offsets.to_numpy()))
    ids = table.column("ids").combine_chunks().flatten().to_numpy()
    mask = table.column("loss_mask").combine_chunks().flatten().to_numpy()
    units = _unit_sizes(table.column("kind").to_pylist(), np.diff(column.offsets.to_numpy()))
    rows = pack_flat(Documents(ids, mask, lengths), config.sequence_length, pad_id, units)
    if problems := prove_packed(rows.input_ids, rows.loss_mask, rows.segment_ids, pad_id):
        raise DataError(
            f"packing broke a loss mask: {'; '.join(problems[:3])}", hint="this is a bug: report it with the run file"
        )
    names, sources = _names(table), table.column("source").to_numpy()
    owners = [[int(owner[index]) for index in members] for members in rows.members]
    packed = packed_table(
        rows, [[names[i] for i in row] for row in owners], [[int(sources[i]) for i in row] for row in owners]
    )
    for field, values in _of_records(table, config):
        column = pa.array([[values[i] for i in row] for row in owners], field.type)
        packed = packed.append_column(field, column)
    return packed, _by_source(sources[owner], lengths, mask)


def _unit_sizes(kinds: list[str], num_documents: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Numbers of documents that stand in one row together, in the order of the records' documents."""
    size = np.array([UNITS.get(kind, 1) for kind in kinds], np.int64)
    return np.repeat(size, num_documents // size)


def _of_records(table: pa.Table, config: DataConfig) -> Iterator[tuple[pa.Field, list[Any]]]:
    """More columns of packed rows, a value per record: of judged answers their number (`GRADED`), with `data.form: labels`
    the label (`LABELLED`)."""
    contents = map(json.loads, table.column("content").to_pylist())  # one at a time, where a value is taken
    if config.form == "labels":
        yield LABELLED.field("labels"), [label_text(content) for content in contents]
    elif table.column("kind")[0].as_py() in ("preference", "feedback"):
        numbers = [float(2 * one["label"] - 1) if "label" in one else float(one.get("margin", "nan")) for one in contents]
        yield GRADED.field("grades"), numbers


def packed_table(rows: PackedRows, records: list[list[str]], sources: list[list[int]]) -> pa.Table:
    """Packed rows as they are stored; per row the records inside and the source of each."""
    arrays = {
        "input_ids": _lists(rows.input_ids, pa.int32()),
        "loss_mask": _lists(rows.loss_mask, pa.int8()),
        "segment_ids": _lists(rows.segment_ids, pa.int32()),
        "records": pa.array(records, PACKED.field("records").type),
        "sources": pa.array(sources, PACKED.field("sources").type),
    }
    return pa.table(arrays, schema=PACKED)


def _by_source(sources: npt.NDArray[Any], lengths: npt.NDArray[Any], mask: npt.NDArray[Any]) -> dict[int, SourceCounts]:
    if not len(lengths):
        return {}
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    trained = np.add.reduceat(mask.astype(np.int64), starts) - mask[starts]  # a document's first token is no target
    counts = {}
    for source in np.unique(sources).tolist():
        from_source = sources == source
        counts[source] = SourceCounts(
            num_documents=int(from_source.sum()),
            num_tokens=int(lengths[from_source].sum()),
            num_trained_tokens=int(trained[from_source].sum()),
        )
    return counts


def _lists(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1), kind))


def write_parquet(store: Store, path: str, table: pa.Table, group_rows: int) -> WorkFile:
    """Write `table` at `path` of the store."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=max(1, group_rows), compression="zstd", compression_level=1)
    data = sink.getvalue()
    store.write(path, data)
    return WorkFile(path, data.size, hashlib.sha256(data).hexdigest())


def run_tail(tail: TailTask, config: DataConfig, store: Store) -> Shard:
    """The last shard of a split: what the partitions left beyond their whole blocks, in their order."""
    tables = [pq.read_table(store.path(path), filesystem=store.filesystem) for path in tail.parts]
    table = pa.concat_tables(tables)
    file = write_parquet(store, f"{tail.folder}/{tail.name}", table, config.block_rows)
    entry = FileEntry(path=tail.name, size=file.size, sha256=file.sha256)
    return Shard(tail.split, table.num_rows, content_digest(table), entry)


def run_unused(task: UnusedTask, store: Store) -> list[FileEntry]:
    """Rows that some jobs did not use → one file of the quarantine and one of the dropped records."""
    plan = reduce_plan(store, task.plan)
    tables: dict[str, list[pa.Table]] = {"quarantine": [], "dropped": []}
    for number in task.jobs:
        unused = plan.unused[number]
        for batch in read_batches(store, unused.path):
            names = np.array([plan.chunks[rank].name for rank in unused.chunks], object)
            table = pa.Table.from_batches([batch])
            file = pa.array(names[table.column("chunk").to_numpy()].tolist(), pa.string())
            table = table.append_column("file", file)
            if "subject" not in table.column_names:  # of a piece that an earlier version left in the work area
                table = table.append_column("subject", pa.nulls(table.num_rows, pa.string()))
            table = table.select(UNUSED.names).cast(UNUSED)
            invalid = table.column("rule").to_numpy() < 0
            tables["quarantine"].append(table.filter(pa.array(invalid)))
            tables["dropped"].append(table.filter(pa.array(~invalid)))
    entries = []
    for folder, pieces in tables.items():
        table = pa.concat_tables(pieces)
        if table.num_rows:
            name = f"{folder}/part-{task.part:05d}.parquet"
            if folder == "quarantine":
                table = table.drop_columns(["rule", "record", "subject", "content"])
            file = write_parquet(store, f"{task.folder}/{name}", table, 16 * RECORD_GROUP)
            entries.append(FileEntry(path=name, size=file.size, sha256=file.sha256))
    return entries
