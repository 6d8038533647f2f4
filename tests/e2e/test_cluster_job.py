"""A real cluster with a token: the pipeline as a Ray job, its logs, the deployed endpoint, the answer's lineage, and the
endpoint while a row that taught it is erased."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from forge_ray.data.dataset.version import read_records
from forge_ray.models.import_model import import_model
from forge_ray.records import DatasetManifest
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
RUN = "tests/e2e/run.yaml"
# one worker without DeepSpeed: tests/ray/test_train.py has two with it, and each start of one imports it
SMALL = ("train.engine=torch", "train.zero_stage=0", "train.scaling.num_workers=1", "train.epochs=2")
OVERRIDES = [word for setting in SMALL for word in ("--set", setting)]


@dataclass(frozen=True)
class Cluster:
    """A started head node; `environment` is what a client of it needs."""

    address: str
    gcs: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    port, dashboard, agent, agent_grpc = free_ports(4)
    temp = tempfile.mkdtemp(prefix="fr-", dir="/tmp")  # short: Ray's socket paths have a limit
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    }
    start = [str(BIN / "ray"), "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}"]
    start += ["--dashboard-host=127.0.0.1", "--num-cpus=4", f"--temp-dir={temp}", "--disable-usage-stats"]
    # with the default ports a second Ray on this machine would leave this one without the agent that takes jobs
    start += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
    subprocess.run(start, env=environment, check=True, capture_output=True, timeout=180)
    try:
        yield Cluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", environment)
    finally:
        # by this cluster's folder: `ray stop` would take every cluster of the machine
        subprocess.run(["pkill", "-9", "-f", temp], check=False)
        shutil.rmtree(temp, ignore_errors=True)


def call(cluster: Cluster, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / words[0]), *words[1:]],
        cwd=ROOT,
        env={**cluster.environment, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Store:
    """An own one: a row of it is erased."""
    own = Store(str(tmp_path_factory.mktemp("cluster") / "store"))
    with Catalog.open(own) as catalog:
        base = import_model(catalog, tiny_model_dir, "tiny-llama", licence="apache-2.0")
        promotion.promote(catalog, base.id, "tiny")
    return own


@pytest.fixture(scope="module")
def outcome(cluster: Cluster, store: Store) -> dict[str, Any]:
    """The pipeline, submitted once; every test below looks at another side of it."""
    (port,) = free_ports(1)
    words = ["submit", RUN, "--address", cluster.address, "--store", store.uri, *OVERRIDES]
    done = call(cluster, "forge", *words, "--set", f"deploy.port={port}", "--json")
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["status"] == "succeeded"
    # the logs were followed: one line per stage
    for name in ("prepare", "train", "evaluate", "release", "deploy"):
        assert f"✓ {name}" in done.stderr
    return result["result"]


def test_deployed_endpoint_answers_the_official_client(outcome: dict[str, Any], store: Store) -> None:
    import openai

    port = outcome["deployment"]["config"]["port"]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    question = [{"role": "user", "content": "Colour of grass, number 3?"}]
    raw = client.chat.completions.with_raw_response.create(
        model="colours",
        messages=question,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=6,
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == offline_answer(outcome, store, question)
    assert raw.headers["x-forge-model-version"] == outcome["version"]["id"]
    streamed = client.chat.completions.create(
        model="colours",
        messages=question,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=6,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == answer.choices[0].message.content


def offline_answer(outcome: dict[str, Any], store: Store, messages: list[dict[str, str]]) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = store.local(f"models/{outcome['version']['id']}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_training_lowers_the_loss_and_passes_the_gate(outcome: dict[str, Any]) -> None:
    assert outcome["report"]["metrics"]["loss"] < outcome["base_report"]["metrics"]["loss"] - 0.5
    assert outcome["version"]["status"] == "accepted"


def test_lineage_of_an_answer_ends_at_readable_rows(cluster: Cluster, outcome: dict[str, Any], store: Store) -> None:
    fingerprint = outcome["version"]["files_digest"]
    done = call(cluster, "forge", "lineage", fingerprint, "--store", store.uri)
    assert done.returncode == 0, done.stderr
    for identifier in (outcome["version"]["id"], outcome["run"]["id"], outcome["dataset"]["id"]):
        assert identifier in done.stdout
    assert "tests/e2e/colours.jsonl:" in done.stdout
    assert "Colour of" in done.stdout

    chain = call(
        cluster,
        "forge",
        "lineage",
        outcome["deployment"]["id"],
        "--to",
        outcome["dataset"]["id"],
        "--store",
        store.uri,
        "--json",
    )
    ids = json.loads(chain.stdout)["chain"]
    assert ids[0] == outcome["deployment"]["id"]
    assert ids[-1] == outcome["dataset"]["id"]


def test_job_scripts_reuse_existing_results_and_refuse_a_relative_store(
    cluster: Cluster, outcome: dict[str, Any], store: Store
) -> None:
    scripts = (
        ["python", "jobs/train.py", "--config", RUN, "--store", store.uri, *OVERRIDES],
        ["python", "jobs/prepare.py", "--config", RUN],
    )
    words = [
        "job",
        "submit",
        "--address",
        cluster.address,
        "--working-dir",
        ".",
        "--",
        "sh",
        "-c",
        " && ".join(map(shlex.join, scripts)),
    ]
    done = call(cluster, "ray", *words)
    printed = done.stdout + done.stderr
    assert f"{outcome['run']['id']}  already trained" in printed, printed[-3000:]
    assert done.returncode != 0
    assert "a Ray job's folder is deleted when it ends" in printed


def test_wrong_token_is_refused(cluster: Cluster, store: Store) -> None:
    words = ["submit", RUN, "--address", cluster.address, "--store", store.uri, "--json"]
    done = call(cluster, "forge", *words, RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == 2, done.stderr
    assert "token" in json.loads(done.stdout)["error"]["hint"]


class Asking(threading.Thread):
    """A client that asks `colours` for an answer all the time: (status, code of the error, version, deployment) of each."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.seen, self.ended = url, [], threading.Event()

    def run(self) -> None:
        body = {"model": "colours", "messages": [{"role": "user", "content": "Colour of grass?"}], "max_tokens": 1}
        with httpx.Client(timeout=60) as client:
            while not self.ended.is_set():
                answer = client.post(f"{self.url}/v1/chat/completions", json=body)
                code = "" if answer.status_code == 200 else answer.json()["error"]["code"]
                heads = (answer.headers.get("x-forge-model-version", ""), answer.headers["x-forge-deployment"])
                self.seen.append((answer.status_code, code, *heads))
                time.sleep(0.2)

    def until(self, what: Callable[[tuple[Any, ...]], bool]) -> None:
        deadline = time.monotonic() + 60
        while not (self.seen and what(self.seen[-1])):
            assert self.is_alive()
            assert time.monotonic() < deadline, self.seen[-1:]
            time.sleep(0.1)


def test_endpoint_forgets_an_erased_row_under_load(cluster: Cluster, outcome: dict[str, Any], store: Store) -> None:
    """No answer of the withdrawn version after the first refusal, none of it in memory once that is certified, and the
    replacement by itself."""
    old, url = outcome["version"]["id"], f"http://127.0.0.1:{outcome['deployment']['config']['port']}"
    with Catalog.open(store) as catalog:
        manifest = catalog.get_as(DatasetManifest, outcome["dataset"]["id"])
    record = read_records(store, manifest, "train")[0]["record"]
    asking = Asking(url)
    asking.start()
    asking.until(lambda seen: seen[0] == 200)
    words = ["erase", "--record", record, "--apply", "--yes", "--store", store.uri, "--json"]
    done = call(cluster, "forge", *words, RAY_ADDRESS=cluster.gcs)
    assert done.returncode == 0, done.stderr[-4000:]
    statement = json.loads(done.stdout.splitlines()[-1])["predicate"]
    (new,) = statement["aliases"]["colours"]
    assert (statement["unconfirmed"], old in engines(cluster, store)) == ({}, False)
    asking.until(lambda seen: seen[2] == new)
    assert new in engines(cluster, store)
    asking.ended.set()
    asking.join()
    answers = [seen for seen in asking.seen if seen[0] == 200]
    assert {seen[3] for seen in asking.seen} == {outcome["deployment"]["id"]}  # no restart
    assert {seen[:2] for seen in asking.seen if seen[0] != 200} == {(410, "model_archived")}
    versions = [seen[2] for seen in answers]
    assert versions == sorted(versions, key=[old, new].index)
    refused = [number for number, seen in enumerate(asking.seen) if seen[0] == 410]
    assert old not in {seen[2] for seen in asking.seen[refused[0] :]}
    by_id = httpx.post(f"{url}/v1/completions", json={"model": old, "prompt": "x", "max_tokens": 1}, timeout=60)
    assert (by_id.status_code, by_id.json()["error"]["code"]) in {(410, "model_archived"), (404, "model_not_found")}


def engines(cluster: Cluster, store: Store) -> set[str]:
    """Versions that the replicas of the endpoint hold in memory, as `forge deploy --status` says."""
    done = call(cluster, "forge", "deploy", "--status", "--address", cluster.gcs, "--store", store.uri, "--json")
    assert done.returncode == 0, done.stderr[-4000:]
    (endpoint,) = json.loads(done.stdout)["results"]
    return {version for replica in endpoint["replicas"].values() for version in replica["held"]}
