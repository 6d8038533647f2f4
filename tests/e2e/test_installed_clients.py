"""Clients that are no part of the lock, installed for these tests alone: the AI SDK for node, and openai-agents, which asks
for older websockets than the lock has. What each sends is what tests/fixtures/clients has, which the quick suite replays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conversations import FIRST, SECOND, Conversed, Verdict, conversing, recorded_in, shape

pytestmark = [pytest.mark.e2e, pytest.mark.large]

SCRIPTS = Path(__file__).parent / "clients"
RECORDED = Path(__file__).parents[1] / "fixtures/clients"
AGENTS = "openai-agents==0.24.0"
UNREACHABLE = (
    "ENOTFOUND",
    "ECONNREFUSED",
    "EAI_AGAIN",
    "ETIMEDOUT",
    "ECONNRESET",
    "Failed to fetch",
    "error sending request",
)


@pytest.fixture(scope="module")
def conversed(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conversed]:
    with conversing(tiny_model_dir, tmp_path_factory.mktemp("installed") / "model") as conversed:
        yield conversed


def kept(config: pytest.Config, temporary: pytest.TempPathFactory, name: str) -> Path:
    """A folder of pytest's cache, which later runs have too; a temporary one where there is no cache."""
    cache: pytest.Cache | None = getattr(config, "cache", None)
    return cache.mkdir(name) if cache is not None else temporary.mktemp(name)


def installed(folder: Path, digest: str, command: list[str]) -> Path:
    """`folder` after `command` has filled it, which is done once for each digest. Skips where no package index answers."""
    stamp = folder / ".installed"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != digest:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
        if any(word in done.stderr for word in UNREACHABLE):
            pytest.skip(f"{command[0]} reaches no package index: {done.stderr.strip().splitlines()[0]}")
        assert done.returncode == 0, done.stderr
        stamp.write_text(digest, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def node_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("the AI SDK needs node and npm, and one of them is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < 20:
        pytest.skip(f"the AI SDK needs node 20 or newer, this is {version}")
    folder = kept(pytestconfig, tmp_path_factory, "ai-sdk")
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(SCRIPTS / name, folder / name)
    lock = (folder / "package-lock.json").read_text(encoding="utf-8")
    return installed(folder, lock, [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"])


@pytest.fixture(scope="module")
def agents_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = kept(pytestconfig, tmp_path_factory, "openai-agents")
    uv = Path(sys.executable).parent / "uv"
    if not uv.is_file():
        pytest.skip(f"{AGENTS} is installed by uv, which is not next to {Path(sys.executable).name}")
    command = [str(uv), "pip", "install", "--quiet", "--python", sys.executable, "--target", str(folder), AGENTS]
    return installed(folder, AGENTS + sys.version, command)


def conversation(conversed: Conversed, command: list[str], folder: Path, **environment: str) -> Any:
    """What the client's script printed; `sent` holds its requests alone."""
    conversed.sent.clear()
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().split("\n")[-1])  # texts hold U+2028, which `splitlines` takes for an end


def check(conversed: Conversed, answers: Any, recorded: str, folder: Path) -> None:
    assert (answers["first"], answers["streamed"], answers["second"]) == (FIRST, FIRST, SECOND)
    assert answers["calls"][0] == {"colour": "red", "sure": True}
    assert answers["usage"]
    for value in (*answers["outputs"], *answers["forced"]):
        Verdict.model_validate(value)
    assert answers["forced"]
    lines = [json.dumps(request, ensure_ascii=False) for request in conversed.sent]
    (folder / recorded).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    kept = RECORDED / recorded
    before = recorded_in(kept) if kept.is_file() else []
    rule = f"it sends other requests now: look at {folder / recorded}, then copy it to tests/fixtures/clients"
    assert [shape(request) for request in conversed.sent] == [shape(request) for request in before], rule


@pytest.mark.parametrize("kind", ["openai-compatible", "mistral", "openai-chat", "openai-responses"])
@pytest.mark.parametrize("generation", ["6", "7"])
def test_ai_sdk(conversed: Conversed, node_folder: Path, tmp_path: Path, generation: str, kind: str) -> None:
    command = ["node", str(SCRIPTS / "ai_sdk.mjs"), conversed.url, generation, kind]
    answers = conversation(conversed, command, node_folder)
    conversed.holds_the_conversation()
    if kind == "openai-compatible":
        assert answers["reasoning"] == ["Paint it.", "Paint it."]
    differs = f"-{generation}" if kind == "openai-responses" else ""  # the other requests are the same in both
    check(conversed, answers, f"ai-sdk-{kind}{differs}.jsonl", tmp_path)


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_openai_agents(conversed: Conversed, agents_folder: Path, tmp_path: Path, api: str) -> None:
    command = [sys.executable, str(SCRIPTS / "openai_agents.py"), conversed.url, api]
    answers = conversation(conversed, command, tmp_path, PYTHONPATH=str(agents_folder))
    conversed.holds_the_conversation()
    check(conversed, answers, f"openai-agents-{api}.jsonl", tmp_path)
