"""Rows that were erased: a model trained again equals one that never had them, bit for bit."""

from __future__ import annotations

import json
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
from forge_ray.errors import NothingLeft
from forge_ray.records import DatasetManifest, RunRecord
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train import audit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ERASED = (3, 4, 17, 40)  # 4 is the first of three near duplicates; 17's address is masked before the duplicates are sought


def rows() -> list[dict[str, Any]]:
    """Sixty questions, two near copies of number 4, and one with an address that a rule masks."""
    found = [(f"question {n} about {'abcdefghij'[n % 10] * 3} " + "why " * (n % 7), f"answer {n * n}") for n in range(60)]
    long = "the invoice of the month before last was sent to the wrong office and nobody has answered my letter since then"
    found[4] = (f"{long} number", "we are sorry")
    found += [(f"{long} numbers", "we are sorry"), (f"{long} numbered", "we are sorry")]
    found[17] = ("my address is jane.roe@example.com, is it on file?", "yes, it is")
    return [
        {
            "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}],
            "customer": f"c{number}",
        }
        for number, (ask, answer) in enumerate(found)
    ]


def write(folder: Path, kind: str, found: list[dict[str, Any]]) -> Path:
    """Two files of the rows, so that a row that goes moves others within one of them alone."""
    folder.mkdir(parents=True)
    for name, part in (("a", found[:30]), ("b", found[30:])):
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
    made = Store(str(folder))
    with Catalog(store) as here, Catalog(made) as there:
        base = here.model("tiny")
        store.local(f"models/{base.id}")
        made.local(f"models/{base.id}").parent.mkdir(parents=True, exist_ok=True)
        made.local(f"models/{base.id}").symlink_to(store.local(f"models/{base.id}"))
        there.put(base)
        there.promote(base.id, "tiny")
    return made


def made_of(store: Store, config: RunConfig) -> tuple[DatasetManifest, RunRecord]:
    record = pipeline.train(config, store)
    with Catalog(store) as catalog:
        return catalog.get_as(DatasetManifest, record.dataset), record


def weights(record: RunRecord) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in record.export}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_model_without_erased_rows_equals_one_that_never_had_them(kind: str, tmp_path: Path, store: Store) -> None:
    everything = rows()
    kept = [row for number, row in enumerate(everything) if number not in ERASED]
    with_all, by_hand = fresh(tmp_path / "store", store), fresh(tmp_path / "by-hand", store)
    config = config_of(write(tmp_path / "all", kind, everything), kind)
    never = made_of(by_hand, config_of(write(tmp_path / "kept", kind, kept), kind))
    before = made_of(with_all, config)

    asked = {parse_record(everything[number]).id for number in ERASED[:3]}
    found = [row for split in dataset.SPLITS for row in dataset.read_records(with_all, before[0], split)]
    by_text = {row["content"]["messages"][0]["content"]: row for row in found}
    asked.add(by_text[everything[ERASED[3]]["messages"][0]["content"]]["subject"])  # one row is named by whose it is
    erased.write_tombstones(with_all, "er_test", asked)
    listed = with_all.read("erasures/er_test.json").decode()
    assert not any(value.removeprefix("rec_") in listed for value in asked)

    after = made_of(with_all, config)
    assert after[0].id != before[0].id
    assert {split: stats.rows_digest for split, stats in after[0].splits.items()} == {
        split: stats.rows_digest for split, stats in never[0].splits.items()
    }
    assert weights(after[1]) == weights(never[1]) != weights(before[1])
    assert after[1].order_digest == never[1].order_digest
    assert sorted(len(lines) for lines in after[0].erased.values()) == [1, 3]
    assert not holders(with_all, [after[0]], parse_record(everything[3]).id, "")
    folder = with_all.local(f"datasets/{after[0].id}")
    content = b"".join(pq.read_table(path).to_pandas().to_csv().encode() for path in folder.rglob("*.parquet"))
    assert b"question 3 about" not in content

    again = pipeline.prepare(config, with_all)
    assert again == after[0]  # found, not built again
    erased.write_tombstones(with_all, "er_other", {"rec_000000000000000000000000"})
    assert pipeline.prepare(config, with_all).id == after[0].id  # no tombstone of that one touches it
    assert audit.audit(audit.facts_of(with_all, after[1].id), lambda *_: None).problems == ()


def test_masked_rows_are_found_by_what_the_rules_made_of_them_and_nothing_may_be_left(tmp_path: Path, store: Store) -> None:
    few = rows()[14:20]
    own = fresh(tmp_path / "store", store)
    config = config_of(write(tmp_path / "few", "jsonl", few), "jsonl")
    built = pipeline.prepare(config, own)
    found = [row for split in dataset.SPLITS for row in dataset.read_records(own, built, split)]
    masked = next(row for row in found if "on file" in row["content"]["messages"][0]["content"])
    assert masked["record"] != parse_record(few[3]).id
    erased.write_tombstones(own, "er_masked", {masked["record"]})
    after = pipeline.prepare(config, own)
    assert sum(len(lines) for lines in after.erased.values()) == 1
    assert not holders(own, [after], masked["record"], "")

    erased.write_tombstones(own, "er_all", {row["subject"] for row in found})
    with pytest.raises(NothingLeft, match="no row is left"):
        pipeline.prepare(config, own)


def test_a_build_that_began_before_an_erasure_does_not_bring_the_rows_back(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge_ray.data.build import build

    own, config, real, made = (
        fresh(tmp_path / "store", store),
        config_of(write(tmp_path / "r", "jsonl", rows()), "jsonl"),
        build.build,
        [],
    )
    gone = parse_record(rows()[3]).id

    def erased_meanwhile(*arguments: Any) -> DatasetManifest:
        made.append(real(*arguments))
        if len(made) == 1:
            assert own.is_published(f"datasets/{made[0].id}")
            erased.write_tombstones(own, "er_0123456789abcdef", [gone])
        return made[-1]

    monkeypatch.setattr(build, "build", erased_meanwhile)
    found = pipeline.prepare(config, own)
    assert [one.id for one in made] == [made[0].id, found.id]
    assert found.id != made[0].id
    assert not own.exists(f"datasets/{made[0].id}")
    with Catalog(own) as catalog:
        assert [one.id for one in catalog.datasets()] == [found.id]
    assert list(holders(own, [found], gone, "")) == []


def test_a_build_whose_work_area_is_emptied_begins_again(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    found = pipeline.prepare(config, own)
    assert len(starts) == 2
    assert found.splits["train"].num_records
    monkeypatch.setattr(build, "find_duplicates", real)
    assert pipeline.prepare(config, fresh(tmp_path / "other", store)).id == found.id

    def broken(*_: Any) -> Any:
        starts.append(())
        raise ValueError("broken")

    monkeypatch.setattr(build, "find_duplicates", broken)
    with pytest.raises(ValueError, match="broken"):
        pipeline.prepare(config, fresh(tmp_path / "third", store))
    assert len(starts) == 3
