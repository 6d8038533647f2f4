"""A dataset version: what its folder holds, and how it is read.

    datasets/<id>/packed/<split>/shard-00000.parquet    rows of `sequence_length` tokens; one row group = one block
    datasets/<id>/records/<split>/part-00000.parquet    the records, sorted by key, with file, line and byte offset
    datasets/<id>/dropped/part-00000.parquet            records that a rule of `data.curate` dropped, with the reason
    datasets/<id>/quarantine/part-00000.parquet         rows that never became a record, with the reason

A record's split and its place in the shuffled order are functions of its content: neither moves when the data grows, and a
record is found by its id with a look at one row group. With `data.splits.by: conversation` the split follows from how
the conversation begins, which an id does not tell, and a record is looked for in each split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from forge_ray.config.data import DataConfig, Splits
from forge_ray.data.record.conversation import opening_of
from forge_ray.data.record.schema import RECORD_HEX, DataRecord
from forge_ray.data.tokens.chat import load_tokenizer_dir
from forge_ray.data.tokens.template import ChatTokenizer
from forge_ray.data.tokens.text_tools import FORM_FILE, Tools
from forge_ray.errors import NotFound, StoreError
from forge_ray.models.model_files import mistral_tokenizer, require_mistral_common
from forge_ray.records import DatasetManifest, ModelVersion, digest
from forge_ray.store import paths
from forge_ray.store.files import Store

FORMAT = 2
SPLITS = ("train", "validation", "test")
TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    "tekken",
    FORM_FILE,
)

PACKED = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.int8())),
        ("segment_ids", pa.list_(pa.int32())),
        ("records", pa.list_(pa.string())),
        ("sources", pa.list_(pa.int16())),
    ]
)
# of judged answers, also a number per document: 1 or -1 of a feedback, a pair's margin (NaN where its row has none)
GRADED = PACKED.append(pa.field("grades", pa.list_(pa.float32())))
# of `data.form: labels`, also what each document is labelled
LABELLED = PACKED.append(pa.field("labels", pa.list_(pa.string())))
RECORDS = pa.schema(
    [
        ("key", pa.uint64()),
        ("record", pa.string()),
        ("kind", pa.string()),
        ("source", pa.int16()),
        ("subject", pa.string()),
        ("flags", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("offset", pa.int64()),
        ("content", pa.string()),
    ]
)
UNUSED = pa.schema(
    [
        ("rule", pa.int32()),
        ("reason", pa.string()),
        ("record", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("offset", pa.int64()),
        ("raw_sha256", pa.string()),
        ("subject", pa.string()),
        ("content", pa.string()),
    ]
)


def tokenizer_digest(model: ModelVersion) -> str:
    """Over the files that decide ids and templates."""
    return digest(sorted((f.path, f.sha256) for f in model.files if f.path.startswith(TOKENIZER_FILES)))


def require_tokenizer(store: Store, model: ModelVersion) -> None:
    """`ConfigError` where the model's tokenizer needs a package that is not installed; downloads nothing but its config."""
    own = mistral_tokenizer([f.path for f in model.files], lambda: store.read(paths.model(model.id, "config.json")))
    if own:
        require_mistral_common(own, model.id)


@lru_cache(maxsize=2)
def load_tokenizer(store: Store, model: str, date: str = "", tools: Tools = "template") -> ChatTokenizer:
    """The tokenizer of a model version; `date` and `tools` as in `load_tokenizer_dir`."""
    return load_tokenizer_dir(store.fetch_dir(paths.model(model), verify=False), date, tools)


def record_bytes(content: bytes) -> bytes:
    """The 12 bytes that a record id spells in hex, from its canonical JSON."""
    return hashlib.sha256(content).digest()[: RECORD_HEX // 2]


def split_of(decisive: bytes, splits: Splits) -> int:
    """The number of a split: a pure function of what decides (`decisive_bytes`), so that a row never moves when the data
    grows."""
    share = int.from_bytes(hashlib.sha256(b"split/" + decisive).digest()[:8], "big") / 2**64
    if share < splits.test:
        return SPLITS.index("test")
    return SPLITS.index("validation" if share < splits.test + splits.validation else "train")


def decisive_bytes(record: DataRecord, splits: Splits) -> bytes:
    """What decides the split of a record: its id, or the opening of its conversation where `splits.by` says so and it has
    one."""
    if splits.by == "conversation" and (opening := opening_of(record)):
        return opening
    return record_bytes(record.canonical)


def shuffle_key(record: bytes, seed: int) -> int:
    """64 bits that order the records."""
    return int.from_bytes(hashlib.sha256(b"shuffle/%d/" % seed + record).digest()[:8], "big")


def place(record: DataRecord, config: DataConfig) -> tuple[int, int]:
    """(split, key) of a record."""
    key = shuffle_key(record_bytes(record.canonical), config.shuffle_seed)
    return split_of(decisive_bytes(record, config.splits), config.splits), key


def places_of(record: bytes, config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(split, key) wherever a dataset version of these settings can hold the record: in one split, or in each of them where
    conversations are divided."""
    splits, key = Splits.model_validate(config["splits"]), shuffle_key(record, config["shuffle_seed"])
    return [(name, key) for name in (SPLITS if splits.by == "conversation" else (SPLITS[split_of(record, splits)],))]


def content_digest(table: pa.Table) -> str:
    """Over the values of packed rows, not the Parquet bytes, nor how a reader batches them."""
    hasher = hashlib.sha256()
    for name in ("input_ids", "loss_mask", "segment_ids"):
        for values in table.column(name).chunks:
            hasher.update(np.ascontiguousarray(values.flatten().to_numpy(zero_copy_only=False)).tobytes())
    hasher.update("\n".join(",".join(row) for row in table.column("records").to_pylist()).encode())
    for name in ("grades", "labels"):
        if name in table.column_names:
            hasher.update(repr(table.column(name).to_pylist()).encode())
    return hasher.hexdigest()


def listed(store: Store, manifest: DatasetManifest, name: str) -> list[str]:
    """The files of one folder of a dataset version, sorted. Raises `StoreError` where they are not those that its record
    names: a file more would be read as if it belonged to it. A version whose rows were erased has none."""
    there = store.list(paths.dataset(manifest.id, name))
    named = {paths.dataset(manifest.id, entry.path) for entry in manifest.files if entry.path.rpartition("/")[0] == name}
    if manifest.files and there and (different := sorted(named.symmetric_difference(there))):
        raise StoreError(
            f"{different[0]} is {'missing' if different[0] in named else 'not one of the files'} of {manifest.id}",
            hint="restore it from a backup" if different[0] in named else "remove it",
        )
    return there


def records(store: Store, manifest: DatasetManifest, split: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The records of a split, part after part, each sorted by key."""
    for path in listed(store, manifest, f"records/{split}"):
        yield pq.read_table(store.path(path), filesystem=store.filesystem, columns=columns)


def read_records(store: Store, manifest: DatasetManifest, split: str) -> list[dict[str, Any]]:
    """All records of a split, by record id: `record`, `file`, `line`, `offset`, `content` (decoded)."""
    rows = [_decoded(row) for table in records(store, manifest, split) for row in table.to_pylist()]
    return sorted(rows, key=lambda row: row["record"])


def first_records(store: Store, manifest: DatasetManifest, split: str, count: int) -> list[dict[str, Any]]:
    """A few records of a split in the order that is on disk, without reading the rest."""
    for path in listed(store, manifest, f"records/{split}")[:1]:
        with store.filesystem.open_input_file(store.path(path)) as stream:
            return [_decoded(row) for row in pq.ParquetFile(stream).read_row_group(0).slice(0, count).to_pylist()]
    return []


def find_record(store: Store, manifest: DatasetManifest, record: str) -> dict[str, Any]:
    """One record of the dataset by id, with its split; raises `NotFound`. Reads one row group of a split."""
    try:
        raw = bytes.fromhex(record.removeprefix("rec_"))
        for split, key in places_of(raw, manifest.config) if len(raw) * 2 == RECORD_HEX else ():
            if row := _find(store, manifest, split, key, record):
                return {**row, "split": split}
    except ValueError:
        pass
    raise NotFound(f"{record} is not in {manifest.id}", hint=f"forge data show {manifest.id} lists record ids")


def _find(store: Store, manifest: DatasetManifest, split: str, key: int, record: str) -> dict[str, Any] | None:
    files = listed(store, manifest, f"records/{split}")
    if not files:
        return None
    path = files[key * len(files) >> 64]  # the parts divide the keys evenly
    table = pq.read_table(
        store.path(path), filesystem=store.filesystem, filters=pc.field("key") == pa.scalar(key, pa.uint64())
    )
    return next((_decoded(row) for row in table.to_pylist() if row["record"] == record), None)


def find_subject(store: Store, manifest: DatasetManifest, subjects: Collection[str]) -> list[dict[str, Any]]:
    """Every record whose subject's HMAC is one of `subjects` (see `subject.subject_digest`), with its split."""
    rows = []
    for split in SPLITS if subjects else ():  # Arrow gives an empty list no type, and compares strings with no such list
        for path in listed(store, manifest, f"records/{split}"):
            table = pq.read_table(
                store.path(path), filesystem=store.filesystem, filters=pc.field("subject").isin(list(subjects))
            )
            rows += [{**_decoded(row), "split": split} for row in table.to_pylist()]
    return rows


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    row = {key: value for key, value in row.items() if key != "key"}
    return {**row, "content": json.loads(row["content"])}
