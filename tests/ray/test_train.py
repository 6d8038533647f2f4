"""Training on Ray Train's workers: Ray Data feeds them, ZeRO shards them, and a killed worker changes nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge_ray import pipeline
from forge_ray.config.base import load, parse, resolved
from forge_ray.config.run import RunConfig
from forge_ray.data.dataset.order import order_of
from forge_ray.data.dataset.stream import Rows
from forge_ray.errors import ConfigError, TrainingError
from forge_ray.governance.reproduce import reproduce
from forge_ray.governance.trace import of_file, trace
from forge_ray.machine import environment
from forge_ray.records import DatasetManifest, RunRecord, canonical_json
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train import audit, launch, metrics, preflight
from forge_ray.train.job import TrainJob, run_id

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
RUN = Path(__file__).parents[1] / "e2e" / "run.yaml"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    cadence = "train.checkpoint={every_steps: 2, asynchronous: false}"  # where a killed run goes on is then known
    return load(RunConfig, RUN, ("train.max_steps=6", cadence, "train.adapter={dropout: 0.1}"))


@pytest.fixture(scope="module", autouse=True)
def loops_travel_by_value(ray_cluster: None) -> None:
    """Workers cannot import a test module."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def manifest(config: RunConfig, store: Store, ray_cluster: None) -> DatasetManifest:
    return pipeline.prepare(config, store)


@pytest.fixture(scope="module")
def record(config: RunConfig, store: Store, manifest: DatasetManifest) -> RunRecord:
    """The run of `config`, trained once for this file."""
    return pipeline.train(config, store)


def job_of(config: RunConfig, store: Store, manifest: DatasetManifest, seed: int) -> TrainJob:
    train = config.train.model_copy(update={"seed": seed})
    with Catalog.open(store) as catalog:
        base = catalog.model("tiny")
    identifier = run_id(train, "fp32", manifest, base)
    return TrainJob(identifier, config.name, train, store, manifest, base, "fp32", under_ray=True)


def controller() -> int:
    """Ray Train's, on this node: its raylet is the parent of all workers."""
    for folder in (path for path in Path("/proc").iterdir() if path.name.isdecimal()):
        with suppress(OSError):  # it has just ended
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getppid() and b"ray::TrainController" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    raise AssertionError("no controller runs")


def loop_with_two_kills(values: dict[str, Any]) -> None:
    """The real loop, of which a process is killed at the start of an attempt's fourth step: the second rank in the first
    attempt, Ray Train's controller in the second, whose rank waits until Ray ends it too."""
    from forge_ray.train import context, loop, step

    job = TrainJob.from_json(values)
    folder = job.store.local(f"runs/{job.run}/killed")
    folder.mkdir(parents=True, exist_ok=True)
    victims = {"rank": os.getpid, "controller": controller}
    left = [name for name in victims if not (folder / name).exists()]
    steps = 0
    real = context.sum_over_ranks

    def counting(numbers: list[float], at: context.Context) -> list[float]:
        nonlocal steps
        steps += len(numbers) > 5  # the counts at the head of each step
        if steps == 4 and at.rank == 1 and left:
            pid = victims[left[0]]()
            (folder / left[0]).touch()
            os.kill(pid, signal.SIGKILL)
            time.sleep(600)
        return real(numbers, at)

    step.sum_over_ranks = counting
    loop.train_loop(values)


def failing(values: dict[str, Any]) -> None:
    raise ZeroDivisionError("the worker's own reason")


def exported(job: TrainJob) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in job.store.files(f"runs/{job.run}/export")}


def test_run_whose_rank_and_controller_are_killed_is_bit_identical(
    config: RunConfig, store: Store, manifest: DatasetManifest, record: RunRecord
) -> None:
    """Compared with the run of the pipeline, in which nobody dies."""
    job = replace(job_of(config, store, manifest, seed=0), run="run_killed", name="killed")
    launch.fit(loop_with_two_kills, job)
    assert {path.name for path in store.local(f"runs/{job.run}/killed").iterdir()} == {"rank", "controller"}
    result = store.read_json(f"runs/{job.run}/result.json")
    assert [attempt["first_step"] for attempt in result["attempts"]] == [0, 2, 4]
    assert {attempt["world_size"] for attempt in result["attempts"]} == {2}
    restarted_from = [incident["step"] for incident in result["incidents"] if incident["kind"] == "restart"]
    assert restarted_from == [2, 4]
    assert len(result["incidents"]) == 2  # no row is blamed by the rank that lost its peer
    lines = metrics.read(store.local(f"runs/{job.run}/{metrics.METRICS}"))
    order = order_of(manifest, "train", job.config.seed, job.config.global_batch)
    facts = audit.DataFacts(job.run, Rows.of(store, manifest, "train"), order, 6, result["order_digest"], lines)
    assert audit.audit(facts, lambda done, total, text: None).problems == ()
    assert len(record.attempts) == 1
    assert exported(job) == {entry.path: entry.sha256 for entry in record.export}


def test_pipeline_trains_once_and_reuses_the_run(
    config: RunConfig,
    store: Store,
    manifest: DatasetManifest,
    record: RunRecord,
    capsys: pytest.CaptureFixture[str],
) -> None:
    order = order_of(manifest, "train", 0, config.train.global_batch)
    assert record.order_digest == order.digest(6)
    assert record.samples_seen == 6 * config.train.global_batch
    assert record.metrics["trained_tokens"] > 0
    assert record.config == resolved(config)
    assert record.attempts[-1]["environments"] == [record.environment_digest]  # one machine, both workers
    lock = environment.read(store, record.environment_digest)
    assert (lock["threads"], lock["hardware"]) == (1, record.hardware)

    again = pipeline.train(config, store)
    assert again == record
    assert "already trained, no version made of it yet" in capsys.readouterr().err
    more_workers = parse(
        RunConfig, resolved(config) | {"train": resolved(config)["train"] | {"scaling": {"num_workers": 4}}}
    )
    assert pipeline.train(more_workers, store).id == record.id


@pytest.mark.large
def test_reproduction_with_rebuilt_data_is_equal(store: Store, record: RunRecord) -> None:
    report = reproduce(store, record.id, rebuild_data=True)
    assert (report["verdict"], report["differences"]) == ("equal", {})
    with Catalog.open(store) as catalog:
        assert catalog.events("reproduction", record.id)[-1].data["state"] == "equal"


def test_audit_proves_which_rows_were_used(
    config: RunConfig, store: Store, manifest: DatasetManifest, record: RunRecord
) -> None:
    """And it fails when the record is not whole, or a row was another."""
    facts = audit.facts_of(store, record.id)
    report = audit.audit(facts, lambda done, total, text: None)
    assert report.problems == ()
    assert report.steps_compared == report.num_steps == 6
    assert sum(int(times) * count for times, count in report.times_used.items()) == record.samples_seen
    rows = audit.records_of(facts.rows, facts.order, 3)
    assert [item["lane"] for item in rows] == list(range(config.train.global_batch))
    assert all(name.startswith("rec_") for item in rows for name in item["records"])

    lines = [line | {"rows_sum": line["rows_sum"] + (line["step"] == 4)} for line in facts.lines if line["step"] != 2]
    problems = audit.audit(replace(facts, lines=lines, order_digest="sha256:0"), lambda done, total, text: None).problems
    assert [problem.split(":")[0] for problem in problems] == [
        "the order's digest is sha256",
        "1 of 6 steps are not on record, the first is step 2",
        "step 4 was given other rows",
    ]


def test_trace_names_the_steps_that_the_audit_proves(
    config: RunConfig, store: Store, manifest: DatasetManifest, record: RunRecord
) -> None:
    """From every row of the source file, and back from every step."""
    facts = audit.facts_of(store, record.id)
    steps = range(1, facts.num_steps + 1)
    used = {
        step: [rec for lane in audit.records_of(facts.rows, facts.order, step) for rec in lane["records"]] for step in steps
    }
    assert store.exists(f"index/{manifest.id}")
    with Catalog.open(store) as catalog:
        queries = of_file(catalog, str(RUN.with_name("colours.jsonl")))
        report = trace(catalog, queries)
    assert report.nowhere == ()
    held = Counter(held.place.split for one in report.records for held in one.held if held.dataset == manifest.id)
    assert held == {split: stats.num_records for split, stats in manifest.splits.items() if stats.num_records}
    traced = {
        one.record: Counter(use.steps)
        for one in report.records
        for use in one.uses
        if (use.run, use.how) == (record.id, "trained")
    }
    expected: dict[str, Counter[int]] = {}
    for step, records in used.items():
        for name in records:
            expected.setdefault(name, Counter())[step] += 1
    assert traced == expected


def test_second_driver_of_a_run_is_refused(config: RunConfig, store: Store, manifest: DatasetManifest) -> None:
    job = job_of(config, store, manifest, seed=3)
    other = parse(RunConfig, resolved(config) | {"train": resolved(config)["train"] | {"seed": 3}})
    path = f"runs/{job.run}/driver.json"
    holder = {"token": "t", "host": "elsewhere", "boot": "", "pid": 7, "started": "1", "at": "now"}
    store.write(path, canonical_json(holder))
    with pytest.raises(TrainingError, match="being trained by another driver: pid 7 on elsewhere"):
        pipeline.train(other, store)
    assert store.read_json(path) == holder
    assert not store.exists(f"runs/{job.run}/attempts")


def test_run_that_cannot_fit_is_refused_before_it_starts(
    config: RunConfig, store: Store, manifest: DatasetManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = resolved(config)["train"] | {"seed": 4, "micro_batch_size": 4}
    greedy = parse(RunConfig, resolved(config) | {"train": train})
    needs = pipeline.plan(greedy, store, preflight.Assumptions())
    total = needs.plan.memory.total
    assert (needs.problem, (needs.memory_limit or 0) > 10 * total) == ("", True)
    monkeypatch.setattr(preflight, "memory_per_worker", lambda scaling: total - 1)
    with pytest.raises(ConfigError, match="cannot fit: a worker needs") as caught:
        pipeline.train(greedy, store)
    assert caught.value.exit_code == 2
    assert "train.micro_batch_size=1" in caught.value.hint
    run = job_of(greedy, store, manifest, seed=4).run
    assert not store.list(f"runs/{run}", recursive=True)

    guards = greedy.train.guards.model_copy(update={"refuse_impossible": False})
    forced = greedy.model_copy(update={"train": greedy.train.model_copy(update={"guards": guards})})
    with Catalog.open(store) as catalog:
        base = catalog.model("tiny")
        for allowed in (forced, greedy):  # and one with a checkpoint has shown that it fits
            preflight.refuse_impossible(allowed, store, "fp32", base, manifest, run)
            store.write(f"runs/{run}/checkpoints/step-00000002/MANIFEST.json", b"{}")
    monkeypatch.setattr(preflight, "memory_per_worker", lambda scaling: None)
    monkeypatch.setattr(Store, "free_bytes", lambda self: 10)
    with pytest.raises(ConfigError, match="checkpoints and the export need"), Catalog.open(store) as catalog:
        preflight.refuse_impossible(greedy, store, "fp32", base, manifest, "run_other")
    store.delete_dir(f"runs/{run}")


def test_error_reports_the_reason_of_the_worker(config: RunConfig, store: Store, manifest: DatasetManifest) -> None:
    no_retry = config.train.scaling.model_copy(update={"max_failures": 0, "num_workers": 1})
    job = job_of(config, store, manifest, seed=2)
    with pytest.raises(TrainingError, match="the worker's own reason") as caught:
        launch.fit(failing, TrainJob(**{**vars(job), "config": job.config.model_copy(update={"scaling": no_retry})}))
    assert "resumes it from its last checkpoint" in caught.value.hint


@pytest.mark.large
def test_sequence_parallelism_under_ray_train(config: RunConfig, store: Store, manifest: DatasetManifest) -> None:
    """Each is fed the rows of the whole batch; they count once."""
    from forge_ray.train.loop import train_loop

    job = job_of(config, store, manifest, seed=5)
    train = job.config.model_copy(update={"sequence_parallel": 2, "max_steps": 2})
    job = replace(job, run="run_shared", config=parse(type(train), train.model_dump(mode="json")))
    launch.fit(train_loop, job)
    lines = metrics.read(store.local(f"runs/{job.run}") / metrics.METRICS)
    rows = Rows.of(store, manifest, "train")
    order = order_of(manifest, "train", 5, train.global_batch)
    report = audit.audit(audit.DataFacts(job.run, rows, order, 2, order.digest(2), lines), lambda *_: None)
    assert (report.steps_compared, report.problems) == (2, ())
