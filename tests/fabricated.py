"""Dataset versions and runs without training: the same files and records as the stages write, of made-up content."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.config.base import resolved
from forge_ray.config.data import DataConfig
from forge_ray.config.train import TrainConfig
from forge_ray.data.dataset.version import PACKED, RECORDS, SPLITS, UNUSED, place
from forge_ray.data.record.schema import DataRecord
from forge_ray.records import (
    DatasetManifest,
    Deployment,
    EvalReport,
    Event,
    FileEntry,
    ModelVersion,
    RunRecord,
    SourceStats,
    SplitStats,
    files_digest,
)
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

LENGTH = 4


def record_of(number: int) -> DataRecord:
    return DataRecord({"text": f"what row {number} says"}, "text")


def dataset(
    catalog: Catalog,
    records: Sequence[DataRecord],
    rows: Sequence[Sequence[str]] | None = None,
    *,
    block_rows: int = 4,
    parts: int = 1,
    shards: Sequence[int] = (),
    subjects: dict[str, str] | None = None,
    dropped: Sequence[tuple[str, str]] = (),
    data: dict[str, Any] | None = None,
    name: str = "rows",
    mixture: Sequence[SourceStats] = (),
) -> DatasetManifest:
    """A dataset version of `records`. `rows`: ids inside each packed training row (default: one row a record); `shards`:
    rows of each shard but the last; `subjects`: id → HMAC; `dropped`: (id, reason)."""
    config = DataConfig.model_validate({"sources": [{"path": "rows.jsonl"}], "block_rows": block_rows} | (data or {}))
    places = {record.id: place(record, config) for record in records}
    by_split: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for line, record in enumerate(records, start=1):
        split, key = places[record.id]
        by_split[SPLITS[split]].append(
            {
                "key": key,
                "record": record.id,
                "kind": record.kind,
                "source": 0,
                "subject": (subjects or {}).get(record.id),
                "flags": "",
                "file": "rows.jsonl",
                "line": line,
                "offset": line * 10,
                "content": record.json,
            }
        )
    if rows is None:
        rows = [[row["record"]] for row in by_split["train"]]
    num_rows = {"train": len(rows), "validation": len(by_split["validation"]), "test": len(by_split["test"])}
    stats = {
        split: SplitStats(
            num_records=len(by_split[split]),
            num_rows=num_rows[split],
            num_tokens=1,
            num_trained_tokens=1,
            rows_digest=repr(rows) if split == "train" else "",
            block_rows=block_rows,
            shard_rows=(*shards, num_rows[split] - sum(shards)) if split == "train" else (num_rows[split],),
        )
        for split in SPLITS
    }
    manifest = DatasetManifest(
        name=name,
        format=2,
        input_digest="",
        config=resolved(config),
        tokenizer_digest="",
        base_model="",
        sources=(),
        mixture=tuple(mixture),
        splits=stats,
        num_duplicates=0,
        rejects={},
        sequence_length=LENGTH,
    ).sealed()
    folder = Path(catalog.store.root) / "datasets" / manifest.id
    for split, split_rows in by_split.items():
        for number in range(parts if split_rows else 0):
            in_part = [row for row in split_rows if row["key"] * parts >> 64 == number]
            table = pa.Table.from_pylist(sorted(in_part, key=lambda row: row["key"]), RECORDS)
            write(folder / f"records/{split}/part-{number:05d}.parquet", table, 8)
    start = 0
    for number, count in enumerate(stats["train"].shard_rows):
        inside = [list(row) for row in rows[start : start + count]]
        write(folder / f"packed/train/shard-{number:05d}.parquet", packed(inside), block_rows)
        start += count
    if dropped:
        lines = [
            {"rule": 0, "reason": why, "record": record, "file": "rows.jsonl", "line": 900 + i, "offset": 0, "content": "{}"}
            for i, (record, why) in enumerate(dropped)
        ]
        write(folder / "dropped/part-00000.parquet", pa.Table.from_pylist(lines, UNUSED), 64)
    return catalog.put(manifest)


def packed(rows: list[list[str]]) -> pa.Table:
    values = [[0] * LENGTH] * len(rows)
    columns = {"input_ids": values, "loss_mask": values, "segment_ids": values, "records": rows}
    return pa.table(columns | {"sources": [[0] * len(row) for row in rows]}, schema=PACKED)


def write(path: Path, table: pa.Table, group_rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group_rows)


def train_config(**more: Any) -> dict[str, Any]:
    return resolved(TrainConfig.model_validate({"global_batch": 2, "micro_batch_size": 1} | more))


def run(catalog: Catalog, name: str, dataset: str, base: str = "", num_steps: int = 5, **more: Any) -> RunRecord:
    settings = more.pop("train", None) or train_config()
    values: dict[str, Any] = {
        "id": f"run_{name}",
        "name": name,
        "method": "sft",
        "config": {"train": settings},
        "config_digest": "",
        "dataset": dataset,
        "base_model": base,
        "base_digest": "",
        "seed": settings["seed"],
        "num_steps": num_steps,
        "samples_seen": num_steps * settings["global_batch"],
        "order_digest": "",
        "attempts": (),
        "code_digest": "",
        "environment": {},
        "metrics": {},
        "export": (),
        "export_kind": "full",
    }
    return catalog.put(RunRecord(**values | more))


def version(catalog: Catalog, name: str, run: str = "", base: str = "", **more: Any) -> ModelVersion:
    files = (FileEntry(path="model.safetensors", size=1, sha256=name),)
    values: dict[str, Any] = {
        "name": name,
        "status": "accepted" if run else "imported",
        "weights": "full",
        "files": files,
        "files_digest": files_digest(files),
        "base_model": base,
        "run": run,
        "licence": "apache-2.0",
    }
    return catalog.put(ModelVersion(**values | more).sealed())


def report(catalog: Catalog, subject: str, dataset: str, split: str = "test", **more: Any) -> EvalReport:
    values: dict[str, Any] = {
        "subject": subject,
        "subject_digest": "",
        "dataset": dataset,
        "split": split,
        "config": {},
        "num_examples": 1,
        "metrics": {},
        "per_class": {},
        "items_sha256": "",
    }
    return catalog.put(EvalReport(**values | more).sealed())


def deployment(catalog: Catalog, name: str, version: str, state: str = "running", **config: Any) -> Deployment:
    record = catalog.put(
        Deployment(
            name=name,
            model=name,
            model_version=version,
            model_digest="",
            config={"published": False} | config,
            config_digest="",
        ).sealed()
    )
    catalog.append(Event(kind="deployment", subject=record.id, data={"state": state, "name": name}))
    return record


def pick(rng: random.Random, values: Sequence[Any], least: int = 0) -> list[Any]:
    return rng.sample(list(values), rng.randint(least, len(values)))


def store_at(path: Path) -> Store:
    return Store(str(path))
