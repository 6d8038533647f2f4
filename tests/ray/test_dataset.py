"""Building a dataset on Ray Data: the same rows give the same id, none is lost, and each can be traced to its line."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.config.data import DataConfig
from forge_ray.data.build.build import build as build_dataset
from forge_ray.data.build.build import index_sources
from forge_ray.data.build.settings import input_digest
from forge_ray.data.dataset import version as dataset
from forge_ray.data.dataset.order import order_of
from forge_ray.data.dataset.stream import Feed, Rows, local_batches, ray_batches
from forge_ray.data.dataset.version import tokenizer_digest
from forge_ray.data.read.ingest import expand, index_file
from forge_ray.data.record.schema import parse_record
from forge_ray.data.tokens.chat import encode
from forge_ray.errors import DataError, NotFound
from forge_ray.records import DatasetManifest, ModelVersion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store, verify_files

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

QUESTION = {"role": "user", "content": "?"}
BAD_LINES = {
    5: (b'{"messages": [', "not JSON"),
    17: (b'{"text": "caf\xe9"}', "not UTF-8"),
    18: (b'{"messages": [{"role": "user", "content": "?"}]}', "no assistant turn to train on"),
    40: (
        json.dumps({"messages": [QUESTION, {"role": "assistant", "content": "x" * 3000}]}).encode(),
        "longer than sequence_length",
    ),
}


def chat(number: int) -> dict[str, Any]:
    answer = {"role": "assistant", "content": f"answer {number}"}
    return {"messages": [{"role": "user", "content": f"question {number} " + "why " * (number % 7)}, answer]}


@pytest.fixture(scope="module")
def base(store: Store) -> ModelVersion:
    with Catalog.open(store) as catalog:
        return catalog.model("tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 chats in JSONL with four bad lines between them, 60 more in Parquet, 20 plain texts, 10 duplicates, no Parquet."""
    folder = tmp_path_factory.mktemp("rows")
    numbers = iter(range(150))
    lines = [BAD_LINES[n][0] if n in BAD_LINES else json.dumps(chat(next(numbers))).encode() for n in range(1, 155)]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    pq.write_table(pa.Table.from_pylist([chat(n) for n in range(150, 210)]), folder / "b.parquet", row_group_size=25)
    texts = [{"text": f"text {n}: " + "the quick brown fox " * (n * 3)} for n in range(20)]
    (folder / "c.jsonl").write_text("\n".join(json.dumps(value) for value in texts + [chat(n) for n in range(10)]) + "\n")
    (folder / "d.parquet").write_bytes(b"this is no Parquet file")
    (folder / "e.jsonl").write_bytes(b"")
    return folder


def good_rows() -> list[dict[str, Any]]:
    texts = [{"text": f"text {n}: " + "the quick brown fox " * (n * 3)} for n in range(20)]
    return [chat(n) for n in range(210)] + texts


def config_of(folder: Path, **more: Any) -> DataConfig:
    values = {
        "sources": [{"path": f"{folder}/*.jsonl"}, {"path": f"{folder}/*.parquet"}],
        "sequence_length": 256,
        "block_rows": 4,
        "max_invalid_fraction": 0.1,
        "splits": {"validation": 0.1, "test": 0.2},
    }
    return DataConfig.model_validate(values | more)


def build(config: DataConfig, base: ModelVersion, store: Store) -> DatasetManifest:
    return build_dataset("rows", config, base, store, index_sources(config))


def split_of(record: str, config: DataConfig) -> str:
    return dataset.SPLITS[dataset.split_of(bytes.fromhex(record.removeprefix("rec_")), config.splits)]


@pytest.fixture(scope="module")
def built(folder: Path, base: ModelVersion, store: Store) -> DatasetManifest:
    return build(config_of(folder), base, store)


def packed(store: Store, manifest: DatasetManifest, split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in store.list(f"datasets/{manifest.id}/packed/{split}"):
        rows += pq.read_table(store.path(path), filesystem=store.filesystem).to_pylist()
    return rows


def visible(store: Store) -> list[str]:
    root = Path(store.root) / "datasets"
    return sorted(path.name for path in root.iterdir()) if root.exists() else []


def test_files_on_disk_match_the_manifest(built: DatasetManifest, store: Store) -> None:
    folder = store.local(f"datasets/{built.id}")
    assert store.files(f"datasets/{built.id}") == built.files
    verify_files(folder, built.files)
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert on_disk == {entry.path for entry in built.files} | {"MANIFEST.json"}
    assert not [name for name in visible(store) if name.startswith(".")]


def test_every_valid_row_is_in_exactly_one_split(built: DatasetManifest, store: Store) -> None:
    expected = Counter(parse_record(value).id for value in good_rows())
    assert set(expected.values()) == {1}
    counts: Counter[str] = Counter()
    for split in dataset.SPLITS:
        rows = dataset.read_records(store, built, split)
        assert rows
        assert built.splits[split].num_records == len(rows)
        assert {split_of(row["record"], config_of(Path())) for row in rows} == {split}
        for row in rows:
            assert parse_record(row["content"]).id == row["record"]
        counts.update(row["record"] for row in rows)
    assert counts == expected
    assert built.num_duplicates == 10


def test_every_document_is_packed_exactly_once_and_unchanged(
    built: DatasetManifest, store: Store, base: ModelVersion
) -> None:
    tokenizer = dataset.load_tokenizer(store, base.id)
    for split in dataset.SPLITS:
        expected = Counter(
            (row["record"], tuple(document.ids), tuple(document.loss_mask))
            for row in dataset.read_records(store, built, split)
            for document in encode(tokenizer, parse_record(row["content"]), 256, "reject")
        )
        counts: Counter[Any] = Counter()
        rows = packed(store, built, split)
        for row in rows:
            segments = np.array(row["segment_ids"])
            for segment, record in enumerate(row["records"], start=1):
                inside = segments == segment
                counts[record, tuple(np.array(row["input_ids"])[inside]), tuple(np.array(row["loss_mask"])[inside])] += 1
        assert counts == expected
        stats = built.splits[split]
        assert stats.num_rows == len(rows)
        assert stats.num_tokens == sum(len(ids) for _, ids, _ in counts)
        assert stats.num_trained_tokens == sum(sum(mask) for _, _, mask in counts)
    assert any(len(document) > 1 for document in _documents_of_one_text(built, store))


def _documents_of_one_text(built: DatasetManifest, store: Store) -> list[list[str]]:
    """The rows that each record is in: a long text is in several."""
    where: dict[str, list[str]] = {}
    for split in dataset.SPLITS:
        for number, row in enumerate(packed(store, built, split)):
            for record in row["records"]:
                where.setdefault(record, []).append(f"{split}/{number}")
    return list(where.values())


def test_quarantine_records_location_and_reason(built: DatasetManifest, store: Store, folder: Path) -> None:
    quarantined = {}
    for path in store.list(f"datasets/{built.id}/quarantine"):
        for row in pq.read_table(store.path(path), filesystem=store.filesystem).to_pylist():
            quarantined[Path(row["file"]).name, row["line"]] = row
    data = (folder / "a.jsonl").read_bytes()
    for number, (raw, reason) in BAD_LINES.items():
        row = quarantined.pop(("a.jsonl", number))
        assert row["reason"] == reason
        assert data[row["offset"] :].split(b"\n", 1)[0] == raw
        assert row["raw_sha256"] == hashlib.sha256(raw).hexdigest()
    assert quarantined.pop(("d.parquet", 1))["reason"] == "unreadable Parquet file"
    assert not quarantined
    assert built.rejects == dict(Counter([*(reason for _, reason in BAD_LINES.values()), "unreadable Parquet file"]))
    counts = {Path(source.path).name: (source.num_records, source.num_rejected) for source in built.sources}
    assert counts == {"a.jsonl": (150, 4), "b.parquet": (60, 0), "c.jsonl": (30, 0), "d.parquet": (0, 1), "e.jsonl": (0, 0)}


def test_same_rows_give_the_same_id(
    built: DatasetManifest, folder: Path, base: ModelVersion, store: Store, tmp_path: Path
) -> None:
    """In another folder and store, cut into chunks of two or three lines."""
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    config = config_of(moved)
    sources = [index_file(f.path, f.name, f.format, f.source, chunk_bytes=300) for f in expand(config)]
    assert sum(len(source.chunks) for source in sources) > 50
    other = Store(str(tmp_path / "store"))
    with Catalog.open(store) as here, Catalog.open(other) as there:
        shutil.copytree(store.local(f"models/{base.id}"), other.local(f"models/{base.id}"))
        there.put(here.model("tiny"))
    again = build_dataset("another name", config, base, other, sources)
    assert again.id == built.id
    assert again.splits == built.splits
    here_it_lies = [index_file(f.path, f.name, f.format, f.source) for f in expand(config_of(folder))]
    digest = input_digest(config_of(folder), here_it_lies, tokenizer_digest(base), "")  # nothing erased
    assert again.input_digest == digest
    for split in dataset.SPLITS:
        assert packed(other, again, split) == packed(store, built, split)


def test_different_rows_or_settings_give_another_id(
    built: DatasetManifest, folder: Path, base: ModelVersion, store: Store
) -> None:
    shuffled = build(config_of(folder, shuffle_seed=1), base, store)
    assert shuffled.id != built.id
    assert shuffled.splits["train"].num_records == built.splits["train"].num_records
    fewer = build(config_of(folder, sources=[{"path": f"{folder}/b.parquet"}]), base, store)
    assert fewer.id != built.id


@pytest.mark.parametrize("bad", ["too many", "all", "none"])
def test_too_many_invalid_rows_fail_and_leave_nothing(bad: str, base: ModelVersion, store: Store, tmp_path: Path) -> None:
    lines = {
        "too many": [*(json.dumps(chat(n)).encode() for n in range(96)), b"{", b"{", b"[]", b'{"text": ""}'],
        "all": [b"{"] * 7,
        "none": [],
    }[bad]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    message = {
        "too many": "4 of 100 rows are invalid, more than data.max_invalid_fraction=0.03: 2 × not JSON; 1 × ",
        "all": "none of 7 rows can be used: 7 × not JSON",
        "none": "none of 1 files has a row",
    }[bad]
    before = visible(store)
    with pytest.raises(DataError) as error:
        build(config_of(tmp_path, sources=[{"path": f"{tmp_path}/rows.jsonl"}], max_invalid_fraction=0.03), base, store)
    assert message in error.value.message
    where = {"too many": (97, 98, 99), "all": (1, 2, 3)}.get(bad)
    if where:
        assert error.value.message.endswith(f"(first: {', '.join(f'{tmp_path}/rows.jsonl line {line}' for line in where)})")
    assert error.value.hint
    assert visible(store) == before


def test_ray_batches_equal_local_batches(built: DatasetManifest, store: Store) -> None:
    """Both give the rows of the order, over the end of an epoch and from the middle of a window."""
    rows = Rows.of(store, built, "train")
    order = order_of(built, "train", 3, global_batch=4)
    num_steps = rows.num_rows // 4 + 3
    for rank, first_step in ((0, 0), (1, 3)):
        feed = Feed(rows, order, order.lanes(rank, 2), first_step, num_steps)
        steps = itertools.count(first_step)
        for step, local, remote in zip(steps, local_batches(feed), ray_batches(feed), strict=False):
            expected = rows.batch(order.rows_of(step, feed.lanes))
            for name, values in expected.items():
                assert np.array_equal(local[name], values)
                assert np.array_equal(remote[name], values)
        assert next(steps) == first_step + num_steps + 1


def test_record_leads_back_to_its_line(built: DatasetManifest, store: Store, folder: Path) -> None:
    rows = Rows.of(store, built, "train")
    ids = {record for record_rowds in rows.records(list(range(rows.num_rows))) for record in record_rowds}
    assert ids == {row["record"] for row in dataset.read_records(store, built, "train")}
    for number in (30, 149, 160):
        record = parse_record(chat(number)).id
        record_row = dataset.find_record(store, built, record)
        assert record_row["content"] == chat(number)
        assert record_row["split"] == split_of(record, config_of(folder))
        if number < 150:
            raw = (folder / Path(record_row["file"]).name).read_bytes()[record_row["offset"] :].split(b"\n", 1)[0]
            assert json.loads(raw) == chat(number)
        else:
            assert (Path(record_row["file"]).name, record_row["line"], record_row["offset"]) == (
                "b.parquet",
                number - 149,
                -1,
            )
    with pytest.raises(NotFound, match="rec_none is not in ds_"):
        dataset.find_record(store, built, "rec_none")
