"""The lineage graph: resolving references, paths between records, and the drawing with each node once."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from forge_ray.cli.main import cli
from forge_ray.errors import NotFound
from forge_ray.governance import lineage_page
from forge_ray.governance.lineage import draw, lineage, path
from forge_ray.records import Deployment, EvalReport, FileEntry, ModelVersion, RunRecord, files_digest
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.resolve import resolve

pytestmark = pytest.mark.unit


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
    promotion.promote(catalog, tuned.id, "prod")
    return {"base": base.id, "run": run.id, "report": report.id, "tuned": tuned.id, "deployed": deployed.id}


def test_what_an_answer_carries_leads_to_its_deployment(catalog: Catalog, ids: dict[str, str]) -> None:
    tuned = catalog.get_as(ModelVersion, ids["tuned"])
    assert resolve(catalog, tuned.files_digest) == ids["deployed"]
    assert resolve(catalog, "fp_" + tuned.files_digest[len("sha256:") :][:12]) == ids["deployed"]
    assert resolve(catalog, "prod") == ids["tuned"]
    with pytest.raises(NotFound):
        resolve(catalog, "fp_0")  # too short to mean one thing


def test_path_between_two_records(catalog: Catalog, ids: dict[str, str]) -> None:
    assert path(catalog, ids["deployed"], ids["run"]) == [ids["deployed"], ids["tuned"], ids["run"]]
    assert path(catalog, ids["run"], ids["deployed"]) == [ids["run"], ids["tuned"], ids["deployed"]]
    alone = catalog.put(version("alone"))
    with pytest.raises(NotFound, match="are not connected"):
        path(catalog, alone.id, ids["run"])


def test_nodes_are_drawn_once_and_missing_ones_are_marked(catalog: Catalog, ids: dict[str, str]) -> None:
    text = "\n".join(draw(lineage(catalog, ids["deployed"], 3)))
    for name in ("base", "run", "report", "tuned"):
        assert len([line for line in text.splitlines() if ids[name] in line and "↑" not in line]) == 1
    assert "ds_gone  not in this store" in text
    assert f"used by {ids['deployed']}" in "\n".join(draw(lineage(catalog, ids["tuned"], 3)))


# ---------------------------------------------------------------- as a picture


def deep(catalog: Catalog, length: int) -> list[str]:
    """A chain of versions, each trained from the one before, with a report: dozens of nodes, many paths."""
    chain = [catalog.put(version("base <&> of a name far longer than any box is wide, 東京東京東京東京東京東京")).id]
    for number in range(length):
        run = catalog.put(run_of(chain[-1]).model_copy(update={"id": f"run_{number}"}))
        chain.append(catalog.put(version(f"v{number}", run.id, chain[-1])).id)
    promotion.promote(catalog, chain[-1], "prod")
    return chain


def test_boxes_and_texts_do_not_overlap(catalog: Catalog) -> None:
    chain = deep(catalog, 14)
    graph = lineage_page.graph_of(catalog, {"id": chain[7]})
    assert len(graph.nodes) == 1 + 14 * 2 + 1  # and the dataset that the runs name, which is not in this store
    assert graph.nodes[chain[-1]].status == "accepted · alias prod"
    places, width, height = lineage_page.places(graph)
    boxes = [(x, y) for name, (x, y) in places.items() if name in graph.nodes]
    for column in {x for x, _ in boxes}:
        ys = sorted(y for x, y in boxes if x == column)
        assert all(below - above >= lineage_page.BOX_H for above, below in pairwise(ys))
    assert all(0 <= x <= width - lineage_page.BOX_W and 0 <= y <= height - lineage_page.BOX_H for x, y in boxes)
    level = {name: places[name][0] for name in graph.nodes}
    assert all(level[parent] < level[child] for parent, child in graph.edges)
    drawn = ElementTree.fromstring(lineage_page.svg(graph))
    texts = [element.text or "" for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert len(drawn.findall("{http://www.w3.org/2000/svg}path")) == len(graph.edges)
    assert any(text.startswith("base <&> of") and text.endswith("…") for text in texts)
    assert max(map(len, texts)) <= lineage_page.CHARS


def test_a_text_is_cut_to_its_columns() -> None:
    assert lineage_page.cut("short", 5) == "short"
    assert lineage_page.cut("longer", 5) == "long…"
    assert lineage_page.cut("東京東京", 5) == "東京…"
    assert lineage_page.cut("a\nb", 5) == "a b"


def test_the_page_holds_all_and_loads_nothing(catalog: Catalog, ids: dict[str, str], tmp_path: Path) -> None:
    svg, html = tmp_path / "g.svg", tmp_path / "g.html"
    fingerprint = "fp_" + catalog.get_as(ModelVersion, ids["tuned"]).files_digest[len("sha256:") :][:12]
    words = ["lineage", fingerprint, "--svg", str(svg), "--html", str(html), "--store", catalog.store.root]
    assert CliRunner().invoke(cli, words).exit_code == 0
    page = html.read_text(encoding="utf-8")
    for identifier in ids.values():
        assert identifier in svg.read_text(encoding="utf-8")
        assert f"<code>{identifier}</code>" in page
    assert not re.search(r"<script|<link|src=|href=|@import|url\(", page)
    assert set(re.findall(r"https?://[^\"]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert CliRunner().invoke(cli, [*words[:4], "--to", ids["base"], *words[-2:]]).exit_code == 2
