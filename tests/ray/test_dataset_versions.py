"""Dataset versions over time: more files, other mixtures, a killed build, two builds at once, what changed between them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from forge_ray.config.data import DataConfig
from forge_ray.data.build import build as building
from forge_ray.data.build.build import build, index_sources
from forge_ray.data.build.prepare import prepare_version
from forge_ray.data.build.work import WORK
from forge_ray.data.dataset import version as dataset
from forge_ray.data.dataset.compare import diff, holders
from forge_ray.data.dataset.export import export
from forge_ray.data.dataset.stream import Rows
from forge_ray.data.record.schema import parse_record
from forge_ray.data.record.subject import subject_digest, subject_key
from forge_ray.data.tokens.lost import AS_TEXT, CALLS
from forge_ray.errors import ConfigError, DataError
from forge_ray.governance.trace import of_file, of_subject_value, trace
from forge_ray.records import DatasetManifest, ModelVersion
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store, verify_files

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def chat(number: int, **more: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": f"answer {number}"}
    return {"messages": [{"role": "user", "content": f"question {number} " + "why " * (number % 7)}, answer], **more}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(folder: Path, **more: Any) -> DataConfig:
    values = {"sources": [{"path": f"{folder}/*.jsonl"}], "sequence_length": 128, "block_rows": 4}
    return DataConfig.model_validate(values | more)


@pytest.fixture
def own(tmp_path: Path, store: Store) -> Store:
    """A store with the tiny model and nothing else."""
    fresh = Store(str(tmp_path / "store"))
    with Catalog.open(store) as here, Catalog.open(fresh) as there:
        base = here.model("tiny")
        store_dir = Path(store.root) / f"models/{base.id}"
        target = Path(fresh.root) / f"models/{base.id}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(store_dir)
        there.put(base)
        promotion.promote(there, base.id, "tiny")
    return fresh


@pytest.fixture
def base(own: Store) -> ModelVersion:
    with Catalog.open(own) as catalog:
        return catalog.model("tiny")


def prepare(config: DataConfig, base: ModelVersion, store: Store) -> DatasetManifest:
    return build("rows", config, base, store, index_sources(config))


def packed(store: Store, manifest: DatasetManifest, split: str = "train") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in store.list(f"datasets/{manifest.id}/packed/{split}"):
        rows += pq.read_table(store.path(path), filesystem=store.filesystem).to_pylist()
    return rows


def pieces(store: Store, start: str = "") -> dict[str, int]:
    """Finished pieces of the work area and when each was written."""
    folder = Path(store.root) / WORK
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(f"{start}*.json")}


def test_added_files_keep_finished_work_and_splits(
    tmp_path: Path, base: ModelVersion, own: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "PARTITION_RECORDS", 64)
    rows = tmp_path / "rows"
    rows.mkdir()
    for part in range(3):
        write(rows / f"{part}.jsonl", [chat(part * 200 + n) for n in range(200)])
    monkeypatch.setattr(building, "JOB_BYTES", 4000)  # a job per file
    first = prepare(config_of(rows), base, own)
    before = pieces(own)
    write(rows / "3.jsonl", [chat(10_000 + n) for n in range(3)])
    second = prepare(config_of(rows), base, own)
    after = pieces(own)
    assert before.items() <= after.items(), "finished work is not touched"
    jobs = [name for name in after.keys() - before.keys() if not name.startswith("partition-")]
    assert len(jobs) == 1, "only the new file is read"
    partitions = [name for name in before if name.startswith("partition-")]
    assert len(after.keys() - before.keys()) - 1 <= 3 < len(partitions), "only the new records' partitions are packed"

    splits = [
        {row["record"]: split for split in dataset.SPLITS for row in dataset.read_records(own, manifest, split)}
        for manifest in (first, second)
    ]
    assert len(splits[1]) == len(splits[0]) + 3 == 603
    assert splits[0].items() <= splits[1].items()
    for manifest in (first, second):
        verify_files(own.local(f"datasets/{manifest.id}"), manifest.files)


def test_rows_are_traced_through_masks_and_clusters(tmp_path: Path, base: ModelVersion, own: Store) -> None:
    """Of a build with every kind of rule: what stayed, what was masked, what was dropped and for which record."""
    rows = tmp_path / "rows"
    rows.mkdir()
    words = "the quick brown fox jumps over a lazy dog and then goes home to sleep for the whole long night again "

    def said(text: str, who: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": "tell me"}, {"role": "assistant", "content": text}]
        return {"messages": turns, "customer": who}

    lines = [chat(n, customer=f"c{n % 4}") for n in range(20)]
    lines += [said(words * 3, "anna"), said(words * 3 + "twice", "anna"), said("mail a@example.com today", "otto")]
    lines += [said("no", "otto")]
    write(rows / "a.jsonl", lines)
    rules = [
        {"rule": "near_duplicates"},
        {"rule": "personal_data", "action": "mask"},
        {"rule": "length", "min_chars": 10},
    ]
    with Catalog.open(own) as catalog:
        manifest = catalog.put(
            prepare(config_of(rows, subject={"field": "customer"}, curate=rules, sequence_length=512), base, own)
        )
        queries = of_file(catalog, str(rows / "a.jsonl"))
        report = trace(catalog, queries)
        by_line = {one.asked[0].rpartition(":")[2]: one for one in report.records}
        assert report.nowhere == ()
        assert len(by_line) == len(lines)
        for line, one in by_line.items():
            assert {held.place.line for held in one.held} == {int(line)}
        first, second, masked, short = (by_line[str(n)] for n in (21, 22, 23, 24))
        assert second.held[0].place.kept == first.record
        assert [(held.place.record, held.relation) for held in first.alike] == [(second.record, "dropped for it")]
        assert [(held.place.record, held.relation) for held in second.alike] == [(first.record, "stays for it")]
        assert masked.record != parse_record(lines[22]).id
        assert (short.held[0].place.split, short.held[0].place.reason) == ("dropped", "fewer than min_chars characters")
        kept = [one.record for one in report.records if one.held[0].place.split != "dropped"]
        whose = {name: set(of_subject_value(catalog, name).records) for name in ("c0", "c1", "c2", "c3", "anna", "otto")}
        assert set().union(*whose.values()) == set(by_record := {one.record for one in report.records})
        assert (whose["otto"], whose["anna"]) == ({masked.record, short.record}, {first.record, second.record})
        assert set(kept) == by_record - {second.record, short.record}
        assert sum(stats.num_records for stats in manifest.splits.values()) == len(kept)


def test_diff_and_find(tmp_path: Path, base: ModelVersion, own: Store) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    write(rows / "a.jsonl", [chat(n, customer=f"c{n % 10}") for n in range(40)])
    subject = {"field": "customer"}
    old = prepare(config_of(rows, subject=subject), base, own)
    lines = [chat(n, customer=f"c{n % 10}") for n in range(40)]
    lines[7] = chat(1007, customer="c7")
    write(rows / "a.jsonl", lines[:-2])
    write(rows / "b.jsonl", [chat(500), chat(501)])
    new = prepare(config_of(rows, subject=subject), base, own)
    difference = diff(own, old, new)
    assert difference["counts"] == {"added": 2, "removed": 2, "changed": 1}
    assert difference["num_records"] == {"old": 40, "new": 40}
    assert difference["by_source"] == {f"{rows}/*.jsonl": {"added": 2, "removed": 2, "changed": 1}}
    (changed,) = difference["changed"]
    assert (changed["record"], changed["was"]) == (parse_record(chat(1007)).id, parse_record(chat(7)).id)
    assert diff(own, old, old)["counts"] == {"added": 0, "removed": 0, "changed": 0}

    both = [old, new]
    assert [row["dataset"] for row in holders(own, both, parse_record(chat(3)).id)] == [old.id, new.id]
    assert [row["dataset"] for row in holders(own, both, parse_record(chat(500)).id)] == [new.id]
    assert holders(own, both, "rec_" + "0" * 24) == []
    hashed = subject_digest(subject_key(own, ""), "c7")
    customer_records = [row["record"] for row in holders(own, [old], subjects={old.id: [hashed]})]
    assert sorted(customer_records) == sorted(parse_record(chat(n)).id for n in (7, 17, 27, 37))
    everything = b"".join(path.read_bytes() for path in Path(own.root).rglob("*.parquet"))
    assert b"customer" not in everything
    assert (Path(own.root) / "keys/subject.key").stat().st_mode & 0o077 == 0


def test_mixture_repeats_and_samples_by_record(tmp_path: Path, base: ModelVersion, own: Store) -> None:
    write(tmp_path / "small.jsonl", [chat(n) for n in range(100)])
    write(tmp_path / "large.jsonl", [chat(1000 + n) for n in range(400)])
    epochs = {"small": 2.5, "large": 0.5}
    sources = [{"path": f"{tmp_path}/{name}.jsonl", "name": name, "epochs": times} for name, times in epochs.items()]
    manifest = prepare(config_of(tmp_path, sources=sources), base, own)
    counted: Counter[str] = Counter()
    source_of: dict[str, int] = {}
    for row in packed(own, manifest):
        assert len(row["sources"]) == len(row["records"])
        counted.update(row["records"])
        source_of.update(zip(row["records"], row["sources"], strict=True))
    small = [count for record, count in counted.items() if source_of[record] == 0]
    large = [count for record, count in counted.items() if source_of[record] == 1]
    in_train = sum(split_is_train(chat(n)) for n in range(100))
    assert len(small) == in_train
    assert set(small) == {2, 3}
    assert 0.35 < small.count(3) / len(small) < 0.65
    assert set(large) == {1}
    assert 0.4 < len(large) / sum(split_is_train(chat(1000 + n)) for n in range(400)) < 0.6
    held_out = [row for row in packed(own, manifest, "test") for row in row["records"]]
    assert max(Counter(held_out).values()) == 1, "held-out rows are never repeated"
    stats = {source.name: source for source in manifest.mixture}
    assert stats["small"].num_documents == sum(small)
    assert stats["large"].num_documents == sum(large)

    weights = {"small": 1.0, "large": 1.0}
    sources = [{"path": f"{tmp_path}/{name}.jsonl", "name": name, "weight": w} for name, w in weights.items()]
    even = prepare(config_of(tmp_path, sources=sources), base, own)
    tokens = [source.num_tokens for source in even.mixture]
    plain = prepare(config_of(tmp_path, sources=[{"path": f"{tmp_path}/*.jsonl"}]), base, own)
    assert abs(tokens[0] / sum(tokens) - 0.5) < 0.06
    assert abs(sum(tokens) / plain.splits["train"].num_tokens - 1) < 0.06
    assert even.mixture[0].epochs > 2 > 1 > even.mixture[1].epochs


def split_is_train(value: dict[str, Any]) -> bool:
    record = dataset.record_bytes(parse_record(value).canonical)
    return dataset.split_of(record, DataConfig.model_validate({"sources": [{"path": "x"}]}).splits) == 0


def test_concurrent_builds_give_one_dataset(tmp_path: Path, base: ModelVersion, own: Store) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    for part in range(4):
        write(rows / f"{part}.jsonl", [chat(part * 100 + n) for n in range(100)])
    with ThreadPoolExecutor(2) as pool:
        manifests = [future.result() for future in [pool.submit(prepare, config_of(rows), base, own) for _ in range(2)]]
    assert manifests[0].id == manifests[1].id
    assert [path.name for path in (Path(own.root) / "datasets").iterdir()] == [manifests[0].id]
    verify_files(own.local(f"datasets/{manifests[0].id}"), manifests[0].files)
    with Catalog.open(own) as one, Catalog.open(own) as other:
        assert one.put(manifests[0]) == other.put(manifests[1])


KILLED = """
import sys
from forge_ray.store.catalog import Catalog
from forge_ray.machine.cluster import connect
from forge_ray.config.data import DataConfig
from forge_ray.data.build import build as building
from forge_ray.store.files import Store
building.JOB_BYTES = 4000
building.PARTITION_RECORDS = 64
store, folder = Store(sys.argv[1]), sys.argv[2]
with Catalog.open(store) as catalog:
    base = catalog.model("tiny")
connect()
values = {"sources": [{"path": f"{folder}/*.jsonl"}], "sequence_length": 128, "block_rows": 4}
config = DataConfig.model_validate(values)
manifest = building.build("rows", config, base, store, building.index_sources(config))
print(manifest.id)
"""


@pytest.mark.parametrize("num_kills", [1, pytest.param(3, marks=pytest.mark.large)])
def test_killed_build_resumes_without_repeating_work(
    num_kills: int, tmp_path: Path, base: ModelVersion, own: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL for a driver and all its workers, at seeded moments; another driver gets through, and nothing is done twice.

    The quick suite kills it once, `large` three times."""
    rows = tmp_path / "rows"
    rows.mkdir()
    for part in range(8):
        write(rows / f"{part:02d}.jsonl", [chat(part * 60 + n) for n in range(60)])
    moments, seen, killed = random.Random(0), {}, 0
    command = [sys.executable, "-c", KILLED, own.root, str(rows)]
    for _ in range(num_kills):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        num_pieces = len(seen) + moments.randint(1, 6)
        until = time.monotonic() + 120
        while process.poll() is None and len(pieces(own)) < num_pieces and time.monotonic() < until:
            time.sleep(0.01)
        killed += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert seen.items() <= pieces(own).items(), "a finished piece was done again"
        seen = pieces(own)
        assert not [path for path in (Path(own.root) / "datasets").glob("ds_*") if not (path / "MANIFEST.json").exists()]
    assert killed >= 1
    monkeypatch.setattr(building, "PARTITION_RECORDS", 64)
    monkeypatch.setattr(building, "JOB_BYTES", 4000)
    resumed = prepare(config_of(rows), base, own)
    assert seen.items() <= pieces(own).items()
    fresh = Store(str(tmp_path / "fresh"))
    with Catalog.open(own) as here, Catalog.open(fresh) as there:
        there.put(here.model("tiny"))
    (Path(fresh.root) / "models").mkdir(parents=True, exist_ok=True)
    (Path(fresh.root) / f"models/{base.id}").symlink_to((Path(own.root) / f"models/{base.id}").resolve())
    assert prepare(config_of(rows), base, fresh).id == resumed.id


CURATE = [
    {"rule": "length", "min_chars": 12},
    {"rule": "near_duplicates", "threshold": 0.7, "ngram": 2},
    {"rule": "personal_data", "action": "mask"},
]


def test_rules_run_in_order_and_account_for_every_drop(tmp_path: Path, base: ModelVersion, own: Store) -> None:
    words = [
        "alpha",
        "bravo",
        "charlie",
        "delta",
        "echo",
        "foxtrot",
        "golf",
        "hotel",
        "india",
        "juliett",
        "kilo",
        "lima",
        "mike",
        "november",
        "oscar",
        "papa",
    ]
    chosen = random.Random(0)
    texts = [" ".join(chosen.choices(words, k=24)) for _ in range(60)]
    rows = [{"text": text} for text in texts]
    rows += [{"text": text + " quebec"} for text in texts[:10]]  # near duplicates of the first ten
    rows += [{"text": f"write to person{n}@example.org about the invoice number {n} of the year"} for n in range(5)]
    rows += [{"text": "short"}] * 3
    write(tmp_path / "a.jsonl", rows[:50])
    write(tmp_path / "b.jsonl", rows[50:])
    manifest = prepare(config_of(tmp_path, curate=CURATE), base, own)
    length, near, personal = manifest.curation
    assert (length.before, length.after) == (78, 75)
    assert (near.before, near.before - near.after) == (75, near.reasons["near duplicate"])
    assert near.before - near.after >= 10
    assert (personal.before, personal.after) == (near.after, near.after)
    assert personal.found == {"email": personal.changed}
    assert personal.changed >= 1
    kept = [row["content"]["text"] for split in dataset.SPLITS for row in dataset.read_records(own, manifest, split)]
    assert len(kept) == personal.after
    assert not [text for text in kept if "@example.org" in text]
    assert texts[0] in kept, "the record that was read first stays"
    assert texts[0] + " quebec" not in kept
    dropped = [
        row
        for path in own.list(f"datasets/{manifest.id}/dropped")
        for row in pq.read_table(own.path(path), filesystem=own.filesystem).to_pylist()
    ]
    assert len(dropped) == 78 - len(kept)
    twin = next(row for row in dropped if json.loads(row["content"])["text"] == texts[0] + " quebec")
    assert twin["reason"] == f"near duplicate of {parse_record({'text': texts[0]}).id}"
    assert (twin["rule"], Path(twin["file"]).name, twin["line"]) == (1, "b.jsonl", 11)

    again = prepare(config_of(tmp_path, curate=CURATE), base, own)
    assert again.id == manifest.id
    with pytest.raises(DataError, match="drop all of"):
        prepare(config_of(tmp_path, curate=[{"rule": "length", "min_chars": 10_000}]), base, own)


def test_exact_duplicates_as_a_rule(tmp_path: Path, base: ModelVersion, own: Store) -> None:
    write(tmp_path / "a.jsonl", [chat(n) for n in range(30)])
    write(tmp_path / "b.jsonl", [chat(n) for n in range(20, 50)])
    manifest = prepare(config_of(tmp_path, curate=[{"rule": "exact_duplicates"}]), base, own)
    (step,) = manifest.curation
    assert (step.before, step.after, step.reasons) == (60, 50, {"duplicate": 10})
    assert manifest.num_duplicates == 0
    plain = prepare(config_of(tmp_path), base, own)
    assert plain.num_duplicates == 10
    assert [row["input_ids"] for row in packed(own, plain)] == [row["input_ids"] for row in packed(own, manifest)]


def test_both_answers_of_a_preference_are_packed_together(tmp_path: Path, base: ModelVersion, own: Store) -> None:
    pairs = [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(30)]
    write(tmp_path / "a.jsonl", pairs)
    manifest = prepare(config_of(tmp_path), base, own)
    assert manifest.kinds == {"preference": 30}
    assert sum(stats.num_records for stats in manifest.splits.values()) == 30
    packed_rows = Rows.of(own, manifest, "train")
    for records in packed_rows.records(list(range(packed_rows.num_rows))):
        assert records[0::2] == records[1::2] != []
    rows = dataset.read_records(own, manifest, "train")
    assert {"messages", "chosen", "rejected"} <= rows[0]["content"].keys()
    write(tmp_path / "b.jsonl", [chat(1)])
    with pytest.raises(DataError, match="rows of several kinds: 1 chat, 30 preference"):
        prepare(config_of(tmp_path), base, own)


def test_packing_is_dense_on_realistic_lengths(tmp_path: Path, base: ModelVersion, own: Store) -> None:
    """Log-normal lengths, several partitions; the documents of a row are isolated and its mask is whole."""
    chosen = np.random.default_rng(0)
    rows = [
        {"text": " ".join(["why"] * max(2, min(300, int(size))))} | {"n": n}
        for n, size in enumerate(chosen.lognormal(3.5, 1.0, 3000))
    ]
    rows = [{"text": f"{row['n']} {row['text']}"} for row in rows]
    write(tmp_path / "a.jsonl", rows)
    manifest = prepare(config_of(tmp_path, sequence_length=512), base, own)
    stats = manifest.splits["train"]
    assert stats.num_tokens / (stats.num_rows * 512) >= 0.98


def ids(store: Store, manifest: DatasetManifest) -> set[str]:
    return {row["record"] for split in dataset.SPLITS for row in dataset.read_records(store, manifest, split)}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_exported_records_round_trip(tmp_path: Path, base: ModelVersion, own: Store, ending: str) -> None:
    write(tmp_path / "a.jsonl", [chat(n) for n in range(40)])
    manifest = prepare(config_of(tmp_path), base, own)
    target = tmp_path / "out" / f"rows.{ending}"
    target.parent.mkdir()
    assert export(own, manifest, dataset.SPLITS, target) == 40
    again = prepare(config_of(tmp_path, sources=[{"path": str(target)}]), base, own)
    assert ids(own, again) == ids(own, manifest)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_parquet_export_refuses_mixed_kinds(tmp_path: Path, base: ModelVersion, own: Store) -> None:
    write(tmp_path / "a.jsonl", [*(chat(n) for n in range(20)), *({"text": f"some text {n}"} for n in range(20))])
    manifest = prepare(config_of(tmp_path), base, own)
    with pytest.raises(ConfigError, match="these are chat and text"):
        export(own, manifest, dataset.SPLITS, tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match="neither"):
        export(own, manifest, dataset.SPLITS, tmp_path / "rows.csv")
    assert export(own, manifest, ("train",), tmp_path / "rows.jsonl") == manifest.splits["train"].num_records
    assert not list(tmp_path.glob(".rows*"))


def test_marked_and_contaminated_records(tmp_path: Path, base: ModelVersion, own: Store) -> None:
    question = "which of these four rivers is the longest one that flows through more than two capitals"
    exam = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "the second"}]}]
    (tmp_path / "exam").mkdir()
    write(tmp_path / "exam" / "a.jsonl", exam)
    rows = [chat(n) for n in range(30)]
    rows.append({"messages": [{"role": "user", "content": f"Tell me: {question}?"}, {"role": "assistant", "content": "no"}]})
    rows.append(
        {"messages": [{"role": "user", "content": "I am a@b.example.org"}, {"role": "assistant", "content": "hello"}]}
    )
    write(tmp_path / "a.jsonl", rows)
    rules = [
        {"rule": "personal_data", "action": "flag"},
        {"rule": "decontaminate", "against": [str(tmp_path / "exam" / "*.jsonl")]},
    ]
    manifest = prepare(config_of(tmp_path, curate=rules), base, own)
    mark, clean = manifest.curation
    assert (mark.before, mark.after, mark.changed, mark.found) == (32, 32, 0, {"email": 1})
    assert (clean.after, clean.reasons) == (31, {"shares 13 words with an evaluation set": 1})
    flagged = [row for split in dataset.SPLITS for row in dataset.read_records(own, manifest, split) if row["flags"]]
    assert [row["flags"] for row in flagged] == ["personal_data:email"]


@pytest.mark.large
def test_rows_with_tools_are_set_aside_or_written_as_text(own: Store, tmp_path: Path) -> None:
    """The tiny model's template has no place for tools."""
    function = {"name": "add", "arguments": {"a": 1}}
    asks = {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": function}]}
    results = {"role": "tool", "tool_call_id": "c1", "content": "2"}
    turns = [[question, asks, results, answer] for question, answer in (chat(number)["messages"] for number in range(40))]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    write(tmp_path / "a.jsonl", [chat(number) for number in range(40)])
    write(tmp_path / "b.jsonl", [{"messages": messages, "tools": tools} for messages in turns])
    config = config_of(tmp_path, sequence_length=1024, max_invalid_fraction=0.5)
    with Catalog.open(own) as catalog:
        base = catalog.model("tiny")
        without = prepare_version("rows", config, base, catalog)
        text = prepare_version("rows", config.model_copy(update={"tools": "text"}), base, catalog)
        with pytest.raises(DataError, match="this model's template has no place for tool calls") as caught:
            prepare_version("rows", config.model_copy(update={"max_invalid_fraction": 0.1}), base, catalog)
    assert without.manifest.rejects == {CALLS: 40}
    assert without.summary.endswith(f"40 quarantined ({AS_TEXT})")
    assert "tools" not in without.manifest.config
    assert text.manifest.rejects == {}
    assert "quarantined" not in text.summary
    assert text.manifest.config["tools"] == "text"
    assert caught.value.hint.startswith(AS_TEXT)
    row = next(row for row in dataset.read_records(own, text.manifest, "train") if "tools" in row["content"])
    (holder,) = (one for one in packed(own, text.manifest) if row["record"] in one["records"])
    tokenizer = dataset.load_tokenizer(own, base.id, tools="text")
    place = holder["records"].index(row["record"]) + 1
    ids = [i for i, segment in zip(holder["input_ids"], holder["segment_ids"], strict=True) if segment == place]
    prompt = tokenizer.prompt_ids(row["content"]["messages"][:3], row["content"]["tools"])
    assert ids[: len(prompt)] == prompt
