"""The catalogue: files are the truth, the index answers from them, and the last move of an alias wins."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, cast

import pytest

from forge_ray import records
from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.governance.lineage import tree, walk
from forge_ray.records import DatasetManifest, Deployment, EvalReport, Event, ModelVersion, RunRecord
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog

pytestmark = pytest.mark.unit


def model(name: str = "base", **more: Any) -> ModelVersion:
    values = {
        "status": "imported",
        "weights": "full",
        "files": (),
        "files_digest": f"sha256:{name}",
        "licence": "mit",
    } | more
    return ModelVersion(name=name, **cast(Any, values)).sealed()


def dataset(base: ModelVersion) -> DatasetManifest:
    return DatasetManifest(
        name="rows",
        format=1,
        input_digest="sha256:i",
        config={},
        tokenizer_digest="sha256:t",
        base_model=base.id,
        sources=(),
        splits={},
        num_duplicates=0,
        rejects={},
        sequence_length=8,
    ).sealed()


def run(data: DatasetManifest, base: ModelVersion) -> RunRecord:
    return RunRecord(
        id="run_0123456789abcdef",
        name="run",
        method="sft",
        config={},
        config_digest="sha256:c",
        dataset=data.id,
        base_model=base.id,
        base_digest="sha256:b",
        seed=0,
        num_steps=3,
        samples_seen=24,
        order_digest="sha256:o",
        attempts=(),
        code_digest="sha256:k",
        environment={},
        metrics={},
        export=(),
        export_kind="adapter",
    )


def chain(catalog: Catalog) -> dict[str, Any]:
    """base → dataset → run → evaluation → version → deployment, all put."""
    base = catalog.put(model())
    data = catalog.put(dataset(base))
    trained = catalog.put(run(data, base))
    report = catalog.put(
        EvalReport(
            subject=trained.id,
            subject_digest="sha256:s",
            dataset=data.id,
            split="test",
            config={},
            num_examples=2,
            metrics={"exact_match": 0.5},
            per_class={},
            items_sha256="x",
        ).sealed()
    )
    tuned = catalog.put(model("tuned", status="accepted", run=trained.id, base_model=base.id, evals=(report.id,)))
    deployed = catalog.put(
        Deployment(
            name="d", model="m", model_version=tuned.id, model_digest="sha256:m", config={}, config_digest="sha256:c"
        ).sealed()
    )
    return {"base": base, "data": data, "run": trained, "report": report, "tuned": tuned, "deployed": deployed}


def answers(catalog: Catalog) -> dict[str, Any]:
    """What a catalogue says about everything in it."""
    kinds: list[type[Any]] = [DatasetManifest, RunRecord, EvalReport, ModelVersion, Deployment]
    records_by_kind = {kind.kind: catalog.all(kind) for kind in kinds}
    ids = [record.id for kept in records_by_kind.values() for record in kept]
    return records_by_kind | {
        "aliases": catalog.aliases(),
        "events": catalog.events("run", "run_0123456789abcdef"),
        "parents": {identifier: catalog.parents(identifier) for identifier in ids},
        "children": {identifier: catalog.children(identifier) for identifier in ids},
    }


def test_put_and_get(catalog: Catalog) -> None:
    for record in chain(catalog).values():
        assert catalog.get(record.id) == record
        assert catalog.has(record.id)
        assert catalog.get_as(type(record), record.id) == record
    with pytest.raises(NotFound, match="no record 'mv_none' in"):
        catalog.get("mv_none")
    with pytest.raises(NotFound, match="is one of models, not of datasets"):
        catalog.get_as(DatasetManifest, model().id)


def test_the_first_of_two_equal_records_stays(catalog: Catalog) -> None:
    first = catalog.put(model().model_copy(update={"created_at": "2026-01-01T00:00:00.000+00:00"}))
    assert catalog.put(model()) == first
    assert catalog.all(ModelVersion) == [first]


def test_another_process_gives_the_same_answers(catalog: Catalog) -> None:
    records_put = chain(catalog)
    for state in ("running", "failed", "running", "finished"):
        catalog.append(Event(kind="run", subject=records_put["run"].id, data={"state": state}))
    promotion.promote(catalog, records_put["base"].id, "live")
    promotion.promote(catalog, records_put["tuned"].id, "live")
    before = answers(catalog)
    assert [event.data["state"] for event in before["events"]] == ["running", "failed", "running", "finished"]
    with Catalog.open(catalog.store) as fresh:
        assert answers(fresh) == before


def test_records_of_another_process_are_read(catalog: Catalog) -> None:
    script = """
import sys
from forge_ray.store.catalog import Catalog
from forge_ray.records import ModelVersion
from forge_ray.release import promotion
from forge_ray.store.files import Store
store = Store(sys.argv[1])
with Catalog.open(store) as catalog:
    version = ModelVersion(name="far", status="imported", weights="full", files=(), files_digest="", licence="mit").sealed()
    catalog.put(version)
    promotion.promote(catalog, version.id, "far")
print(version.id)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, catalog.store.uri],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    with Catalog.open(catalog.store) as fresh:
        assert fresh.model("far").id == done.stdout.strip()
        assert [version.name for version in fresh.all(ModelVersion)] == ["far"]


def test_put_takes_a_record_that_lies_in_a_store_without_a_log(catalog: Catalog) -> None:
    version = model()
    path = f"records/models/{version.id}.json"
    catalog.store.write(path, records.canonical_json(version.model_dump(mode="json")))
    assert not catalog.has(version.id)
    assert catalog.put(version) == version
    assert catalog.get(version.id) == version


def test_promote(catalog: Catalog) -> None:
    first, second = catalog.put(model("a")), catalog.put(model("b"))
    promotion.promote(catalog, first.id, "live")
    promotion.promote(catalog, first.id, "live")
    assert len(catalog.events("alias", "live")) == 1
    assert catalog.model("live") == first
    promotion.promote(catalog, second.id, "live")
    promotion.promote(catalog, "live", "stable")
    assert catalog.aliases() == {"live": second.id, "stable": second.id}
    promotion.promote(catalog, first.id, "live")
    assert catalog.model("live") == first
    assert catalog.model("stable") == second


def test_the_last_alias_move_wins_whatever_the_clock_says(catalog: Catalog) -> None:
    versions = [catalog.put(model(name)) for name in "abcdefgh"]
    moments = ["2026-01-01T00:00:00.999+00:00"] * 4 + [f"2025-01-0{day}T00:00:00.000+00:00" for day in range(1, 5)]
    for version, moment in zip(versions, moments, strict=True):
        catalog.append(Event(at=moment, kind="alias", subject="live", data={"model_version": version.id}))
        assert catalog.model("live") == version
    moves = [event.data["model_version"] for event in catalog.events("alias", "live")]
    assert moves == [version.id for version in versions]
    with Catalog.open(catalog.store) as fresh:
        assert fresh.model("live") == versions[-1]


def test_a_rejected_version_is_not_promoted(catalog: Catalog) -> None:
    rejected = catalog.put(model("bad", status="rejected", reasons=("exact_match 0.1 < 0.4", "worse than base")))
    with pytest.raises(PolicyError, match=r"was rejected: exact_match 0\.1 < 0\.4; worse than base\nhint: train a better"):
        promotion.promote(catalog, rejected.id, "live")
    assert catalog.aliases() == {}


def test_a_record_id_is_refused_as_an_alias(catalog: Catalog) -> None:
    version = catalog.put(model())
    with pytest.raises(ConfigError, match="is the id of a record"):
        promotion.promote(catalog, version.id, version.id)
    with pytest.raises(NotFound, match=r"no model version or alias 'live' in .*\nhint: aliases: none yet"):
        catalog.model("live")


def test_walk_finds_a_path_in_both_directions(catalog: Catalog) -> None:
    records_put = chain(catalog)
    ids = {name: record.id for name, record in records_put.items()}
    there = walk(catalog, ids["deployed"], ids["data"])
    assert (there[0], there[1], there[3:]) == (ids["deployed"], ids["tuned"], [ids["data"]])
    assert there[2] in (ids["run"], ids["report"])
    back = walk(catalog, ids["data"], ids["deployed"])
    assert (back[0], back[-1], len(back)) == (ids["data"], ids["deployed"], 4)
    assert walk(catalog, ids["base"], ids["base"]) == [ids["base"]]
    alone = catalog.put(model("alone"))
    assert walk(catalog, ids["base"], alone.id) == []


def test_tree_follows_origins_and_uses(catalog: Catalog) -> None:
    records_put = chain(catalog)

    def flat(node: dict[str, Any], towards: str) -> list[tuple[str, str]]:
        return [(node["id"], node["kind"])] + [item for below in node[towards] for item in flat(below, towards)]

    origins = tree(catalog, records_put["deployed"].id)
    assert origins["label"] == "d → m"
    assert {identifier for identifier, _ in flat(origins, "origins")} == {record.id for record in records_put.values()}
    (tuned,) = origins["origins"]
    assert tuned["id"] == records_put["tuned"].id
    assert {below["id"] for below in tuned["origins"]} == {
        records_put["run"].id,
        records_put["base"].id,
        records_put["report"].id,
    }
    uses = tree(catalog, records_put["base"].id, towards="uses")
    assert {identifier for identifier, _ in flat(uses, "uses")} == {record.id for record in records_put.values()}


def test_tree_marks_missing_records(catalog: Catalog) -> None:
    data = catalog.put(dataset(model("never put")))
    (below,) = tree(catalog, data.id)["origins"]
    assert (below["kind"], below["label"], below["origins"]) == ("missing", "not in this store", [])


def test_the_tree_of_a_long_chain_stays_small(catalog: Catalog) -> None:
    """Each is trained from the one before, on rows that were packed for that one: two ways from each to all before it."""
    last = catalog.put(model("base"))
    for number in range(40):
        data = catalog.put(dataset(last).model_copy(update={"config": {"number": number}}).sealed())
        trained = run(data, last).model_copy(update={"id": f"run_{number:016d}"})
        catalog.put(trained)
        last = catalog.put(model(f"m{number}", run=trained.id, base_model=last.id, status="accepted"))
    rendered = str(tree(catalog, last.id))
    assert len(rendered) < 40 * 1000
    assert "run_0000000000000000" in rendered
