"""Validation in a task beside Ray Train's workers; what is killed there is an incident and no more."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from forge_ray import pipeline
from forge_ray.config.base import load, parse, resolved
from forge_ray.config.release import DeployConfig, EvalConfig
from forge_ray.config.run import RunConfig
from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.evaluate.items import items_of
from forge_ray.evaluate.standalone import Compared
from forge_ray.governance.impact import StoreUses
from forge_ray.governance.lineage import described, tree
from forge_ray.records import EvalReport, Event, RunRecord, canonical_json
from forge_ray.release import candidates, promotion
from forge_ray.release.compare_runs import attempts
from forge_ray.store import audit_log
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.signatures import record_path
from forge_ray.store.uses import marked
from forge_ray.train import incidents, loop, validating, validation
from forge_ray.train.job import TrainJob

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
RUN = Path(__file__).parents[1] / "e2e" / "run.yaml"
SETTINGS = (
    "train.max_steps=4",
    "train.adapter={r: 4}",
    *("train.engine=torch", "train.zero_stage=0", "train.scaling.num_workers=1"),
    "train.checkpoint={every_steps: 2, keep: 2}",
    "train.validation={every_steps: 2, background: true, keep_best: true}",
    "train.guards.hang_slack_s=200",  # the loop below waits
)


@pytest.fixture(scope="module", autouse=True)
def functions_travel_by_value(ray_cluster: None) -> None:
    """Workers cannot import a test module."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def killed_at_two(values: dict[str, Any], step: int) -> None:
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    validating.validate_checkpoint(values, step)


def slow_loop(values: dict[str, Any]) -> None:
    """The real loop; a step takes as long as a validation, so that each checkpoint is asked for."""
    import time

    from forge_ray.train import loop, metrics, validation

    job, real = TrainJob.from_json(values), metrics.append

    def append(folder: Path, line: dict[str, Any]) -> None:
        real(folder, line)
        until = time.monotonic() + 60
        while any(result.is_pending for result in validation.read(job.store, job.run)) and time.monotonic() < until:
            time.sleep(0.1)

    metrics.append = append
    loop.train_loop(values)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load(RunConfig, RUN, SETTINGS)


@pytest.fixture(scope="module")
def record(config: RunConfig, store: Store) -> RunRecord:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_loop", slow_loop)
        patch.setattr(validating, "validate_checkpoint", killed_at_two)
        return pipeline.train(config, store)


def test_killed_validation_task_is_an_incident_and_changes_nothing(store: Store, record: RunRecord) -> None:
    assert len(record.attempts) == 1
    (incident,) = incidents.read(store, record.id)
    assert (incident["kind"], incident["step"]) == ("validation", 2)
    results = {result.step: result for result in validation.read(store, record.id)}
    assert sorted(results) == [2, 4]
    assert record.incidents == (incident,)
    assert all(result.background for result in results.values())
    assert (results[2].loss, "WorkerCrashed" in results[2].problem) == (None, True)

    assert record.metrics["best_step"] == 4
    assert record.metrics["validation_loss"] == record.metrics["best_validation_loss"] == results[4].loss


def before_its_record(store: Store, record: RunRecord, folder: Path) -> Store:
    """A copy of the store as it was before the run had its record."""
    earlier = Store(str(shutil.copytree(store.root, folder)))
    lines = audit_log.lines(store)
    end = next(number for number, line in enumerate(map(json.loads, lines)) if line["path"] == record_path(record))
    for line in lines[end:]:
        earlier.delete(json.loads(line)["path"])
    earlier.write(audit_log.LOG, b"".join(line + b"\n" for line in lines[:end]))
    earlier.write(audit_log.HEAD, lines[end - 1])
    return earlier


def test_checkpoint_is_served_by_version_id_only(store: Store, record: RunRecord, tmp_path: Path) -> None:
    """Of a run that has no record yet; the tuned weights answer, and the way back reaches run and dataset."""
    from forge_ray.inference.engine import GenerationRequest
    from forge_ray.inference.load import load_engine
    from forge_ray.serve.deploy import deployment_of
    from forge_ray.serve.engines import fetch_version

    store = before_its_record(store, record, tmp_path / "earlier")
    with Catalog.open(store) as catalog:
        catalog.append(Event(kind="run", subject=record.id, data={"state": "running"}))
    version = candidates.export_run(store, record.id, "2")
    assert (version.status, version.step, version.run, version.weights) == ("candidate", 2, record.id, "adapter")
    assert candidates.export_run(store, record.id, "2") == version
    with Catalog.open(store) as catalog:
        with pytest.raises(PolicyError, match=f"step 2 of {record.id}, which no gate has judged"):
            promotion.promote(catalog, version.id, "live")
        origins = {node["id"]: node["label"] for node in tree(catalog, version.id)["origins"]}
        assert origins[record.id] == "not finished"
        assert record.dataset in origins
        deploy_config = parse(DeployConfig, {"name": "bot", "models": [version.id], "engine": {"precision": "fp32"}})
        deployment = deployment_of(deploy_config, catalog)
    assert deployment.model_version == version.id
    adapter = fetch_version(store, version.id)[1]
    base = fetch_version(store, version.base_model)[1]
    engine = load_engine(base, adapter, deploy_config.engine, use_gpu=False)
    try:
        (answer,) = engine.generate([GenerationRequest(prompt_ids=(5, 6, 7), max_new_tokens=4)])
        assert len(answer.token_ids) > 0
    finally:
        engine.close()
    best = candidates.export_run(store, record.id, "best")
    assert (best.step, best.files_digest != version.files_digest) == (4, True)
    assert candidates.export_run(store, record.id, "last") == best
    with pytest.raises(NotFound, match="no checkpoint of step 5"):
        candidates.export_run(store, record.id, "5")


def test_checkpoint_is_evaluated_while_its_run_has_no_record(store: Store, record: RunRecord, tmp_path: Path) -> None:
    """The report is of the run and the step; nothing of the run changes, and nothing is left behind."""
    earlier = before_its_record(store, record, tmp_path / "earlier")
    with Catalog.open(earlier) as catalog:
        catalog.append(Event(kind="run", subject=record.id, data={"state": "running"}))
    names = (f"{record.id}@2", f"{record.id}@best", f"{record.id}@last")
    before = earlier.list(f"runs/{record.id}", recursive=True)
    config = EvalConfig(max_examples=4, max_new_tokens=2)
    first, best, last = pipeline.evaluate_models(Compared(names), record.dataset, config, earlier, {})
    assert (first.subject, first.step, first.evaluated) == (record.id, 2, names[0])
    assert (best.id, best.step) == (last.id, 4)
    assert first.subject_digest == candidates.export_run(earlier, record.id, "2").files_digest != best.subject_digest
    assert earlier.list(f"runs/{record.id}", recursive=True) == before
    assert marked(earlier) == {}
    assert pipeline.evaluate_models(Compared(names[:1]), record.dataset, config, earlier, {}) == [first]
    with Catalog.open(earlier) as catalog:
        assert f"{record.id}@2" in {one.subject for one in StoreUses.of(catalog).reached([], held_out(first, catalog)).evals}
        origins = {node["id"]: node["label"] for node in tree(catalog, first.id)["origins"]}
        assert origins == {record.id: "not finished", record.dataset: origins[record.dataset]}
        assert "checkpoint of step 2" in described(catalog, first.id)[1]
        own = [one for one in attempts(catalog) if one.run == record.id]
        assert [one.report for one in own] == [None]  # the score of a run is that of its export
    for name, error, says in (
        (f"{record.id}@3", NotFound, "no checkpoint of step 3"),
        (f"{record.id}@newest", ConfigError, "'newest' is not a step"),
        (record.id, NotFound, "is not finished"),
        ("run_0@2", NotFound, "'run_0' has no checkpoint"),
    ):
        with pytest.raises(error, match=says) as caught:
            pipeline.evaluate_models(Compared((name,)), record.dataset, config, earlier, {})
        assert caught.value.hint
        if name.endswith("@3"):
            assert "4, 2" in caught.value.hint


def held_out(report: EvalReport, catalog: Catalog) -> list[tuple[str, str, str]]:
    return [(item["record"], report.dataset, report.split) for item in items_of(catalog.store, report)]


def test_export_refusals_are_explained(store: Store, record: RunRecord, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"'newest' is not a step of {record.id}"):
        candidates.export_run(store, record.id, "newest")
    with pytest.raises(NotFound, match="'run_0' has no checkpoint"):
        candidates.export_run(store, "run_0", "last")
    better = validation.Result(3, loss=0.0)
    validation.write(store, record.id, better)
    with pytest.raises(NotFound, match="was at step 3, whose checkpoint is gone") as caught:
        candidates.export_run(store, record.id, "best")
    assert "keep_best" in caught.value.hint
    store.delete(f"runs/{record.id}/validations/00000003.json")

    earlier = before_its_record(store, record, tmp_path / "earlier")  # a record's own settings would count
    (written,) = [path for path in earlier.list(f"runs/{record.id}") if "config-" in path]
    settings = earlier.read_json(written)
    earlier.write(written, canonical_json(settings | {"train": settings["train"] | {"seed": 7}}))
    with pytest.raises(ConfigError, match="was trained with settings that mean something else"):
        candidates.export_run(earlier, record.id, "last")


def test_keep_best_without_validation_rows_is_refused(config: RunConfig, store: Store) -> None:
    values = resolved(config)
    values["data"]["splits"]["validation"] = 0.0
    with pytest.raises(ConfigError, match="has no validation rows") as caught:
        pipeline.train(parse(RunConfig, values), store)
    assert "data.splits.validation" in caught.value.hint
