"""Rows that were erased: a model trained again equals one that never had them, bit for bit."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray import pipeline
from forge_ray.config.base import parse
from forge_ray.config.run import RunConfig
from forge_ray.data.build import tombstones as erased
from forge_ray.data.dataset import version as dataset
from forge_ray.data.dataset.compare import holders
from forge_ray.data.record.schema import parse_record
from forge_ray.errors import NothingLeft, TrainingError
from forge_ray.governance.erasure.apply import erase
from forge_ray.governance.erasure.options import Options
from forge_ray.governance.erasure.search import ErasureRequest
from forge_ray.records import DatasetManifest, RunRecord
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train import audit, metrics

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ERASED = (3, 4, 17, 40)  # 4 is the first of three near duplicates; 17's address is masked before the duplicates are sought


def rows() -> list[dict[str, Any]]:
    """Sixty questions, two near copies of number 4, and one with an address that a rule masks."""
    pairs = [(f"question {n} about {'abcdefghij'[n % 10] * 3} " + "why " * (n % 7), f"answer {n * n}") for n in range(60)]
    long = "the invoice of the month before last was sent to the wrong office and nobody has answered my letter since then"
    pairs[4] = (f"{long} number", "we are sorry")
    pairs += [(f"{long} numbers", "we are sorry"), (f"{long} numbered", "we are sorry")]
    pairs[17] = ("my address is jane.roe@example.com, is it on file?", "yes, it is")
    return [
        {
            "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}],
            "customer": f"c{number}",
        }
        for number, (ask, answer) in enumerate(pairs)
    ]


def write(folder: Path, kind: str, written_rows: list[dict[str, Any]]) -> Path:
    """Two files of the rows, so that a row that goes moves others within one of them alone."""
    folder.mkdir(parents=True)
    for name, part in (("a", written_rows[:30]), ("b", written_rows[30:])):
        if kind == "jsonl":
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        else:
            pq.write_table(pa.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=7)
    return folder


def config_of(folder: Path, kind: str) -> RunConfig:
    near = {"rule": "near_duplicates", "threshold": 0.6}
    return parse(
        RunConfig,
        {
            "name": "letters",
            "base_model": "tiny",
            "release": {"alias": "letters"},
            "data": {
                "sources": [{"path": f"{folder}/*.{kind}"}],
                "curate": [{"rule": "personal_data", "action": "mask"}, near],
                "sequence_length": 160,
                "block_rows": 4,
                "subject": {"field": "customer"},
            },
            "train": {
                "max_steps": 4,
                "global_batch": 4,
                "micro_batch_size": 2,
                "engine": "torch",
                "zero_stage": 0,
                "precision": "fp32",
                "scaling": {"num_workers": 0},
            },
        },
    )


def fresh(folder: Path, store: Store) -> Store:
    """A store with the tiny model and nothing else."""
    target = Store(str(folder))
    with Catalog.open(store) as here, Catalog.open(target) as there:
        base = here.model("tiny")
        store.local(f"models/{base.id}")
        target.local(f"models/{base.id}").parent.mkdir(parents=True, exist_ok=True)
        target.local(f"models/{base.id}").symlink_to(store.local(f"models/{base.id}"))
        there.put(base)
        promotion.promote(there, base.id, "tiny")
    return target


def made_of(store: Store, config: RunConfig) -> tuple[DatasetManifest, RunRecord]:
    record = pipeline.train(config, store)
    with Catalog.open(store) as catalog:
        return catalog.get_as(DatasetManifest, record.dataset), record


def weights(record: RunRecord) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in record.export}


@pytest.mark.parametrize("kind", ["jsonl", pytest.param("parquet", marks=pytest.mark.large)])
def test_retraining_after_erasure_equals_training_without_the_rows(kind: str, tmp_path: Path, store: Store) -> None:
    """`large` repeats it for Parquet, whose rows the quick suite compares below: what is trained follows from them."""
    everything = rows()
    kept = [row for number, row in enumerate(everything) if number not in ERASED]
    with_all, by_hand = fresh(tmp_path / "store", store), fresh(tmp_path / "by-hand", store)
    config = config_of(write(tmp_path / "all", kind, everything), kind)
    never = made_of(by_hand, config_of(write(tmp_path / "kept", kind, kept), kind))
    before = made_of(with_all, config)

    asked = {parse_record(everything[number]).id for number in ERASED[:3]}
    stored = [row for split in dataset.SPLITS for row in dataset.read_records(with_all, before[0], split)]
    by_text = {row["content"]["messages"][0]["content"]: row for row in stored}
    asked.add(by_text[everything[ERASED[3]]["messages"][0]["content"]]["subject"])  # one row is named by whose it is
    erased.write_tombstones(with_all, "er_test", asked)
    listed = b"".join(map(with_all.read, erased.files_of(with_all, "er_test"))).decode()
    assert not any(value.removeprefix("rec_") in listed for value in asked)

    after = made_of(with_all, config)
    assert after[0].id != before[0].id
    assert {split: stats.rows_digest for split, stats in after[0].splits.items()} == {
        split: stats.rows_digest for split, stats in never[0].splits.items()
    }
    assert weights(after[1]) == weights(never[1]) != weights(before[1])
    assert after[1].order_digest == never[1].order_digest
    assert sorted(len(lines) for lines in after[0].erased.values()) == [1, 3]
    assert not holders(with_all, [after[0]], parse_record(everything[3]).id)
    folder = with_all.local(f"datasets/{after[0].id}")
    content = b"".join(pq.read_table(path).to_pandas().to_csv().encode() for path in folder.rglob("*.parquet"))
    assert b"question 3 about" not in content

    again = pipeline.prepare(config, with_all)
    assert again == after[0]  # found, not built again
    erased.write_tombstones(with_all, "er_other", {"rec_000000000000000000000000"})
    assert pipeline.prepare(config, with_all).id == after[0].id  # no tombstone of that one touches it
    assert audit.audit(audit.facts_of(with_all, after[1].id), lambda *_: None).problems == ()


def test_parquet_rows_after_erasure_are_those_of_a_file_without_them(tmp_path: Path, store: Store) -> None:
    everything = rows()
    kept = [row for number, row in enumerate(everything) if number not in ERASED[:3]]
    own = fresh(tmp_path / "store", store)
    never = pipeline.prepare(
        config_of(write(tmp_path / "kept", "parquet", kept), "parquet"), fresh(tmp_path / "by-hand", store)
    )
    config = config_of(write(tmp_path / "all", "parquet", everything), "parquet")
    before = pipeline.prepare(config, own)
    erased.write_tombstones(own, "er_test", {parse_record(everything[number]).id for number in ERASED[:3]})
    after = pipeline.prepare(config, own)
    digests = [{split: stats.rows_digest for split, stats in one.splits.items()} for one in (after, never, before)]
    assert digests[0] == digests[1] != digests[2]
    assert sorted(len(lines) for lines in after.erased.values()) == [3]


def test_tombstones_apply_to_masked_rows_and_may_leave_none(tmp_path: Path, store: Store) -> None:
    few = rows()[14:20]
    own = fresh(tmp_path / "store", store)
    config = config_of(write(tmp_path / "few", "jsonl", few), "jsonl")
    built = pipeline.prepare(config, own)
    stored = [row for split in dataset.SPLITS for row in dataset.read_records(own, built, split)]
    masked = next(row for row in stored if "on file" in row["content"]["messages"][0]["content"])
    assert masked["record"] != parse_record(few[3]).id
    erased.write_tombstones(own, "er_masked", {masked["record"]})
    after = pipeline.prepare(config, own)
    assert sum(len(lines) for lines in after.erased.values()) == 1
    assert not holders(own, [after], masked["record"])

    erased.write_tombstones(own, "er_all", {row["subject"] for row in stored})
    with pytest.raises(NothingLeft, match="no row is left"):
        pipeline.prepare(config, own)


def test_build_started_before_an_erasure_does_not_restore_rows(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge_ray.data.build import prepare

    own, config, real, builds = (
        fresh(tmp_path / "store", store),
        config_of(write(tmp_path / "r", "jsonl", rows()), "jsonl"),
        prepare.build,
        [],
    )
    erased_record = parse_record(rows()[3]).id

    def erased_meanwhile(*arguments: Any) -> DatasetManifest:
        builds.append(real(*arguments))
        if len(builds) == 1:
            assert own.is_published(f"datasets/{builds[0].id}")
            erased.write_tombstones(own, "er_0123456789abcdef", [erased_record])
        return builds[-1]

    monkeypatch.setattr(prepare, "build", erased_meanwhile)
    manifest = pipeline.prepare(config, own)
    assert [one.id for one in builds] == [builds[0].id, manifest.id]
    assert manifest.id != builds[0].id
    assert not own.exists(f"datasets/{builds[0].id}")
    with Catalog.open(own) as catalog:
        assert [one.id for one in catalog.datasets()] == [manifest.id]
    assert list(holders(own, [manifest], erased_record)) == []


def test_build_restarts_when_its_work_area_is_emptied(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a purge does that runs beside it; an error of another kind is not repeated."""
    from forge_ray.data.build import build, work

    own, config = fresh(tmp_path / "store", store), config_of(write(tmp_path / "r", "jsonl", rows()), "jsonl")
    real, starts = build.find_duplicates, []

    def emptied(*arguments: Any) -> Any:
        starts.append(arguments)
        if len(starts) == 1:
            work.clean(own)
        return real(*arguments)

    monkeypatch.setattr(build, "find_duplicates", emptied)
    manifest = pipeline.prepare(config, own)
    assert len(starts) == 2
    assert manifest.splits["train"].num_records
    monkeypatch.setattr(build, "find_duplicates", real)
    assert pipeline.prepare(config, fresh(tmp_path / "other", store)).id == manifest.id

    def broken(*_: Any) -> Any:
        starts.append(())
        raise ValueError("broken")

    monkeypatch.setattr(build, "find_duplicates", broken)
    with pytest.raises(ValueError, match="broken"):
        pipeline.prepare(config, fresh(tmp_path / "third", store))
    assert len(starts) == 3


def test_training_on_rows_that_are_erased_meanwhile_stops_and_publishes_nothing(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The erasure runs in a thread of its own, and ends by itself."""
    own = fresh(tmp_path / "store", store)
    config = config_of(write(tmp_path / "r", "jsonl", rows()), "jsonl")
    before = pipeline.prepare(config, own)
    request = ErasureRequest("record", (parse_record(rows()[3]).id,))
    statements: list[dict[str, Any]] = []
    erasing = threading.Thread(target=lambda: statements.append(erase(own, request, Options(wait_s=120))))
    append = metrics.append

    def erased_after_the_second_step(folder: Path, line: dict[str, Any]) -> None:
        append(folder, line)
        if line["step"] == 2 and not erasing.is_alive():
            erasing.start()
            while not own.list("records/erasures"):
                time.sleep(0.05)

    monkeypatch.setattr(metrics, "append", erased_after_the_second_step)
    with pytest.raises(TrainingError, match=f"is not published: {before.id} holds or learned from rows that er_"):
        pipeline.train(config, own)
    erasing.join()
    (statement,) = statements
    assert statement["predicate"]["unconfirmed"] == {}
    with Catalog.open(own) as catalog:
        assert catalog.all(RunRecord) == []
        (run,) = catalog.subjects("run")
        assert catalog.events("run", run)[-1].data["state"] == "failed"
    assert not [path for path in own.list(f"runs/{run}", recursive=True) if "/checkpoints/" in path or "/export/" in path]
    monkeypatch.setattr(metrics, "append", append)
    after, _ = made_of(own, config)  # started again, it trains on what is left
    assert after.id != before.id
