"""`forge`, `python -m forge_ray.cli` and the code of a submitted job are the same program, with the whole package."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from forge_ray import __version__ as VERSION
from forge_ray.cli.main import cli
from forge_ray.cli.submit import submit
from forge_ray.config.base import parse
from forge_ray.config.run import RunConfig
from forge_ray.doctor.closed import ROLES

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
PROGRAM = [sys.executable, "-m", "forge_ray.cli"]


def test_the_module_is_the_program() -> None:
    done = subprocess.run([*PROGRAM, "--version"], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True)
    assert done.stdout == f"forge, version {VERSION}\n"


SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


@pytest.mark.parametrize("script", ["forge", "forge-ray"])
def test_the_scripts_of_the_distribution_are_the_program(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, name = SCRIPTS[script].partition(":")
    monkeypatch.setattr(sys, "argv", [script, "--version"])
    with pytest.raises(SystemExit) as end:
        getattr(importlib.import_module(module), name)()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"forge, version {VERSION}\n"


def test_the_doctor_knows_a_gateway_by_its_command_line() -> None:
    roles = dict(ROLES)
    assert roles[f"{PROGRAM[-1]} gateway"] == roles["forge gateway"] == "gateway"


class FakeClient:
    sent: dict[str, Any] = {}

    def __init__(self, address: str) -> None:
        self.address = address

    def submit_job(self, entrypoint: str, runtime_env: dict[str, Any]) -> str:
        FakeClient.sent = {"entrypoint": entrypoint, "runtime_env": runtime_env}
        return "raysubmit_1"


def test_job_gets_the_whole_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import job_submission

    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("name: x\n")
    monkeypatch.setattr(job_submission, "JobSubmissionClient", FakeClient)
    Path("rows.jsonl").touch()
    values = {"name": "x", "base_model": "b", "data": {"sources": [{"path": "rows.jsonl"}]}, "release": {"alias": "a"}}
    submit("run.yaml", parse(RunConfig, values), "http://head:8265", "/mnt/forge", (), wait=False)
    assert FakeClient.sent["runtime_env"]["py_modules"] == [str(ROOT / "forge_ray")]
    assert FakeClient.sent["entrypoint"].startswith("python -m forge_ray.cli run run.yaml")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    "arguments", [["models", "list"], ["models", "list", "--json"], ["models", "show", "absent"]], ids=" ".join
)
def test_output_that_nobody_reads_ends_quietly(arguments: list[str], stream: str, tmp_path: Path) -> None:
    """As `forge models list | head` and `forge models list 2>&1 | head` do it."""
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state"), "PYTHONWARNINGS": "error"}
    reader, writer = os.pipe()
    os.close(reader)
    is_both = stream == "stderr"
    process = subprocess.Popen(
        [*PROGRAM, *arguments, "--store", str(tmp_path / "store")],
        stdout=writer,
        stderr=writer if is_both else subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    os.close(writer)
    _, messages = process.communicate(timeout=120)
    assert process.returncode in (1, 2)
    assert not (tmp_path / "state" / "forge_ray" / "errors").exists()
    if not is_both:
        assert "Traceback" not in messages
        assert "Broken pipe" not in messages
        assert ("error: 'absent' is no id" in messages) == ("absent" in arguments)


def test_a_pipe_of_another_purpose_that_breaks_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(catalog: Any) -> Any:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("forge_ray.cli.show.models", broken)
    with pytest.raises(SystemExit) as end:
        cli(["models", "list", "--store", str(tmp_path / "store")])
    assert end.value.code == 1
    printed = capfd.readouterr().err
    assert "error: Broken pipe" in printed
    assert "the traceback is in" in printed
