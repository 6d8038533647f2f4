"""`forge cycles`: the cycles before a version, by the links of runs; and what goes through them without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fabricated
import pytest
from click.testing import CliRunner
from fabricated import dataset, record_of, report, train_config

from forge_ray import pipeline
from forge_ray.cli.main import cli
from forge_ray.config.base import parse, resolved
from forge_ray.config.run import RunConfig
from forge_ray.errors import NotFound
from forge_ray.governance.cycles import cycles
from forge_ray.governance.erasure.options import Options
from forge_ray.governance.erasure.plan import plan_of
from forge_ray.governance.erasure.repeat import retrain
from forge_ray.governance.erasure.search import ErasureRequest, search
from forge_ray.governance.reproduce import reproduce
from forge_ray.governance.trace import of_record, trace
from forge_ray.papers.bom import bom
from forge_ray.papers.facts import gather
from forge_ray.papers.openlineage import openlineage
from forge_ray.papers.provenance import statement
from forge_ray.records import Event, ModelVersion, RunRecord, SourceStats
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.train.start import full_base

pytestmark = pytest.mark.unit
RECORDS = [record_of(number) for number in range(40)]


@pytest.fixture
def chain(catalog: Catalog) -> list[ModelVersion]:
    """base ← first (adapter) ← second (continue) ← merged ← third (adapter on it)."""
    base = fabricated.version(catalog, "base")
    counts = dict.fromkeys(("num_records", "num_documents", "num_tokens", "num_trained_tokens"), 0)
    source = SourceStats(name="rows", epochs=1.0, licences={}, **counts)
    parts = {"one": RECORDS[:20], "two": RECORDS[10:30], "three": RECORDS[20:40]}
    data = [dataset(catalog, records, name=name, mixture=[source]) for name, records in parts.items()]
    for manifest in data:
        catalog.store.write(f"datasets/{manifest.id}/MANIFEST.json", b"{}")
    one = fabricated.run(catalog, "one", data[0].id, base.id, train=train_config(adapter={"r": 4}))
    first = fabricated.version(catalog, "first", one.id, base.id, weights="adapter")
    two = fabricated.run(
        catalog,
        "two",
        data[1].id,
        base.id,
        train=train_config(adapter={"r": 4}, init_from="continue", seed=3),
        initial_adapter=first.id,
        initial_digest=first.files_digest,
    )
    second = fabricated.version(catalog, "second", two.id, base.id, weights="adapter", reasons=("exact_match too low",))
    merged = fabricated.version(catalog, "merged", "", second.id, status="merged", source="second merged into base")
    three = fabricated.run(catalog, "three", data[2].id, merged.id, train=train_config(adapter={"r": 4}, init_from="merge"))
    third = fabricated.version(catalog, "third", three.id, merged.id, weights="adapter")
    for version, loss in ((first, 3.0), (second, 2.0), (third, 1.0)):
        subject = {"subject_digest": version.files_digest, "metrics": {"loss": loss, "exact_match": 1 / loss}}
        report(catalog, version.id, data[0].id, **subject)
    promotion.promote(catalog, first.id, "prod")
    promotion.promote(catalog, third.id, "prod")
    catalog.append(Event(kind="approval", subject=third.id, data={"decision": "approve", "alias": "prod"}))
    fabricated.deployment(catalog, "endpoint", third.id)
    return [base, first, second, merged, third]


def test_cycles_are_linked_by_adapters_and_merged_versions(catalog: Catalog, chain: list[ModelVersion]) -> None:
    _, first, second, _, third = chain
    listed = cycles(catalog, "prod")
    assert [(one.version, one.how, one.started_from) for one in listed] == [
        (first.id, "first", chain[0].id),
        (second.id, "continue", first.id),
        (third.id, "merge", second.id),
    ]
    assert [one.number for one in listed] == [1, 2, 3]
    assert listed[0].rows is None
    assert listed[1].rows == {"added": 10, "removed": 10, "changed": 0}
    assert listed[1].settings == {"train.seed": [0, 3]}
    assert listed[2].settings == {"train.seed": [3, 0]}
    assert [scores["metrics"]["loss"] for one in listed for scores in one.scores.values()] == [3.0, 2.0, 1.0]
    assert listed[1].reasons == ("exact_match too low",)
    assert [one["alias"] for one in listed[0].aliases] == ["prod"]
    assert listed[0].aliases[0]["until"] == listed[2].aliases[0]["since"]
    assert listed[2].aliases[0]["until"] == ""
    assert [(one["decision"], one["alias"], one["holds"]) for one in listed[2].approvals] == [("approve", "prod", False)]
    assert [one["name"] for one in listed[2].deployments] == ["endpoint"]
    assert [one.version for one in cycles(catalog, second.id)] == [first.id, second.id]


def test_cycles_of_erased_rows_say_what_is_gone(catalog: Catalog, chain: list[ModelVersion]) -> None:
    """The records of such datasets stay, their files do not."""
    listed = cycles(catalog, chain[2].id)
    catalog.store.delete(f"datasets/{listed[0].dataset}/MANIFEST.json")
    again = cycles(catalog, chain[2].id)
    assert (again[1].rows, again[1].problem) == (None, f"{listed[0].dataset} is no longer in the store")


def test_the_table_the_json_and_the_picture(catalog: Catalog, chain: list[ModelVersion], tmp_path: Path) -> None:
    def forge(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["cycles", *words, "--store", catalog.store.uri])
        return result.exit_code, result.output

    picture = tmp_path / "cycles.png"
    code, printed = forge("prod", "--out", str(picture))
    assert code == 0, printed
    lines = printed.splitlines()
    assert next(line for line in lines if chain[1].id in line and "first" in line)
    assert next(line for line in lines if chain[4].id in line and "merge" in line and "1.000" in line)
    assert "  settings: train.seed: 0 → 3" in lines
    assert "  gate: exact_match too low" in lines
    assert any("approve by" in line and "(the signature does not hold)" in line for line in lines)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, printed = forge("prod", "--json")
    assert [one["version"] for one in json.loads(printed)["cycles"]] == [chain[1].id, chain[2].id, chain[4].id]
    for words, message in (
        ((chain[0].id,), "was made by no run"),
        (("prod", "--out", "cycles.jpg"), "--out cycles.jpg is not the name of a PNG file"),
        (("prod", "--out", str(tmp_path / "none" / "c.png")), "cannot be written"),
    ):
        code, printed = forge(*words)
        assert code == 2
        assert message in printed


def test_rows_of_the_first_cycle_reach_the_last(catalog: Catalog, chain: list[ModelVersion]) -> None:
    record = next(one.id for one in RECORDS[:10] if trained(catalog, one.id))
    affected = trace(catalog, [of_record(record)]).affected
    assert set(affected.runs) == {"run_one", "run_two", "run_three"}
    assert set(affected.versions) == {version.id for version in chain[1:]}
    plan = plan_of(catalog, search(catalog, ErasureRequest("record", (record,))))
    assert [(run.id, run.used, run.origin) for run in plan.runs] == [
        ("run_one", True, chain[0].id),
        ("run_two", True, chain[1].id),
        ("run_three", True, chain[2].id),
    ]
    assert {version.id for version in plan.versions} == {version.id for version in chain[1:]}
    facts = gather(catalog, chain[4].id)
    assert [version.id for version in facts.chain] == [version.id for version in reversed(chain)]
    assert [training.run.id for training in facts.trainings] == ["run_three", "run_two", "run_one"]
    assert (facts.base, gather(catalog, chain[2].id).base) == (chain[3], chain[0])


@pytest.mark.parametrize("init_from", ["merge", None])
def test_repetition_of_a_run_on_a_merged_version(
    catalog: Catalog, chain: list[ModelVersion], monkeypatch: pytest.MonkeyPatch, init_from: str | None
) -> None:
    """Its run file names the adapter, with `merge`, or the merged version itself: either is repeated on the adapter's
    replacement, merged anew."""
    base, _, second, merged, _ = chain
    values = {"name": "four", "base_model": second.id if init_from else merged.id, "release": {"alias": "none"}}
    data = {"sources": [{"path": "rows.jsonl"}]}
    config = resolved(parse(RunConfig, values | {"data": data, "train": train_config(init_from=init_from, seed=4)}))
    dataset_of_two = catalog.get_as(RunRecord, "run_two").dataset
    fabricated.run(catalog, "four", dataset_of_two, merged.id, train=config["train"], config=config)
    again = fabricated.version(catalog, "second again", "", base.id, weights="adapter")
    catalog.store.write(f"models/{base.id}/MANIFEST.json", b"{}")
    record = next(one.id for one in RECORDS[:10] if trained(catalog, one.id))
    plan = plan_of(catalog, search(catalog, ErasureRequest("record", (record,))))
    plan = plan.model_copy(update={"runs": tuple(run for run in plan.runs if run.id == "run_four")})
    started: list[RunConfig] = []

    def train(config: RunConfig, *_: Any, **__: Any) -> RunRecord:
        assert full_base(catalog, catalog.model(config.base_model), config.train) == base
        started.append(config)
        return fabricated.run(catalog, "four again", dataset_of_two, "mv_merged_again")

    monkeypatch.setattr(pipeline, "train", train)
    outcome = retrain(catalog, plan, {}, Options(retrain="all"), {second.id: again.id})
    assert [(run["run"], run["fate"]) for run in outcome["runs"]] == [("run_four", "retrained")]
    assert outcome["versions"][merged.id] == "mv_merged_again"
    assert [(one.base_model, one.train.init_from) for one in started] == [(again.id, "merge")]


def test_reproduction_without_the_adapter_that_was_trained_on(catalog: Catalog, chain: list[ModelVersion]) -> None:
    base, first, *_ = chain
    catalog.store.write(f"models/{base.id}/MANIFEST.json", b"{}")
    with pytest.raises(
        NotFound, match=rf"run_two cannot be repeated, .*: models/{first.id} \(nothing says why\)\nhint"
    ) as refused:
        reproduce(catalog.store, "run_two")
    assert "backup" in refused.value.hint


def test_documents_name_what_each_cycle_started_from(catalog: Catalog, chain: list[ModelVersion]) -> None:
    base, first, second, merged, third = chain
    predicates = {version.id: statement(gather(catalog, version.id))["predicate"] for version in chain}
    definitions = {version: predicate["buildDefinition"] for version, predicate in predicates.items()}
    assert definitions[merged.id]["buildType"] == "urn:forge-ray:merge:1"
    needed = {
        version: {one["name"] for one in definition["resolvedDependencies"]} for version, definition in definitions.items()
    }
    assert needed[merged.id] == {second.id, base.id}
    assert needed[second.id] >= {base.id, first.id}
    assert needed[third.id] >= {merged.id}
    assert first.id not in needed[third.id]
    components = json.loads(bom(gather(catalog, third.id)))
    pedigrees = {
        one["bom-ref"]: {ancestor["name"] for ancestor in one["pedigree"]["ancestors"]}
        for one in (components["metadata"]["component"], *components["components"])
        if "pedigree" in one
    }
    assert pedigrees == {
        third.id: {merged.id},
        merged.id: {second.id},
        second.id: {base.id, first.id},
        first.id: {base.id},
    }
    events = [json.loads(line) for line in openlineage(gather(catalog, third.id)).splitlines()]
    inputs = {event["job"]["name"]: {one["name"] for one in event["inputs"]} for event in events}
    assert inputs["merge.merged"] == {second.id}
    assert inputs["train.two"] >= {base.id, first.id}


def trained(catalog: Catalog, record: str) -> bool:
    return "run_one" in trace(catalog, [of_record(record)]).affected.runs
