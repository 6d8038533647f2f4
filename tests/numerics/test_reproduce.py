"""A finished run, computed again by fresh processes from its records: the same bytes, or the cause by its name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROCESSES
from rechained import replace_content
from reproducing import trained

from forge_ray.machine import environment
from forge_ray.records import DatasetManifest, RunRecord, canonical_json, digest
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.numerics
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("reproducing.py")


@pytest.fixture(scope="module")
def runs(store: Store, dataset: DatasetManifest, fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One run of either engine, finished."""
    listed = tmp_path_factory.mktemp("runs") / "runs.json"
    process = PROCESSES.Process(target=trained, args=(store.uri, dataset.model_dump(mode="json"), str(listed)))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    run_ids: list[str] = json.loads(listed.read_text())
    return run_ids


def again(store: Store, runs: list[str], **switches: str) -> list[dict[str, Any]]:
    """What a process that never saw these runs finds."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), store.uri, *runs],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | switches,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reports: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return reports


@pytest.mark.parametrize("seed", ["1", pytest.param("2", marks=pytest.mark.large)])
def test_reproduction_in_fresh_processes_is_equal(store: Store, runs: list[str], seed: str) -> None:
    """`large` repeats it with another hash seed, and then ten times."""
    for run, report in zip(runs, again(store, runs, PYTHONHASHSEED=seed), strict=True):
        assert (report["run"], report["verdict"]) == (run, "equal")
        assert list(report["differences"]) == ["environment"]  # this alone, and it is named
        assert report["differences"]["environment"] == {"switches.PYTHONHASHSEED": [os.environ.get("PYTHONHASHSEED"), seed]}
    assert not list(store.local("work/reproduce").iterdir())


@pytest.mark.large
def test_ten_of_ten_reproductions_are_equal(store: Store, runs: list[str]) -> None:
    reports = [item for number in range(10) for item in again(store, runs, PYTHONHASHSEED=str(1 + number % 2))]
    assert [item["verdict"] for item in reports] == ["equal"] * 20


def test_reproduction_names_every_difference(store: Store, runs: list[str], tmp_path: Path) -> None:
    """Other threads, another package, other kernels: the weights are others, and all three are said."""
    copy = Store(str(tmp_path / "store"))
    shutil.copytree(store.root, copy.root)
    path = f"records/runs/{runs[0]}.json"
    record = RunRecord.model_validate(copy.read_json(path))
    lock = environment.read(copy, record.environment_digest)
    lock["packages"]["torch"]["version"] = "1.0"
    copy.write(f"environments/{digest(lock).removeprefix('sha256:')}.json", canonical_json(lock))
    config = json.loads(json.dumps(record.config))
    config["train"]["scaling"]["cpus_per_worker"] = 2
    altered = record.model_copy(update={"config": config, "environment_digest": digest(lock)})
    replace_content(copy, path, altered.model_dump(mode="json"))

    (report,) = again(copy, runs[:1], ATEN_CPU_CAPABILITY="default")
    assert report["differences"]["environment"] == {
        "packages.torch": ["1.0", environment.installed()["torch"]["version"]],
        "switches.ATEN_CPU_CAPABILITY": [None, "default"],
        "threads": [1, 2],
    }
    kernels = lock["hardware"]["cpu_kernels"]
    if kernels not in ("AVX2", "AVX512"):
        pytest.skip(f"no other kernels than {kernels} here")
    assert report["differences"]["hardware"] == {"cpu_kernels": [kernels, "DEFAULT"]}
    assert report["verdict"] == "differs"
    weights = report["weights"]
    assert 0 < weights["largest"] < 1e-2
    assert 0 < weights["num_differ"] <= weights["num_tensors"]
    assert weights["tensors"][0]["largest"] == weights["largest"]
    ((step, (before, after)),) = report["differences"]["loss"].items()
    assert step.startswith("step ")
    assert before != after
    with Catalog.open(copy) as catalog:
        event = catalog.events("reproduction", runs[0])[-1]
    assert (event.data["state"], event.data["differences"]) == ("differs", sorted(report["differences"]))
