"""Three training cycles, each on the version of the one before: `continue`, then `merge`. What the first cycle learned from
a row is followed through all of them, erased and trained again in order, and every run is reproduced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_erase import config_of, forge, own, rows

from forge_ray import pipeline
from forge_ray.cli.main import cli
from forge_ray.config.base import parse
from forge_ray.config.run import RunConfig
from forge_ray.data.dataset.version import SPLITS, read_records
from forge_ray.errors import DataError
from forge_ray.governance.erasure.apply import erase
from forge_ray.governance.erasure.options import Options
from forge_ray.governance.erasure.search import ErasureRequest
from forge_ray.governance.reproduce import reproduce
from forge_ray.governance.trace import of_subject_value, trace
from forge_ray.papers.facts import gather
from forge_ray.papers.model_card import model_card
from forge_ray.pipeline import Outcome
from forge_ray.records import DatasetManifest, ModelVersion, RunRecord
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = [pytest.mark.e2e, pytest.mark.large, pytest.mark.usefixtures("ray_cluster")]
__all__ = ["own"]


def three_cycles(store: Store, folder: Path) -> list[Outcome]:
    """Her rows are in the first cycle alone."""
    hers, others = [row for row in rows() if row["customer"] == "wq"], [row for row in rows() if row["customer"] != "wq"]
    parts = (others[:40] + hers, others[30:65], others[60:])
    outcomes: list[Outcome] = []
    for number, (part, init_from) in enumerate(zip(parts, (None, "continue", "merge"), strict=True), start=1):
        path = folder / f"cycle-{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        values: dict[str, Any] = config_of(path, steps=4).model_dump(mode="json")
        values["base_model"] = outcomes[-1].version.id if outcomes else "tiny"
        values["train"]["init_from"] = init_from
        outcomes.append(pipeline.run(parse(RunConfig, values), store))
    return outcomes


def card_of(store: Store, version: str) -> str:
    with Catalog.open(store) as catalog:
        return model_card(gather(catalog, version)).decode()


def test_three_cycles_are_traced_reproduced_and_erased_as_one(own: Store, tmp_path: Path) -> None:
    cycles = three_cycles(own, tmp_path)
    versions, runs = [one.version.id for one in cycles], [one.run.id for one in cycles]
    with Catalog.open(own) as catalog:
        merged = catalog.get_as(ModelVersion, cycles[2].run.base_model)
        assert (merged.status, merged.weights, merged.base_model) == ("merged", "full", versions[1])
        assert (cycles[1].run.initial_adapter, cycles[1].run.base_model) == (versions[0], cycles[0].run.base_model)
        assert cycles[2].version.base_model == merged.id
        affected = trace(catalog, [of_subject_value(catalog, "wq")]).affected
        assert set(affected.runs) == set(runs)
        assert set(affected.versions) == {*versions, merged.id}
    again = pipeline.train(parse(RunConfig, cycles[2].run.config), own)
    assert again == cycles[2].run  # the merged version is made once
    tree = json.dumps(forge(own, "lineage", versions[2]))
    assert all(name in tree for name in (*versions, *runs, merged.id))
    folder = tmp_path / "papers"
    assert forge(own, "papers", versions[2], "--out", str(folder))["missing"] == []
    bom = json.loads((folder / "bom.cdx.json").read_text())
    components = {component.get("bom-ref") for component in bom["components"]}
    assert {merged.id, versions[1], versions[0], cycles[0].run.base_model} <= components
    assert f"The run trained the adapter of {versions[0]} on." in card_of(own, versions[1])
    assert f"{versions[1]} merged into {cycles[0].run.base_model}" in card_of(own, merged.id)
    for run in runs:
        assert reproduce(own, run)["verdict"] == "equal"

    plan = forge(own, "erase", "--subject", "wq", "--plan")
    assert {run["id"]: run["used"] for run in plan["runs"]} == dict.fromkeys(runs, True)
    assert [run["begun"] for run in plan["runs"]] == ["", versions[0], versions[1]]
    assert {version["id"] for version in plan["versions"]} == {*versions, merged.id}
    certificate = erase(own, ErasureRequest("subject", ("wq",)), Options(retrain="all"))["predicate"]
    assert [run["fate"] for run in certificate["runs"]] == ["retrained"] * 3
    replaced = {version["version"]: version["replaced_by"] for version in certificate["versions"]}
    assert all(replaced.values())
    with Catalog.open(own) as catalog:
        last = catalog.model(replaced[versions[2]])
        assert catalog.model("parcels@prod").id == last.id
        assert last.base_model == replaced[merged.id]
        assert catalog.get_as(ModelVersion, last.base_model).base_model == replaced[versions[1]]
        second = catalog.get_as(RunRecord, catalog.model(replaced[versions[1]]).run)
        assert second.initial_adapter == replaced[versions[0]]
        for version in (*versions, merged.id):
            assert not own.list(f"models/{version}", recursive=True)
    for path in (path for path in Path(own.root).rglob("*") if path.is_file() and path.suffix != ".parquet"):
        assert b"Quartz" not in path.read_bytes()


def test_versions_that_a_cycle_cannot_start_from_are_refused(own: Store, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()[:40]))
    one = pipeline.run(config_of(path, steps=2), own)

    def message(**train: Any) -> str:
        values: dict[str, Any] = config_of(path, steps=2).model_dump(mode="json")
        values |= {"base_model": one.version.id, "train": values["train"] | train}
        file = tmp_path / "next.yaml"
        file.write_text(json.dumps(values))
        result = CliRunner().invoke(cli, ["train", str(file), "--store", own.uri, "--json"])
        assert result.exit_code in (2, 3), result.output
        error = json.loads(result.stdout.splitlines()[-1])["error"]
        return f"{error['message']}; {error['hint']}"

    assert "train.init_from=continue trains this adapter on" in message()
    adapter = {"r": 4}
    assert "has r=4" in message(init_from="continue", adapter=adapter | {"r": 8})
    assert "set train.adapter.alpha=32" in message(init_from="continue", adapter=adapter | {"alpha": 16})
    assert "has method=lora" in message(init_from="continue", adapter=adapter | {"method": "rslora"})
    assert "not down_proj, gate_proj" in message(init_from="continue", adapter=adapter | {"target_modules": ["q_proj"]})
    assert "init_from=continue without an adapter" in message(init_from="continue", adapter=None)
    with Catalog.open(own) as catalog:
        promotion.archive(catalog, one.version.id)
    for mode in ("continue", "merge"):
        assert f"{one.version.id} is archived" in message(init_from=mode)
    erase(own, ErasureRequest("file", (str(path),)), Options(retrain="none"))
    for mode in ("continue", "merge"):
        assert "learned from rows that er_" in message(init_from=mode)


def test_test_rows_of_an_earlier_cycle_are_not_trained_on(own: Store, tmp_path: Path) -> None:
    """The share of the test split falls from 0.2 to nothing: what was tested is dropped, counted and kept, and a rebuild
    from the sources gives the same dataset."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()[:60]))
    one = pipeline.run(config_of(path, steps=2), own)
    tested = {row["record"] for row in read_records(own, one.dataset, "test")}
    values: dict[str, Any] = config_of(path, steps=2).model_dump(mode="json")
    values["base_model"], values["train"]["init_from"] = one.version.id, "continue"
    values["data"]["splits"] = {"test": 0.0, "validation": 0.1}
    with pytest.raises(DataError, match="no records in its test split: a run on it could not be evaluated"):
        pipeline.run(parse(RunConfig, values), own)  # before it trains
    two = pipeline.train(parse(RunConfig, values), own)
    with Catalog.open(own) as catalog:
        manifest = catalog.get_as(DatasetManifest, two.dataset)
    (step,) = [step for step in manifest.curation if step.rule == "held_out"]
    assert step.before - step.after == len(tested) > 5
    assert step.reasons == {f"a test row of {one.dataset.id}": len(tested)}
    assert not tested & {row["record"] for split in SPLITS for row in read_records(own, manifest, split)}
    assert reproduce(own, two.id, rebuild_data=True)["verdict"] == "equal"
