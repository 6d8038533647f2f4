"""What `python jobs/*.py` prints and returns: one JSON object, messages on stderr, documented exit codes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forge_ray.cli import job
from forge_ray.config.release import DeployConfig
from forge_ray.errors import PolicyError
from forge_ray.records import FileEntry

pytestmark = pytest.mark.unit


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "deploy.yaml"
    file.write_text("name: a\nmodels: [b]\n")
    return str(file)


@pytest.fixture(autouse=True)
def stores(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    opened: list[str | None] = []
    monkeypatch.setattr(job.pipeline, "open_store", lambda uri: opened.append(uri))
    return opened


def test_a_step_gets_config_and_store_and_its_result_is_the_output(
    config: str, stores: list[str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    def step(deploy: DeployConfig, _: Any) -> dict[str, Any]:
        return {"name": deploy.name, "port": deploy.port}

    assert (
        job.main(DeployConfig, step, ["--config", config, "--store", "/mnt/forge", "--set", "port=9", "--set", "name=c"])
        == 0
    )
    assert json.loads(capsys.readouterr().out) == {"name": "c", "port": 9}
    assert stores == ["/mnt/forge"]


def test_refusal_goes_to_stderr_with_its_exit_code(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    def step(*_: Any) -> None:
        raise PolicyError("mv_1 was rejected", hint="train a better one")

    assert job.main(DeployConfig, step, ["--config", config]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: mv_1 was rejected\nhint: train a better one\n"


def test_a_mistake_in_the_config_stops_before_the_store(config: str, stores: list[str | None]) -> None:
    assert job.main(DeployConfig, lambda *_: None, ["--config", config, "--set", "prot=1"]) == 2
    assert stores == []


@dataclass(frozen=True)
class Outcome:
    files: tuple[FileEntry, ...]
    where: Path


def test_results_of_every_shape_become_one_object() -> None:
    entry = FileEntry(path="a", size=1, sha256="0")
    plain = {"path": "a", "size": 1, "sha256": "0"}
    assert job.as_json(entry) == plain
    assert job.as_json((entry, entry)) == {"results": [plain, plain]}
    assert job.as_json(Outcome((entry,), Path("/x"))) == {"files": [plain], "where": "/x"}
    assert job.as_json(None) == {"results": None}
