"""How long `forge trace` takes, and how large its index is: 10 million records in each of 50 dataset versions.

    python benchmarks/trace.py [--records 10000000] [--versions 50] [--folder DIR]

The index of every version is written in full, each with its own entries; of records/ and packed/ only the files exist that
hold the record and the person who are looked for, in their real form and size. Every version has a run, a model version and
an alias. Each answer is timed in a process of its own, without its imports: cold, after the files were dropped from the page
cache (posix_fadvise), and warm, the second answer of the same process; `10000 rows more`: asked together with as many that
no version holds. Wants 4.5 GB of disk; subjects.bin is hard-linked.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.config.base import resolved
from forge_ray.config.data import DataConfig
from forge_ray.config.train import TrainConfig
from forge_ray.data.dataset import index
from forge_ray.data.dataset.version import PACKED, RECORDS, SPLITS, shuffle_key
from forge_ray.data.record.subject import subject_digest, subject_key
from forge_ray.records import DatasetManifest, FileEntry, ModelVersion, RunRecord, SplitStats, files_digest
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

BLOCK_ROWS, PER_ROW, LENGTH, PARTS = 64, 8, 64, 512
TARGET, PERSON = "rec_0123456789abcdef01234567", "customer 7"
SUBJECTS = "subjects.bin"

ASK = """
import json, random, sys, time
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.governance.trace import of_record, of_subject_value, trace
store, what, found, draw = Store(sys.argv[1]), sys.argv[2], [], random.Random(0)
others = [draw.getrandbits(96) for _ in range(int(what.partition(" ")[0]) if " " in what else 0)]
for _ in range(2):
    began = time.perf_counter()
    with Catalog.open(store) as catalog:
        if what == "subject":
            queries = [of_subject_value(catalog, sys.argv[3])]
        else:
            queries = [of_record(record) for record in (sys.argv[3], *map("rec_{:024x}".format, others))]
        answer = trace(catalog, queries)
    found.append(time.perf_counter() - began)
print(json.dumps({"cold": found[0], "warm": found[1], "affected": {k: len(v) for k, v in vars(answer.affected).items()}}))
"""


def manifest_of(config: DataConfig, number: int, num_records: int) -> DatasetManifest:
    num_rows = num_records // PER_ROW
    whole = max(1, num_rows // BLOCK_ROWS // PARTS) * BLOCK_ROWS
    shards = [whole] * (num_rows // whole)
    shards[-1] += num_rows - sum(shards)
    stats = {"num_tokens": 0, "num_trained_tokens": 0, "block_rows": BLOCK_ROWS}
    train = SplitStats(
        num_records=num_records, num_rows=num_rows, rows_digest=str(number), shard_rows=tuple(shards), **stats
    )
    empty = SplitStats(num_records=0, num_rows=0, rows_digest="", shard_rows=(), **stats)
    values = {
        "input_digest": "",
        "tokenizer_digest": "",
        "base_model": "",
        "sources": (),
        "num_duplicates": 0,
        "rejects": {},
    }
    return DatasetManifest(
        name=f"rows {number}",
        format=2,
        config=resolved(config),
        splits={split: train if split == "train" else empty for split in SPLITS},
        sequence_length=LENGTH,
        **values,
    ).sealed()


def write_version(catalog: Catalog, number: int, num_records: int, rng: np.random.Generator, subjects: Path) -> None:
    config = DataConfig.model_validate({"sources": [{"path": "x"}], "subject": {"field": "customer"}} | SETTINGS)
    store, manifest = catalog.store, manifest_of(config, number, num_records)
    stats = manifest.splits["train"]
    key, block = shuffle_key(bytes.fromhex(TARGET[4:]), 0), int(rng.integers(stats.num_rows // BLOCK_ROWS))
    ids = rng.integers(1 << 4 * index.RECORD_DIGITS, size=num_records, dtype=np.uint64)
    ids[0] = int(TARGET[4 : 4 + index.RECORD_DIGITS], 16)
    blocks = rng.integers(stats.num_rows // BLOCK_ROWS, size=num_records, dtype=np.uint64)
    blocks[0] = block
    counts = [num_records // PARTS + (part < num_records % PARTS) for part in range(PARTS)]
    part = key * PARTS >> 64
    folder = Path(store.root) / "datasets" / manifest.id
    at = write_records(folder / f"records/train/part-{part:05d}.parquet", counts[part], part, key, rng, store)
    for other in range(PARTS):  # where a look-up that is misled by the first digits of an id reads in vain
        if other != part:
            os.link(folder / f"records/train/part-{part:05d}.parquet", folder / f"records/train/part-{other:05d}.parquet")
    whose = int(subject_digest(subject_key(store, ""), PERSON)[:8], 16)
    entries = np.zeros(0, np.uint64)
    if not subjects.exists():
        entries = rng.integers(1 << 32, size=num_records, dtype=np.uint64) << np.uint64(32)
        entries |= np.arange(num_records, dtype=np.uint64)
        where = sum(counts[:part]) + at
        entries[where] = whose << 32 | where
    else:
        entries = np.fromfile(subjects, ">u8").astype(np.uint64)
    parts = [[f"records/train/part-{n:05d}.parquet", count] for n, count in enumerate(counts)]
    index.write(store, manifest.id, np.unique(ids << np.uint64(index.BLOCK_BITS) | blocks), np.sort(entries), parts)
    own = Path(store.root) / "index" / manifest.id / SUBJECTS
    if subjects.exists():
        own.unlink()
        os.link(subjects, own)
    else:
        os.link(own, subjects)
    write_shard(folder, stats, block)
    catalog.put(manifest)
    join(catalog, manifest.id, number)


SETTINGS: dict[str, Any] = {"splits": {"validation": 0, "test": 0}, "block_rows": BLOCK_ROWS}


def write_records(path: Path, count: int, part: int, key: int, rng: np.random.Generator, store: Store) -> int:
    """The part of records/ that holds the target; returns its row there. The person's row is the target's."""
    low, high = (part << 64) // PARTS, (part + 1 << 64) // PARTS - 1
    keys = np.sort(rng.integers(low, high, size=count, dtype=np.uint64))
    at = int(np.searchsorted(keys, np.uint64(key)))
    at = min(at, count - 1)
    keys[at] = key
    names = [f"rec_{value}" for value in _hex(rng, count)]
    names[at] = TARGET
    subjects = [value + "00000000" for value in _hex(rng, count)]
    subjects[at] = subject_digest(subject_key(store, ""), PERSON)
    text = json.dumps({"text": "a row of about the length that rows of chats have, " * 8})
    columns = {
        "key": keys,
        "record": names,
        "kind": ["text"] * count,
        "source": [0] * count,
        "subject": subjects,
        "flags": [""] * count,
        "file": ["rows.jsonl"] * count,
        "line": np.arange(count),
        "offset": np.arange(count),
        "content": [text] * count,
    }
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns, schema=RECORDS), path, row_group_size=1024, compression="zstd")
    return at


def write_shard(folder: Path, stats: SplitStats, block: int) -> None:
    """The shard of packed/ that holds the target's block; the target is in one of the block's rows."""
    start = 0
    for number, rows in enumerate(stats.shard_rows):
        if start <= block * BLOCK_ROWS < start + rows:
            inside = [[f"rec_{n * PER_ROW + i:024x}" for i in range(PER_ROW)] for n in range(rows)]
            inside[block * BLOCK_ROWS - start + 5][3] = TARGET
            values = [[1] * LENGTH] * rows
            columns = {"input_ids": values, "loss_mask": values, "segment_ids": values, "records": inside}
            path = folder / f"packed/train/shard-{number:05d}.parquet"
            path.parent.mkdir(parents=True)
            table = pa.table(columns | {"sources": [[0] * PER_ROW] * rows}, schema=PACKED)
            pq.write_table(table, path, row_group_size=BLOCK_ROWS, compression="zstd")
        start += rows


def _hex(rng: np.random.Generator, count: int) -> list[str]:
    return [rng.bytes(12).hex() for _ in range(count)]


def join(catalog: Catalog, dataset: str, number: int) -> None:
    """A run of three epochs on the version, a model version of it, and an alias."""
    settings = resolved(TrainConfig.model_validate({"global_batch": 128, "seed": number}))
    num_rows = catalog.get_as(DatasetManifest, dataset).splits["train"].num_rows
    steps = 3 * num_rows // 128
    record: dict[str, Any] = {"config": {"train": settings}, "config_digest": "", "dataset": dataset, "base_model": ""}
    record |= {"base_digest": "", "seed": number, "num_steps": steps, "samples_seen": steps * 128, "order_digest": ""}
    record |= {"attempts": (), "code_digest": "", "environment": {}, "metrics": {}, "export": (), "export_kind": "full"}
    run = catalog.put(RunRecord(id=f"run_{number:016x}", name="r", method="sft", **record))
    files = (FileEntry(path="model.safetensors", size=1, sha256=str(number)),)
    version = ModelVersion(
        name="v",
        status="accepted",
        weights="full",
        files=files,
        files_digest=files_digest(files),
        run=run.id,
        licence="apache-2.0",
    )
    promotion.promote(catalog, catalog.put(version.sealed()).id, f"alias{number}")


def forget(folder: Path) -> None:
    """Drop the store's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--versions", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="forge-trace-", dir=options.folder))
    try:
        store, rng = Store(str(folder / "store")), np.random.default_rng(0)
        with Catalog.open(store) as catalog:
            for number in range(options.versions):
                write_version(catalog, number, options.records, rng, folder / SUBJECTS)
        one = next((folder / "store/index").iterdir())
        size = sum(path.stat().st_size for path in one.iterdir())
        print(f"{options.records:,} records in each of {options.versions} versions")
        print(f"index: {size / options.records:.3f} bytes per record, {size / 1e6:.1f} MB per version")
        for what, value in (("record", TARGET), ("subject", PERSON), ("10000 rows more", TARGET)):
            forget(folder)
            done = subprocess.run(
                [sys.executable, "-c", ASK, store.root, what, value], capture_output=True, text=True, check=True
            )
            lookup = json.loads(done.stdout)
            print(f"{what}: {lookup['cold']:.3f} s cold, {lookup['warm']:.3f} s warm; {lookup['affected']}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
