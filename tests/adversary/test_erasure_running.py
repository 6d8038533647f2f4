"""While an erasure runs, nothing more is published from the rows; the certificate says which endpoints have let go."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
from fabricated import dataset, deployment, record_of, run, store_at, version

from forge_ray.config.data import Splits
from forge_ray.config.train import TrainConfig
from forge_ray.data.build import prepare, work
from forge_ray.data.build.build import remove_stale
from forge_ray.data.build.summaries import MapSummary, Tally
from forge_ray.data.dataset.version import split_of
from forge_ray.errors import EngineError, PolicyError, StoreError, TrainingError
from forge_ray.governance.erasure import endpoints
from forge_ray.governance.erasure.apply import erase
from forge_ray.governance.erasure.certificate import path_of, statement_of
from forge_ray.governance.erasure.options import Options
from forge_ray.governance.erasure.search import ErasureRequest
from forge_ray.records import Event
from forge_ray.store import erased, paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train import attempts, checkpoint
from forge_ray.train.job import TrainJob

pytestmark = pytest.mark.unit
TRAINED = [n for n in range(30) if split_of(bytes.fromhex(record_of(n).id[4:]), Splits()) == 0]
HERS, OTHER = record_of(TRAINED[0]), record_of(TRAINED[1])
REQUEST = ErasureRequest("record", (HERS.id,))
OPTIONS = Options(retrain="none", wait_s=0.2)


@pytest.fixture
def place(tmp_path: Path) -> tuple[Store, dict[str, str]]:
    store = store_at(tmp_path / "store")
    with Catalog.open(store) as catalog:
        base = version(catalog, "base")
        ids = {"base": base.id}
        for name, records in {"hers": [HERS, OTHER], "clean": [OTHER]}.items():
            data = dataset(catalog, records, name=name)
            trained = run(catalog, name, data.id, base.id)
            ids |= {f"ds_{name}": data.id, f"mv_{name}": version(catalog, name, trained.id, base.id).id}
    return store, ids


def job_of(store: Store, dataset_id: str, base: str) -> TrainJob:
    from forge_ray.records import DatasetManifest, ModelVersion

    with Catalog.open(store) as catalog:
        manifest, model = catalog.get_as(DatasetManifest, dataset_id), catalog.get_as(ModelVersion, base)
    return TrainJob("run_now", "now", TrainConfig(), store, manifest, model, "fp32", under_ray=False)


# ---------------------------------------------------------------- trainings


def test_training_on_erased_rows_publishes_no_checkpoint_export_or_result(place: tuple[Store, dict[str, str]]) -> None:
    import torch

    from forge_ray.train import finish
    from forge_ray.train.context import join
    from forge_ray.train.saving import Saver

    store, ids = place
    job, clean = (job_of(store, ids[name], ids["base"]) for name in ("ds_hers", "ds_clean"))
    for one in (job, clean):
        one.check_may_publish()
    erase(store, REQUEST, OPTIONS)
    clean.check_may_publish()
    with pytest.raises(TrainingError, match=r"run_now is not published: ds_.* holds or learned from rows that er_"):
        job.check_may_publish()

    class Engine:
        def save(self, folder: Path, write: Any) -> None:
            write({"weights": torch.zeros(1)}, folder / "state.pt")

    from dataclasses import replace

    for one, publishes in ((job, False), (clean, True)):
        position = replace(checkpoint.expected(one), step=4, run="run_of_" + one.dataset.name, attempt=1)
        engine, alone = Engine(), join(False, 1, False, 1)
        saver = Saver(engine, store, alone, 1, in_background=False, origins=one.origins)  # type: ignore[arg-type]
        if publishes:
            assert saver.begin(position)
        else:
            with pytest.raises(TrainingError, match="is not published"):
                saver.begin(position)
        assert bool(checkpoint.steps(store, position.run)) is publishes
    exported = pytest.MonkeyPatch()
    exported.setattr(finish, "export_full", lambda base, weights, target, head: (target / "model").write_bytes(b"x"))
    with exported.context(), pytest.raises(TrainingError, match="is not published"):
        finish.export(job, None, {}, Path(), "causal_lm", "")  # type: ignore[arg-type]
    exported.undo()
    assert not store.list("runs/run_now", recursive=True)
    assert not list(Path(store.root, "runs").rglob(".tmp-*/model"))


def test_version_that_learned_from_the_rows_is_no_base_of_a_training(place: tuple[Store, dict[str, str]]) -> None:
    store, ids = place
    erase(store, REQUEST, OPTIONS)
    with pytest.raises(TrainingError, match=f"{ids['mv_hers']} holds or learned from rows"):
        attempts.check_may_publish(store, "run_x", ids["ds_clean"], ids["mv_hers"])
    scratch = Store(f"{store.root}/{paths.work('reproduce')}/0123456789ab")  # where a reproduction of the run would write
    with pytest.raises(TrainingError, match="is not published"):
        attempts.check_may_publish(scratch, "run_hers", ids["ds_hers"], "")


def test_erasure_waits_for_a_training_to_stop_or_names_it(place: tuple[Store, dict[str, str]]) -> None:
    store, ids = place
    with Catalog.open(store) as catalog:
        for name, data in (("run_now", "ds_hers"), ("run_other", "ds_clean")):
            values = {"state": "running", "pid": os.getpid(), "dataset": ids[data], "base_model": ids["base"]}
            catalog.append(Event(kind="run", subject=name, data=values))
    with attempts.driving(store, "run_now"), attempts.driving(store, "run_other"):
        with pytest.raises(EngineError) as refused:
            erase(store, REQUEST, OPTIONS)
        assert "runs/run_now: is still being trained" in refused.value.message
        assert "run_other" not in refused.value.message
    statement = statement_of(store.read_json(path_of(er_of(store))))
    assert list(statement["predicate"]["unconfirmed"]) == ["runs/run_now"]
    assert (
        erase(store, REQUEST, OPTIONS)["predicate"]["unconfirmed"] == {}
    )  # it has ended: the same command, no other request


def test_training_that_was_killed_is_not_waited_for(place: tuple[Store, dict[str, str]]) -> None:
    store, ids = place
    with Catalog.open(store) as catalog:
        values = {"state": "running", "pid": 1, "dataset": ids["ds_hers"], "base_model": ids["base"]}
        catalog.append(Event(kind="run", subject="run_now", data=values))
    code = (
        "import os, sys; from forge_ray.store.files import Store; from forge_ray.train import attempts\n"
        "with attempts.driving(Store(sys.argv[1]), 'run_now'): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, store.uri], check=False)
    half = Path(store.root, "runs/run_now/checkpoints/.tmp-00000004-000001/state.pt")
    half.parent.mkdir(parents=True)
    half.write_bytes(b"weights")
    assert store.exists("runs/run_now/driver.json")
    assert erase(store, REQUEST, OPTIONS)["predicate"]["unconfirmed"] == {}
    assert not half.exists()


def er_of(store: Store) -> str:
    (path,) = store.list(paths.of_kind("erasures"))
    return Path(path).stem


def test_evaluation_and_release_of_what_learned_from_the_rows_are_refused(place: tuple[Store, dict[str, str]]) -> None:
    store, ids = place
    erase(store, REQUEST, OPTIONS)
    store.write("evals/ev_1/items.jsonl", b"{}")
    for dataset_id, version_id in ((ids["ds_hers"], ""), (ids["ds_clean"], ids["mv_hers"])):
        with pytest.raises(PolicyError, match="ev_1 is not published"):
            erased.refuse_erased(store, "ev_1", dataset_id, version_id, "evals/ev_1")
    assert not store.exists("evals/ev_1")
    erased.refuse_erased(store, "ev_2", ids["ds_clean"], ids["mv_clean"], "evals")


# ---------------------------------------------------------------- builds


def test_piece_of_a_build_that_began_before_the_purge_leaves_nothing(tmp_path: Path) -> None:
    store = store_at(tmp_path / "store")
    mark = work.mark(store)

    def piece() -> MapSummary:
        store.write("work/data/0123-0.arrow", b"rows")
        store.delete(mark)  # the purge, while the task computes
        return MapSummary("0123", (), "", {}, (), Tally())

    with pytest.raises(StoreError, match="the work area was emptied while a dataset was being built"):
        work.once(store, "0123", MapSummary, piece, mark)
    assert store.list("work/data") == []
    with pytest.raises(StoreError, match="was emptied"):  # the next task does not even begin
        work.once(store, "4567", MapSummary, lambda: pytest.fail("it read rows"), mark)


def test_build_whose_work_area_was_emptied_at_its_end_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_at(tmp_path / "store")
    builds: list[str] = []
    with Catalog.open(store) as catalog:
        first = dataset(catalog, [HERS], name="first")

        def build(*arguments: Any) -> Any:
            builds.append(mark := arguments[-1])
            if len(builds) == 1:
                store.delete(mark)
            return first

        monkeypatch.setattr(prepare, "build", build)
        monkeypatch.setattr(Catalog, "check_may", lambda *_: None)
        prepare._build_version("x", None, None, catalog, [], lambda *_: None)  # type: ignore[arg-type]
    assert len(builds) == len(set(builds)) == 2


def test_build_that_comes_to_an_erased_version_is_refused(
    place: tuple[Store, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it would where tombstones had been lost in a way that nothing else noticed."""
    from forge_ray.records import DatasetManifest

    store, ids = place
    erase(store, REQUEST, OPTIONS)
    with Catalog.open(store) as catalog:
        manifest = catalog.get_as(DatasetManifest, ids["ds_hers"])
        monkeypatch.setattr(prepare, "build", lambda *_: manifest)
        store.write(f"datasets/{manifest.id}/records/train/part-00000.parquet", b"rows")
        with pytest.raises(StoreError, match=f"the build came to {manifest.id}, which er_"):
            prepare._build_version("x", None, None, catalog, [], lambda *_: None)  # type: ignore[arg-type]
    assert not store.exists(f"datasets/{manifest.id}")


def test_purged_dataset_version_is_not_called_already_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_at(tmp_path / "store")
    monkeypatch.setattr(prepare, "input_digest", lambda *_: "")
    monkeypatch.setattr(prepare, "tokenizer_digest", lambda _: "")
    with Catalog.open(store) as catalog:
        manifest = dataset(catalog, [OTHER])
        assert prepare._version_of(None, None, catalog, []) is None  # type: ignore[arg-type]
        store.write(f"datasets/{manifest.id}/MANIFEST.json", b"{}")
        assert prepare._version_of(None, None, catalog, []) == manifest  # type: ignore[arg-type]


def test_staging_folder_of_a_killed_build_goes_with_the_next_build(tmp_path: Path) -> None:
    from forge_ray.store.owner import owner_mark

    store = store_at(tmp_path / "store")
    code = (
        "import os; from forge_ray.store.owner import owner_mark; print(owner_mark(), flush=True); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    folders = [f"datasets/.building-a-{mark}-1" for mark in (ended, owner_mark(), "~00000000.1.2~")]
    for folder in folders:
        store.write(f"{folder}/x", b"")
    remove_stale(store)
    assert [store.exists(folder) for folder in folders] == [False, True, True]


# ---------------------------------------------------------------- endpoints


def holding(monkeypatch: pytest.MonkeyPatch, *versions: str) -> None:
    """Every deployment has one replica that holds these versions."""
    state = {"replicas": {"replica-1": {"held": list(versions)}}}
    monkeypatch.setattr(endpoints, "_state", lambda deployment: state)


def test_endpoint_that_holds_the_weights_is_named_until_it_let_go(
    place: tuple[Store, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ids = place
    with Catalog.open(store) as catalog:
        served = deployment(catalog, "endpoint", ids["mv_hers"])
    holding(monkeypatch, ids["mv_hers"])
    with pytest.raises(EngineError, match=f"{served.id}: its replicas hold {ids['mv_hers']}") as refused:
        erase(store, REQUEST, OPTIONS)
    assert "forge undeploy" in refused.value.hint
    assert statement_of(store.read_json(path_of(er_of(store))))["predicate"]["unconfirmed"]
    holding(monkeypatch, ids["base"])
    statement = erase(store, REQUEST, OPTIONS)["predicate"]
    assert statement["unconfirmed"] == {}
    assert erase(store, REQUEST, OPTIONS)["predicate"] == statement


def test_replica_that_does_not_report_is_not_taken_for_one_without_weights(
    place: tuple[Store, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ids = place
    with Catalog.open(store) as catalog:
        deployment(catalog, "endpoint", ids["mv_hers"])
    monkeypatch.setattr(endpoints, "_state", lambda _: {"replicas": {"replica-1": {"held": []}}, "running": 2})
    with pytest.raises(EngineError, match="1 of its 2 replicas have reported lately"):
        erase(store, REQUEST, OPTIONS)


def test_coordinator_that_does_not_answer_is_not_taken_for_an_endpoint_that_ended(
    place: tuple[Store, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it was started on this machine, and nothing answers at its address."""
    store, ids = place
    with Catalog.open(store) as catalog:
        deployment(catalog, "endpoint", ids["mv_hers"])

    def silent(*_: object, **__: object) -> None:
        raise ray.exceptions.GetTimeoutError

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get", silent)
    monkeypatch.setattr("forge_ray.serve.coordinator.find_coordinator", lambda _: MagicMock())
    with pytest.raises(EngineError, match=r"its coordinator does not answer \(GetTimeoutError\)"):
        erase(store, REQUEST, OPTIONS)


def test_erasure_waits_for_an_endpoint_to_let_go(
    place: tuple[Store, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ids = place
    with Catalog.open(store) as catalog:
        deployment(catalog, "endpoint", ids["mv_hers"])
    until = time.monotonic() + 1.5
    monkeypatch.setattr(
        endpoints, "_state", lambda _: {"replicas": {"r": {"held": [ids["mv_hers"]] * (time.monotonic() < until)}}}
    )
    monkeypatch.setattr(endpoints, "POLL_S", 0.05)
    statement = erase(store, REQUEST, Options(retrain="none", wait_s=30))["predicate"]
    assert (statement["unconfirmed"], time.monotonic() >= until) == ({}, True)


def test_endpoint_that_follows_all_aliases_of_the_base_is_asked_too(
    place: tuple[Store, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan names deployments by what they were started with; this one may have loaded any version of its base."""
    store, ids = place
    with Catalog.open(store) as catalog:
        follows = deployment(catalog, "follows", ids["base"], published=True)
        deployment(catalog, "alone", ids["mv_clean"])
        replaced = deployment(catalog, "twice", ids["mv_hers"], published=True)
        catalog.append(Event(kind="deployment", subject=replaced.id, data={"state": "stopped", "name": "twice"}))
    holding(monkeypatch, ids["mv_hers"])
    with pytest.raises(EngineError) as refused:
        erase(store, REQUEST, OPTIONS)
    assert [one in refused.value.message for one in (follows.id, replaced.id)] == [True, False]


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("x-forge-deployment", "dp_answers")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_endpoint_out_of_reach_is_not_taken_for_ended(
    place: tuple[Store, dict[str, str]], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    store, ids = place
    with Catalog.open(store) as catalog:
        served = deployment(catalog, "endpoint", ids["mv_hers"])
        catalog.append(
            Event(kind="deployment", subject=served.id, data={"state": "running", "name": "endpoint", "url": url})
        )
    monkeypatch.setattr(endpoints, "_state", lambda _: None)
    with pytest.raises(EngineError, match=r"answers \(dp_answers\), and this process is not connected to its Ray cluster"):
        erase(store, REQUEST, OPTIONS)
    monkeypatch.setattr(endpoints, "_answering", lambda _: "")
    monkeypatch.setattr(endpoints.socket, "gethostname", lambda: "elsewhere")
    with pytest.raises(EngineError, match="it was started on another machine"):
        erase(store, REQUEST, OPTIONS)
    by_word = Options(retrain="none", wait_s=0.2, stopped=(served.id,))
    statement = erase(store, REQUEST, by_word)["predicate"]
    assert (statement["unconfirmed"], statement["options"]["stopped"]) == ({}, [served.id])


def test_endpoint_that_ended_with_this_machine_is_not_waited_for(
    place: tuple[Store, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started here, killed with everything, and no event says so."""
    store, ids = place
    with Catalog.open(store) as catalog:
        deployment(catalog, "endpoint", ids["mv_hers"])
    monkeypatch.setattr(endpoints, "_state", lambda _: None)
    began = time.monotonic()
    assert erase(store, REQUEST, Options(retrain="none", wait_s=60))["predicate"]["unconfirmed"] == {}
    assert time.monotonic() - began < 30


def test_check_names_what_another_process_is_writing(place: tuple[Store, dict[str, str]]) -> None:
    from forge_ray.store.owner import owner_mark

    store, _ = place
    store.write(f"models/.tmp-mv_1-{owner_mark()}-x/model.safetensors", b"weights")
    store.write(f"models/.tmp-.importing-1-{owner_mark()}-x/model.safetensors", b"weights")
    with pytest.raises(EngineError, match=r"models/\.tmp-mv_1-.*: a process that runs is writing it"):
        erase(store, REQUEST, OPTIONS)
    statement = statement_of(store.read_json(path_of(er_of(store))))["predicate"]
    assert len(statement["unconfirmed"]) == len(statement["remains"]["imports that were running"]) == 1
