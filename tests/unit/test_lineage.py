"""From any id to any other, by what a person can type, and drawn once per node."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray.catalog import Catalog
from forge_ray.errors import NotFound
from forge_ray.lineage import draw, lineage, path, resolve
from forge_ray.records import Deployment, EvalReport, FileEntry, ModelVersion, RunRecord, files_digest
from forge_ray.store import Store

pytestmark = pytest.mark.unit


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(Store(str(tmp_path / "store")))


def version(name: str, run: str = "", base: str = "", evals: tuple[str, ...] = ()) -> ModelVersion:
    files = (FileEntry(path="model.safetensors", size=1, sha256=name),)
    return ModelVersion(
        name=name,
        status="accepted" if run else "imported",
        weights="full",
        files=files,
        files_digest=files_digest(files),
        base_model=base,
        run=run,
        evals=evals,
        licence="apache-2.0",
    ).sealed()


def run_of(base: str) -> RunRecord:
    return RunRecord(
        id="run_1",
        name="r",
        method="sft",
        config={},
        config_digest="",
        dataset="ds_gone",
        base_model=base,
        base_digest="",
        seed=0,
        num_steps=3,
        samples_seen=12,
        order_digest="",
        attempts=(),
        code_digest="",
        environment={},
        metrics={},
        export=(),
        export_kind="full",
    )


@pytest.fixture
def ids(catalog: Catalog) -> dict[str, str]:
    base = catalog.put(version("base"))
    run = catalog.put(run_of(base.id))
    report = catalog.put(
        EvalReport(
            subject=run.id,
            subject_digest="",
            dataset="ds_gone",
            split="test",
            config={},
            num_examples=1,
            metrics={"loss": 1.0},
            per_class={},
            items_sha256="",
        ).sealed()
    )
    tuned = catalog.put(version("tuned", run.id, base.id, (report.id,)))
    deployed = catalog.put(
        Deployment(
            name="d", model="d", model_version=tuned.id, model_digest=tuned.files_digest, config={}, config_digest=""
        ).sealed()
    )
    catalog.promote(tuned.id, "prod")
    return {"base": base.id, "run": run.id, "report": report.id, "tuned": tuned.id, "deployed": deployed.id}


def test_what_an_answer_carries_leads_to_its_deployment(catalog: Catalog, ids: dict[str, str]) -> None:
    tuned = catalog.get_as(ModelVersion, ids["tuned"])
    assert resolve(catalog, tuned.files_digest) == ids["deployed"]
    assert resolve(catalog, "fp_" + tuned.files_digest[len("sha256:") :][:12]) == ids["deployed"]
    assert resolve(catalog, "prod") == ids["tuned"]
    with pytest.raises(NotFound):
        resolve(catalog, "fp_0")  # too short to mean one thing


def test_the_chain_between_any_two(catalog: Catalog, ids: dict[str, str]) -> None:
    assert path(catalog, ids["deployed"], ids["run"]) == [ids["deployed"], ids["tuned"], ids["run"]]
    assert path(catalog, ids["run"], ids["deployed"]) == [ids["run"], ids["tuned"], ids["deployed"]]
    alone = catalog.put(version("alone"))
    with pytest.raises(NotFound, match="nothing joins"):
        path(catalog, alone.id, ids["run"])


def test_every_node_is_drawn_once_and_what_is_missing_is_said(catalog: Catalog, ids: dict[str, str]) -> None:
    text = "\n".join(draw(lineage(catalog, ids["deployed"], 3)))
    for name in ("base", "run", "report", "tuned"):
        assert len([line for line in text.splitlines() if ids[name] in line and "↑" not in line]) == 1
    assert "ds_gone  not in this store" in text
    assert f"used by {ids['deployed']}" in "\n".join(draw(lineage(catalog, ids["tuned"], 3)))
