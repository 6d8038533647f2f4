"""Records of a dataset version → a file for other tools."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.data.dataset.version import records
from forge_ray.data.record.schema import DataRecord
from forge_ray.data.record.tables import ARROW, to_arrow
from forge_ray.errors import ConfigError
from forge_ray.records import DatasetManifest
from forge_ray.store.files import Store


def export(store: Store, manifest: DatasetManifest, splits: tuple[str, ...], target: Path) -> int:
    """Write the records of `splits` to `target` and return how many: JSONL of their contents, or Parquet with the typed
    columns of their kind. The file appears when it is complete."""
    if target.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"{target.name} ends in neither .jsonl nor .parquet", hint="forge data export ds_… rows.jsonl")
    tables = (table for split in splits for table in records(store, manifest, split, ["kind", "content"]))
    aside = target.with_name(f".{target.name}.part")
    try:
        count = _jsonl(tables, aside) if target.suffix == ".jsonl" else _parquet(tables, aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return count


def _jsonl(tables: Iterator[pa.Table], target: Path) -> int:
    count = 0
    with target.open("w", encoding="utf-8") as out:
        for table in tables:
            out.writelines(content + "\n" for content in table.column("content").to_pylist())
            count += table.num_rows
    return count


def _parquet(tables: Iterator[pa.Table], target: Path) -> int:
    count, kind = 0, ""
    with ExitStack() as stack:
        for table in tables:
            rows = [DataRecord(json.loads(row["content"]), row["kind"]) for row in table.to_pylist()]
            kinds = {row.kind for row in rows} | ({kind} if kind else set())
            if len(kinds) > 1:
                raise ConfigError(
                    f"a Parquet file has the columns of one kind, and these are {' and '.join(sorted(kinds))}",
                    hint="export to .jsonl",
                )
            if not kind and rows:
                kind = kinds.pop()
                writer = stack.enter_context(pq.ParquetWriter(target, ARROW[kind], compression="zstd"))
            if rows:
                writer.write_table(to_arrow(rows))
            count += len(rows)
    if not count:
        pq.write_table(pa.table({}), target)
    return count
