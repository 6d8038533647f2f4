"""Build a dataset version on Ray Data, and open one (level 2).

    files → index → chunks → rows (record | reject) → group by (split, partition) → pack → shards → DatasetManifest

A record's split and partition are functions of its content, and so is the order inside a partition; shards are cut from the
partitions laid end to end. So the same input and config give the same id on any machine, at any parallelism.

    datasets/<id>/packed/<split>/shard-00000.parquet    rows of `sequence_length` tokens; one row group = one block
    datasets/<id>/records/<split>/part-00000.parquet    the records themselves, with file, line and byte offset
    datasets/<id>/quarantine/part-00000.parquet         every row that was not used, with the reason
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.config.base import resolved
from forge_ray.config.data import DataConfig
from forge_ray.data.chat import encode
from forge_ray.data.ingest import Chunk, IndexedFile, Row, expand, index_file, read_chunk
from forge_ray.data.pack import Document, PackedRow, pack
from forge_ray.data.schema import Reject
from forge_ray.errors import DataError, NotFound
from forge_ray.records import DatasetManifest, FileEntry, ModelVersion, SourceFile, SplitStats, canonical_json, digest
from forge_ray.store import MANIFEST, Store

FORMAT = 1
PARTITION_LINES = 8192  # records packed together; fixed, for it decides the rows
SHARD_BLOCKS = 64
SPLITS = ("train", "validation", "test")
QUARANTINE = "quarantine"
TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")

ROWS = pa.schema(
    [
        ("group", pa.string()),
        ("key", pa.string()),
        ("record", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("offset", pa.int64()),
        ("content", pa.string()),
        ("reason", pa.string()),
        ("raw_sha256", pa.string()),
        ("ids", pa.list_(pa.list_(pa.int32()))),
        ("loss_mask", pa.list_(pa.list_(pa.int8()))),
    ]
)
PACKED = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.int8())),
        ("segment_ids", pa.list_(pa.int32())),
        ("records", pa.list_(pa.string())),
    ]
)


def tokenizer_digest(model: ModelVersion) -> str:
    """Over the files that decide ids and templates."""
    return digest(sorted((f.path, f.sha256) for f in model.files if f.path.startswith(TOKENIZER_FILES)))


def split_of(record: str, config: DataConfig) -> str:
    """A pure function of the record, so that a row never moves when the data grows."""
    share = int.from_bytes(hashlib.sha256(f"split/{record}".encode()).digest()[:8], "big") / 2**64
    if share < config.splits.test:
        return "test"
    return "validation" if share < config.splits.test + config.splits.validation else "train"


def shuffle_key(record: str, config: DataConfig) -> str:
    """16 hex digits that order the records."""
    return hashlib.sha256(f"shuffle/{config.shuffle_seed}/{record}".encode()).hexdigest()[:16]


def input_digest(config: DataConfig, sources: list[IndexedFile], tokenizer: str) -> str:
    """What decides a dataset, known before it is built."""
    content = {key: value for key, value in resolved(config).items() if key != "sources"}
    return digest([FORMAT, content, sorted(source.sha256 for source in sources), tokenizer])


def index_sources(config: DataConfig) -> list[IndexedFile]:
    """Digest and chunk every source file, one task a file."""
    import ray.data

    files = [{"path": path, "name": name, "format": format} for path, name, format in expand(config)]
    found = ray.data.from_items(files, override_num_blocks=len(files)).map(_index_row).take_all()
    parsed = (json.loads(row["indexed"]) for row in found)
    indexed = [IndexedFile(**{**item, "chunks": tuple(Chunk(**chunk) for chunk in item["chunks"])}) for item in parsed]
    return sorted(indexed, key=lambda item: item.name)


def _index_row(row: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    return {"indexed": json.dumps(asdict(index_file(row["path"], row["name"], row["format"])))}


def build(name: str, config: DataConfig, base: ModelVersion, store: Store, sources: list[IndexedFile]) -> DatasetManifest:
    """Encode, pack and write the dataset; needs an initialised Ray. Nothing is visible until it is complete."""
    import ray.data

    started = time.monotonic()
    inputs = input_digest(config, sources, tokenizer_digest(base))
    staging = f"datasets/.building-{inputs[-16:]}-{time.time_ns()}"
    num_partitions = max(1, -(-sum(source.num_lines for source in sources) // PARTITION_LINES))
    chunks = [{"chunk": json.dumps(vars(chunk))} for source in sources for chunk in source.chunks]
    if not chunks:
        raise DataError(f"none of {len(sources)} files has a row", hint="check data.sources")
    pad_id = _pad_id(load_tokenizer(store, base.id))
    try:
        rows = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
            partial(_encode_chunk, config=config, base=base.id, store=store, num_partitions=num_partitions),
            batch_size=1,
            batch_format="pyarrow",
        )
        groups = rows.groupby("group", num_partitions=min(num_partitions * 4, 64)).map_groups(
            partial(_write_group, config=config, pad_id=pad_id, store=store, to=staging), batch_format="pyarrow"
        )
        summaries = [json.loads(row["summary"]) for row in groups.take_all()]
        _check_invalid(config, summaries)
        stats, files = _write_shards(config, store, staging, summaries)
        files += [FileEntry(**entry) for summary in summaries for entry in summary["files"]]
        manifest = _manifest(name, config, base, inputs, sources, summaries, stats, files)
        manifest = manifest.model_copy(update={"seconds": round(time.monotonic() - started, 3)})
        _publish(store, staging, manifest)
        return manifest
    finally:
        store.delete_dir(staging)


def _check_invalid(config: DataConfig, summaries: list[dict[str, Any]]) -> None:
    rejected: Counter[str] = Counter()
    for summary in summaries:
        rejected.update(summary["reasons"])
    used = sum(summary["num_records"] + summary["num_duplicates"] for summary in summaries)
    total = used + rejected.total()
    table = "; ".join(f"{count} × {reason}" for reason, count in rejected.most_common(8))
    if not used:
        raise DataError(f"none of {total} rows can be used: {table}", hint="see docs/data.md for the accepted shapes")
    if rejected.total() > config.max_invalid_fraction * total:
        raise DataError(
            f"{rejected.total()} of {total} rows are invalid, more than"
            f" data.max_invalid_fraction={config.max_invalid_fraction}: {table}",
            hint="repair the rows, or raise data.max_invalid_fraction if these may be left out",
        )
    if not any(summary["split"] == "train" and summary["num_records"] for summary in summaries):
        raise DataError(f"no row of {used} falls into the train split", hint="add rows, or lower data.splits")


@lru_cache(maxsize=2)
def load_tokenizer(store: Store, model: str) -> Any:
    """The tokenizer of a model version."""
    return load_tokenizer_dir(store.fetch_dir(f"models/{model}", verify=False))


def load_tokenizer_dir(folder: Path) -> Any:
    """From local files only, no remote code."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _encode_chunk(batch: pa.Table, config: DataConfig, base: str, store: Store, num_partitions: int) -> Iterator[pa.Table]:
    tokenizer = load_tokenizer(store, base)
    for text in batch.column("chunk").to_pylist():
        rows = [_encode_row(row, tokenizer, config, num_partitions) for row in read_chunk(Chunk(**json.loads(text)))]
        yield pa.Table.from_pylist(rows, schema=ROWS)


def _encode_row(row: Row, tokenizer: Any, config: DataConfig, num_partitions: int) -> dict[str, Any]:
    value: dict[str, Any] = {"file": row.file, "line": row.line, "offset": row.offset, "raw_sha256": row.raw_sha256}
    reason = row.reason
    if row.record is not None:
        try:
            documents = encode(tokenizer, row.record, config.sequence_length, config.overlong)
            record = row.record.id
            key = shuffle_key(record, config)
            partition = int(key, 16) * num_partitions >> 64
            return value | {
                "group": f"{split_of(record, config)}/{partition:05d}",
                "key": key,
                "record": record,
                "content": row.record.json,
                "ids": [document.ids for document in documents],
                "loss_mask": [document.loss_mask for document in documents],
            }
        except Reject as error:
            reason = str(error)
    partition = int(hashlib.sha256(f"{row.file}/{row.line}".encode()).hexdigest()[:16], 16) * num_partitions >> 64
    return value | {"group": f"{QUARANTINE}/{partition:05d}", "key": "", "reason": reason}


def _write_group(table: pa.Table, config: DataConfig, pad_id: int, store: Store, to: str) -> dict[str, Any]:
    """One (split, partition): deduplicate, write the records, pack; returns one row with what was counted."""
    table = table.sort_by([("key", "ascending"), ("record", "ascending"), ("file", "ascending"), ("line", "ascending")])
    split, partition = table.column("group")[0].as_py().split("/")
    rows = table.to_pylist()
    summary: dict[str, Any] = {"split": split, "partition": int(partition), "num_records": 0, "num_duplicates": 0}
    if split == QUARANTINE:
        kept = table.select(["file", "line", "offset", "reason", "raw_sha256"])
        entry = _write_parquet(store, to, f"{QUARANTINE}/part-{partition}.parquet", kept, len(rows))
        reasons, files = Counter(row["reason"] for row in rows), Counter(row["file"] for row in rows)
        summary |= {"reasons": dict(reasons), "rejected": dict(files), "accepted": {}, "files": [entry], "num_rows": 0}
        return {"summary": [json.dumps(summary)]}

    first = [i for i, row in enumerate(rows) if i == 0 or row["record"] != rows[i - 1]["record"]]
    unique = [rows[i] for i in first]
    records = table.take(first).select(["record", "file", "line", "offset", "content"])
    documents = [
        Document(row["record"], ids, mask) for row in unique for ids, mask in zip(row["ids"], row["loss_mask"], strict=True)
    ]
    packed = pack(documents, config.sequence_length, pad_id)
    _write_parquet(store, to, f"parts/{split}/{partition}.parquet", _packed_table(packed), 256)
    summary |= {
        "num_records": len(unique),
        "num_duplicates": len(rows) - len(unique),
        "num_rows": len(packed),
        "num_tokens": sum(int((row.segment_ids > 0).sum()) for row in packed),
        "num_trained_tokens": sum(int(row.loss_mask.sum()) for row in packed),
        "reasons": {},
        "rejected": {},
        "accepted": dict(Counter(row["file"] for row in rows)),
        "files": [_write_parquet(store, to, f"records/{split}/part-{partition}.parquet", records, 1024)],
    }
    return {"summary": [json.dumps(summary)]}


def _packed_table(rows: list[PackedRow]) -> pa.Table:
    columns = {
        "input_ids": [row.input_ids for row in rows],
        "loss_mask": [row.loss_mask for row in rows],
        "segment_ids": [row.segment_ids for row in rows],
        "records": [row.records for row in rows],
    }
    return pa.table({name: pa.array(value, PACKED.field(name).type) for name, value in columns.items()}, schema=PACKED)


def _write_parquet(store: Store, folder: str, name: str, table: pa.Table, group_rows: int) -> dict[str, Any]:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=max(1, group_rows), compression="zstd")
    data = sink.getvalue().to_pybytes()
    store.write(f"{folder}/{name}", data)
    return FileEntry(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()).model_dump()


def _write_shards(
    config: DataConfig, store: Store, staging: str, summaries: list[dict[str, Any]]
) -> tuple[dict[str, SplitStats], list[FileEntry]]:
    """Cut the partitions, laid end to end, into shards of whole blocks; returns the stats per split and the files."""
    import ray.data

    shard_rows = config.block_rows * SHARD_BLOCKS
    jobs = []
    for split in SPLITS:
        parts = sorted((s["partition"], s["num_rows"]) for s in summaries if s["split"] == split)
        total = sum(count for _, count in parts)
        jobs += [
            {"job": json.dumps({"split": split, "shard": number, "start": start, "parts": parts})}
            for number, start in enumerate(range(0, total, shard_rows))
        ]
    written = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map(
        partial(_write_shard, config=config, store=store, staging=staging)
    )
    results = sorted((json.loads(row["result"]) for row in written.take_all()), key=lambda r: (r["split"], r["shard"]))
    store.delete_dir(f"{staging}/parts")
    stats = {}
    for split in SPLITS:
        mine = [summary for summary in summaries if summary["split"] == split]
        stats[split] = SplitStats(
            num_records=sum(s["num_records"] for s in mine),
            num_rows=sum(s["num_rows"] for s in mine),
            num_tokens=sum(s.get("num_tokens", 0) for s in mine),
            num_trained_tokens=sum(s.get("num_trained_tokens", 0) for s in mine),
            rows_digest=digest([r["digest"] for r in results if r["split"] == split]),
            block_rows=config.block_rows,
        )
    return stats, [FileEntry(**r["file"]) for r in results]


def _write_shard(row: dict[str, Any], config: DataConfig, store: Store, staging: str) -> dict[str, Any]:
    job = json.loads(row["job"])
    wanted = range(job["start"], job["start"] + config.block_rows * SHARD_BLOCKS)
    pieces, position = [], 0
    for partition, count in job["parts"]:
        low, high = max(wanted.start, position), min(wanted.stop, position + count)
        if low < high:
            path = store.path(f"{staging}/parts/{job['split']}/{partition:05d}.parquet")
            pieces.append(pq.read_table(path, filesystem=store.filesystem).slice(low - position, high - low))
        position += count
    table = pa.concat_tables(pieces)
    name = f"packed/{job['split']}/shard-{job['shard']:05d}.parquet"
    entry = _write_parquet(store, staging, name, table, config.block_rows)
    result = {"split": job["split"], "shard": job["shard"], "digest": _content_digest(table), "file": entry}
    return {"result": json.dumps(result)}


def _content_digest(table: pa.Table) -> str:
    """Over the values, not the Parquet bytes, nor how a reader batches them: another version gives the same digest."""
    hasher = hashlib.sha256()
    for name in ("input_ids", "loss_mask", "segment_ids"):
        for values in table.column(name).chunks:
            hasher.update(np.ascontiguousarray(values.flatten().to_numpy(zero_copy_only=False)).tobytes())
    hasher.update(canonical_json(table.column("records").to_pylist()))
    return hasher.hexdigest()


def _manifest(
    name: str,
    config: DataConfig,
    base: ModelVersion,
    inputs: str,
    sources: list[IndexedFile],
    summaries: list[dict[str, Any]],
    stats: dict[str, SplitStats],
    files: list[FileEntry],
) -> DatasetManifest:
    accepted: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for summary in summaries:
        accepted.update(summary["accepted"])
        rejected.update(summary["rejected"])
        reasons.update(summary["reasons"])
    return DatasetManifest(
        name=name,
        format=FORMAT,
        input_digest=inputs,
        config=resolved(config),
        tokenizer_digest=tokenizer_digest(base),
        base_model=base.id,
        sources=tuple(
            SourceFile(
                path=source.name,
                sha256=source.sha256,
                size=source.size,
                num_records=accepted[source.name],
                num_rejected=rejected[source.name],
            )
            for source in sources
        ),
        splits=stats,
        num_duplicates=sum(summary["num_duplicates"] for summary in summaries),
        rejects=dict(sorted(reasons.items())),
        sequence_length=config.sequence_length,
        files=tuple(sorted(files, key=lambda entry: entry.path)),
    ).sealed()


def _publish(store: Store, staging: str, manifest: DatasetManifest) -> None:
    """Move the files to their final place, the manifest last."""
    store.write(f"{staging}/{MANIFEST}", canonical_json({"files": [entry.model_dump() for entry in manifest.files]}))
    store.move_dir(staging, f"datasets/{manifest.id}")


def read_records(store: Store, manifest: DatasetManifest, split: str) -> list[dict[str, Any]]:
    """All records of a split, by record id: `record`, `file`, `line`, `offset`, `content` (decoded)."""
    rows: list[dict[str, Any]] = []
    for path in store.list(f"datasets/{manifest.id}/records/{split}"):
        rows += pq.read_table(store.path(path), filesystem=store.filesystem).to_pylist()
    for row in rows:
        row["content"] = json.loads(row["content"])
    return sorted(rows, key=lambda row: row["record"])


def first_records(store: Store, manifest: DatasetManifest, split: str, count: int) -> list[dict[str, Any]]:
    """A few records of a split in the order that is on disk, without reading the rest."""
    for path in store.list(f"datasets/{manifest.id}/records/{split}")[:1]:
        with store.filesystem.open_input_file(store.path(path)) as stream:
            rows = pq.ParquetFile(stream).read_row_group(0).slice(0, count).to_pylist()
        return [{**row, "content": json.loads(row["content"])} for row in rows]
    return []


def find_record(store: Store, manifest: DatasetManifest, record: str) -> dict[str, Any]:
    """One record of the dataset by id, with its split; raises `NotFound`."""
    for path in store.list(f"datasets/{manifest.id}/records", recursive=True):
        table = pq.read_table(store.path(path), filesystem=store.filesystem, filters=[("record", "==", record)])
        if table.num_rows:
            (row,) = table.to_pylist()
            return {**row, "content": json.loads(row["content"]), "split": path.split("/")[-2]}
    raise NotFound(f"{record} is not in {manifest.id}", hint=f"forge data show {manifest.id} lists record ids")
