"""From a teacher to its student: shrunk, distilled, judged, released, traced to the teacher's rows, repeated, erased."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from forge_ray import pipeline
from forge_ray.cli.main import cli
from forge_ray.config.base import load
from forge_ray.config.run import RunConfig
from forge_ray.data.dataset.stream import Rows
from forge_ray.errors import ConfigError, PolicyError
from forge_ray.governance.erasure.apply import erase
from forge_ray.governance.erasure.options import Options
from forge_ray.governance.erasure.search import ErasureRequest
from forge_ray.governance.lineage import lineage
from forge_ray.governance.reproduce import reproduce
from forge_ray.governance.trace import of_record, trace
from forge_ray.models.import_model import import_model
from forge_ray.papers.facts import gather
from forge_ray.papers.model_card import model_card
from forge_ray.records import ModelVersion, RunRecord
from forge_ray.release import promotion
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train.preflight import Assumptions

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
RUN = Path(__file__).parents[1] / "e2e" / "run.yaml"
TRAIN = (
    "{max_steps: 8, global_batch: 4, micro_batch_size: 4, optimizer: {lr: 5.0e-3}, engine: torch, zero_stage: 0,"
    " precision: fp32, scaling: {num_workers: 0}"
)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Store:
    """A store of its own: rows are erased in it."""
    store = Store(str(tmp_path_factory.mktemp("distil")))
    with Catalog.open(store) as catalog:
        base = import_model(catalog, tiny_model_dir, "tiny-llama", licence="apache-2.0")
        promotion.promote(catalog, base.id, "tiny")
    return store


def rows(folder: Path, name: str, start: int) -> Path:
    """Every second row of the colours: teacher and student learn from different ones."""
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join((RUN.parent / "colours.jsonl").read_text().splitlines()[start::2]))
    return path


def config(name: str, base: str, data: Path, train: str, *overrides: str) -> RunConfig:
    here = (
        f"name={name}",
        f"base_model={base}",
        f"data.sources=[{{path: {data}}}]",
        f"train={TRAIN}, {train}}}",
        f"release={{alias: {name}}}",
        "deploy=null",
    )
    return load(RunConfig, RUN, (*here, *overrides))


def forge(store: Store, *words: str) -> Any:
    result = CliRunner().invoke(cli, [*words, "--store", store.root, "--json"])
    return result, json.loads(result.stdout) if result.stdout else None


def test_teacher_to_student(own: Store, tmp_path: Path) -> None:
    teacher = pipeline.run(config("teacher", "tiny", rows(tmp_path, "theirs", 0), "adapter: {r: 8}"), own)
    assert teacher.version.weights == "adapter"
    result, small = forge(own, "models", "shrink", "tiny", "--layers", "0", "--out", "tiny-half", "--alias", "half")
    assert result.exit_code == 0, result.output
    assert small["source"].startswith("layers 0 of tiny-llama mv_")
    method = "method: {kind: distil, teacher: teacher, k: 16, hard_weight: 0.2}"
    student = config("student", "half", rows(tmp_path, "ours", 1), method)
    estimate = pipeline.plan(student, own, Assumptions())
    assert estimate.plan.reference_bytes > 0
    assert estimate.plan.reference_memory > 0
    outcome = pipeline.run(student, own)
    run, version = outcome.run, outcome.version
    assert run.method == "distil"
    assert run.frozen_model == teacher.version.id
    assert version.weights == "full"
    with Catalog.open(own) as catalog:
        base = catalog.model("tiny")
    kept = [path for path in own.list(paths.reference(outcome.dataset.id), recursive=True) if path.endswith("made_by.json")]
    assert own.read_json(kept[0])["versions"] == [teacher.version.id, base.id]
    files = [path for path in own.list(kept[0].rpartition("/")[0]) if path.endswith(".parquet")]
    assert 0 < sum(map(own.size, files)) < estimate.plan.reference_bytes * 1.5

    result, audit = forge(own, "audit", "data", run.id)
    assert result.exit_code == 0, result.output
    assert audit["reference"]["largest_difference"] < 1e-3
    assert reproduce(own, run.id)["verdict"] == "equal"

    record = Rows.of(own, teacher.dataset, "train").records([0])[0][0]
    with Catalog.open(own) as catalog:
        reached = trace(catalog, [of_record(record)]).reached
        assert {one.run: one.how for one in reached.runs} == {teacher.run.id: "trained", run.id: "frozen"}
        assert version.id in {one.version for one in reached.versions}
        assert teacher.version.id in str(lineage(catalog, version.id, 0)["origins"])
        card = model_card(gather(catalog, version.id)).decode()
    assert f"It is a distillate of teacher ({teacher.version.id}, licence apache-2.0)" in card

    many = config("student", "half", rows(tmp_path, "ours", 1), method.replace("k: 16", "k: 100000"))
    for verb in (pipeline.prepare, pipeline.train):
        with pytest.raises(ConfigError, match="exceeds the vocabulary"):
            verb(many, own)

    erase(own, ErasureRequest("record", (record,)), Options(wait_s=5.0))
    with Catalog.open(own) as catalog:
        withdrawn = catalog.withdrawn()
        assert {teacher.version.id, version.id} <= withdrawn.keys()
        runs = [one for one in catalog.all(RunRecord) if one.method == "distil"]
        (again,) = [one for one in runs if one.id != run.id]
        assert again.frozen_model not in ("", teacher.version.id)
        assert again.frozen_model not in withdrawn
        assert isinstance(catalog.get(again.frozen_model), ModelVersion)
    assert not [path for path in kept if own.exists(path)]
    by_id = method.replace("teacher: teacher", f"teacher: {teacher.version.id}")
    with pytest.raises(PolicyError, match="learned from rows"):
        pipeline.train(config("late", "half", rows(tmp_path, "ours", 1), by_id), own)
