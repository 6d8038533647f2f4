"""A run and a version in a real MLflow server, over HTTP: once, whole, found again by our ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from papers_store import STEPS, filled
from serving import free_port

from forge_ray.cli.main import cli
from forge_ray.store.files import Store

pytestmark = pytest.mark.e2e
WAIT_S = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow server` of the wheel that the extra installs, on SQLite, with no job queue and no way out."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    words = [
        "server",
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    words += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    switches = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "LITELLM_LOCAL_MODEL_COST_MAP": "true",  # where litellm is installed, MLflow imports it and it asks GitHub
    }
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words], env=os.environ | switches, stdout=stream, stderr=stream
        )
    try:
        for _ in range(WAIT_S * 4):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.fail(f"no answer in {WAIT_S} s: {log.read_text()}")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def export(store: Store, url: str, *words: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["export", "mlflow", *words, "--uri", url, "--store", store.uri, "--json"])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def test_run_and_version_are_exported_once_and_completely(server: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    from mlflow import MlflowClient

    store, ids = filled(tmp_path / "store", tiny_model_dir)
    first = export(store, server, "support@prod")
    assert export(store, server, "support@prod") == first  # nothing is written twice

    client = MlflowClient(tracking_uri=server)
    (run,) = client.search_runs([client.get_experiment_by_name("tickets").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (first["mlflow_run"], ids["second"], "FINISHED")
    assert {key: value for key, value in run.data.tags.items() if key.startswith("forge.")} | {
        "forge.run": ids["second"],
        "forge.dataset": ids["dataset"],
        "forge.base_model": ids["middle"],
    } == {key: value for key, value in run.data.tags.items() if key.startswith("forge.")}
    assert (run.data.params["adapter.r"], run.data.params["max_steps"]) == ("16", str(STEPS))
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(item.step, item.value) for item in history] == [(step, 1.0 / step) for step in range(1, STEPS + 1)]

    (version,) = client.search_model_versions("name = 'tickets'")
    assert str(version.version) == first["registered_version"]
    assert (version.run_id, version.tags["forge.version"]) == (run.info.run_id, ids["tuned"])
    assert version.tags["forge.aliases"] == "support@prod"
    assert version.tags["forge.eval.exact_match"] == "0.875"
    assert version.source == f"forge:/models/{ids['tuned']}#{version.tags['forge.files_digest']}"
    assert client.get_model_version_by_alias("tickets", "support-prod").version == version.version
    assert not client.list_artifacts(run.info.run_id)  # no weights unless they are asked for

    alone = export(store, server, ids["first"], "--experiment", "elsewhere")
    assert (alone["run"], alone["registered"]) == (ids["first"], "")
    whole = export(store, server, ids["middle"], "--with-weights")
    source = client.get_model_version("middle", whole["registered_version"]).source
    assert source == f"runs:/{whole['mlflow_run']}/models/{ids['middle']}"
    fetched = Path(client.download_artifacts(whole["mlflow_run"], f"models/{ids['middle']}", str(tmp_path)))
    for entry in store.files(f"models/{ids['middle']}"):
        assert (fetched / entry.path).read_bytes() == store.read(f"models/{ids['middle']}/{entry.path}")
