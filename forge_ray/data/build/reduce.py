"""The reduce stage: one partition of the shuffled keys → packed rows and records.

A partition is a range of keys of one split. Its task takes that run of rows from every part of the map stage, uses equal
records once, repeats them as the mixture says, packs, and writes whole blocks; the rows beyond go to the split's last shard.
The result is named by the records inside, so a partition that did not change is taken from the build before.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.config.data import DataConfig
from forge_ray.data.build import mixture
from forge_ray.data.build.pack import Documents, PackedRows, pack_flat
from forge_ray.data.build.work import WORK, Summary, once, plan, read_batches
from forge_ray.data.dataset.version import PACKED, RECORDS, SPLITS, UNUSED, content_digest, load_tokenizer
from forge_ray.data.tokens.proof import prove_packed
from forge_ray.errors import DataError
from forge_ray.records import FileEntry
from forge_ray.store.files import Store

RECORD_GROUP = 1024


def run_partition(row: dict[str, Any], config: DataConfig, base: str, store: Store) -> dict[str, Any]:
    """A Ray Data map function over `{"plan", "split", "partition", "num_partitions"}`; returns the partition's summary."""
    shared = plan(store, row["plan"])
    split, partition, num_partitions = row["split"], row["partition"], row["num_partitions"]
    table, copies = _load(store, row["plan"], split, partition, num_partitions)
    table, copies, num_duplicates = _once_each(table, copies, shared)
    key = _key(table, copies, shared["settings"])
    summary = once(store, key, lambda: _write(store, key, table, copies, shared, config, base))
    found = {**summary, "split": split, "partition": partition, "num_duplicates": num_duplicates}
    return {"summary": json.dumps(found)}


def _load(
    store: Store, plan_name: str, split: int, partition: int, num_partitions: int
) -> tuple[pa.Table, npt.NDArray[Any]]:
    """The rows of this partition with columns `rank` (order of reading) and `source` added, and each row's copy number."""
    shared = plan(store, plan_name)
    epochs = np.array(shared["epochs"], np.float64)
    rounds = mixture.num_copies(shared["epochs"]) if SPLITS[split] == "train" else 1
    index = _batch_index(store, plan_name)
    tables, copies = [], []
    for copy in range(rounds):
        home = mixture.home_partition(partition, copy, num_partitions)
        low, high = -(-(home << 64) // num_partitions), -(-(home + 1 << 64) // num_partitions) - 1
        wanted = index[(index["split"] == split) & (index["first"] <= high) & (index["last"] >= low)]
        for number in np.unique(wanted["part"]).tolist():
            part = shared["parts"][number]
            batches = read_batches(store, part["path"], wanted["batch"][wanted["part"] == number].tolist())
            keys = np.concatenate([batch.column("key").to_numpy() for batch in batches])
            chunks = np.concatenate([batch.column("chunk").to_numpy() for batch in batches])
            sources = np.array([shared["chunks"][n]["source"] for n in part["chunks"]], np.int16)[chunks]
            keep = (keys >= np.uint64(low)) & (keys <= np.uint64(high))
            if SPLITS[split] == "train":
                keep &= mixture.used(keys, epochs[sources], copy)
            if keep.any():
                where = np.flatnonzero(keep)
                table = pa.Table.from_batches(batches).take(where)
                table = table.append_column("rank", pa.array(np.array(part["chunks"], np.int64)[chunks[where]]))
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
        for number, part in enumerate(plan(store, plan_name)["parts"])
        for place, batch in enumerate(part["batches"])
    ]
    kinds = [("part", np.int32), ("batch", np.int32), ("split", np.int8), ("first", np.uint64), ("last", np.uint64)]
    return np.array(rows, kinds)


def _once_each(table: pa.Table, copies: npt.NDArray[Any], shared: Any) -> tuple[pa.Table, npt.NDArray[Any], int]:
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
    store: Store, key: str, table: pa.Table, copies: npt.NDArray[Any], shared: Any, config: DataConfig, base: str
) -> Summary:
    summary: Summary = {"num_records": 0, "num_rows": 0, "tail_rows": 0, "num_tokens": 0, "num_trained_tokens": 0}
    summary |= {"files": {}, "digest": "", "tail": "", "sources": {}}
    if not table.num_rows:
        return summary
    once_only = np.flatnonzero(copies == 0)
    if len(once_only):
        summary["num_records"] = len(once_only)
        records = _records(table.drop_columns(["ids", "loss_mask", "lengths"]), once_only, shared)
        summary["files"]["records"] = write_parquet(store, f"{WORK}/{key}-records.parquet", records, RECORD_GROUP)
    packed, counts = _packed(table, config, load_tokenizer(store, base).pad_id)
    summary["sources"] = counts
    summary["num_tokens"] = sum(count["num_tokens"] for count in counts.values())
    summary["num_trained_tokens"] = sum(count["num_trained_tokens"] for count in counts.values())
    whole = packed.num_rows // config.block_rows * config.block_rows
    summary["num_rows"], summary["tail_rows"] = whole, packed.num_rows - whole
    if whole:
        blocks = packed.slice(0, whole)
        summary["files"]["packed"] = write_parquet(store, f"{WORK}/{key}-packed.parquet", blocks, config.block_rows)
        summary["digest"] = content_digest(blocks)
    if packed.num_rows > whole:
        write_parquet(store, f"{WORK}/{key}-tail.parquet", packed.slice(whole), config.block_rows)
        summary["tail"] = f"{WORK}/{key}-tail.parquet"
    return summary


def _records(table: pa.Table, rows: npt.NDArray[np.int64], shared: Any) -> pa.Table:
    table = table.take(rows[np.argsort(table.column("key").to_numpy()[rows], kind="stable")])
    columns = {
        "key": table.column("key"),
        "record": pa.array(_names(table), pa.string()),
        "kind": table.column("kind"),
        "source": table.column("source"),
        "subject": table.column("subject"),
        "flags": table.column("flags"),
        "file": pa.array([shared["chunks"][rank]["name"] for rank in table.column("rank").to_pylist()], pa.string()),
        "line": table.column("line"),
        "offset": table.column("offset"),
        "content": table.column("content"),
    }
    return pa.table(columns, schema=RECORDS)


def _names(table: pa.Table) -> list[str]:
    return ["rec_" + value.hex() for value in table.column("record").to_pylist()]


def _packed(table: pa.Table, config: DataConfig, pad_id: int) -> tuple[pa.Table, dict[str, dict[str, int]]]:
    """Packed rows, and per source the documents, tokens and trained tokens inside."""
    column = table.column("lengths").combine_chunks()
    lengths = column.flatten().to_numpy().astype(np.int64)
    owner = np.repeat(np.arange(table.num_rows), np.diff(column.offsets.to_numpy()))
    ids = table.column("ids").combine_chunks().flatten().to_numpy()
    mask = table.column("loss_mask").combine_chunks().flatten().to_numpy()
    rows = pack_flat(Documents(ids, mask, lengths), config.sequence_length, pad_id)
    if problems := prove_packed(rows.input_ids, rows.loss_mask, rows.segment_ids, pad_id):
        raise DataError(
            f"packing broke a loss mask: {'; '.join(problems[:3])}", hint="this is a bug: report it with the run file"
        )
    names, sources = _names(table), table.column("source").to_numpy()
    owners = [[int(owner[index]) for index in members] for members in rows.members]
    table = packed_table(
        rows, [[names[i] for i in row] for row in owners], [[int(sources[i]) for i in row] for row in owners]
    )
    return table, _by_source(sources[owner], lengths, mask)


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


def _by_source(sources: npt.NDArray[Any], lengths: npt.NDArray[Any], mask: npt.NDArray[Any]) -> dict[str, dict[str, int]]:
    if not len(lengths):
        return {}
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    trained = np.add.reduceat(mask.astype(np.int64), starts) - mask[starts]  # a document's first token is no target
    counts = {}
    for source in np.unique(sources).tolist():
        mine = sources == source
        counts[str(source)] = {
            "num_documents": int(mine.sum()),
            "num_tokens": int(lengths[mine].sum()),
            "num_trained_tokens": int(trained[mine].sum()),
        }
    return counts


def _lists(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1), kind))


def write_parquet(store: Store, path: str, table: pa.Table, group_rows: int) -> dict[str, Any]:
    """Write `table` at `path` of the store; returns its size and sha256."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=max(1, group_rows), compression="zstd", compression_level=1)
    data = sink.getvalue()
    store.write(path, data)
    return {"work": path, "size": data.size, "sha256": hashlib.sha256(data).hexdigest()}


def run_tail(row: dict[str, Any], config: DataConfig, store: Store) -> dict[str, Any]:
    """The last shard of a split: what the partitions left beyond their whole blocks, in their order."""
    tables = [pq.read_table(store.path(path), filesystem=store.filesystem) for path in json.loads(row["tails"])]
    table = pa.concat_tables(tables)
    file = write_parquet(store, f"{row['to']}/{row['name']}", table, config.block_rows)
    entry = FileEntry(path=row["name"], size=file["size"], sha256=file["sha256"]).model_dump()
    return {"split": row["split"], "rows": table.num_rows, "digest": content_digest(table), "entry": json.dumps(entry)}


def run_unused(row: dict[str, Any], store: Store) -> dict[str, Any]:
    """Rows that some jobs did not use → one file of the quarantine and one of the dropped records."""
    shared = plan(store, row["plan"])
    tables: dict[str, list[pa.Table]] = {"quarantine": [], "dropped": []}
    for number in json.loads(row["jobs"]):
        job = shared["unused"][number]
        for batch in read_batches(store, job["path"]):
            names = np.array([shared["chunks"][n]["name"] for n in job["chunks"]], object)
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
    for folder, found in tables.items():
        table = pa.concat_tables(found)
        if table.num_rows:
            name = f"{folder}/part-{row['part']:05d}.parquet"
            if folder == "quarantine":
                table = table.drop_columns(["rule", "record", "subject", "content"])
            file = write_parquet(store, f"{row['to']}/{name}", table, 16 * RECORD_GROUP)
            entries.append(FileEntry(path=name, size=file["size"], sha256=file["sha256"]).model_dump())
    return {"entries": json.dumps(entries)}


def source_counts(summaries: list[Summary]) -> dict[int, Counter[str]]:
    """Sums over partitions of what each source gave."""
    total: dict[int, Counter[str]] = {}
    for summary in summaries:
        for source, counts in summary["sources"].items():
            total.setdefault(int(source), Counter()).update(counts)
    return total
