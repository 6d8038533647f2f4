"""Files that come with forge_ray are found next to the package in a checkout, and inside it from a wheel."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from forge_ray.cli import quickstart, show
from forge_ray.cli.main import cli
from forge_ray.config.base import load
from forge_ray.config.run import RunConfig
from forge_ray.errors import NotFound
from forge_ray.machine import shipped
from forge_ray.machine.shipped import folder, here_or_shipped

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
ROWS = "jobs/data/debian_sections.jsonl"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    path = tmp_path / "empty folder"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def test_a_checkout_has_them_next_to_the_package_and_a_wheel_inside(empty: Path) -> None:
    assert folder() == ROOT
    package = empty / "site-packages" / "forge_ray"
    (package / "files" / "jobs").mkdir(parents=True)
    (package / "files" / "jobs" / "deploy.yaml").touch()
    assert folder(package) == package / "files"
    assert here_or_shipped("jobs/deploy.yaml", package) == str(package / "files" / "jobs" / "deploy.yaml")
    assert here_or_shipped("jobs/sft.yaml", package) == "jobs/sft.yaml"


def test_a_file_of_the_current_folder_comes_first(empty: Path) -> None:
    assert here_or_shipped("jobs/deploy.yaml") == str(ROOT / "jobs" / "deploy.yaml")
    (empty / "jobs").mkdir()
    (empty / "jobs" / "deploy.yaml").touch()
    assert here_or_shipped("jobs/deploy.yaml") == "jobs/deploy.yaml"


def test_the_quick_start_finds_its_run_file_and_its_rows(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = quickstart.run_config(quickstart.RUN_FILE, ("train.epochs=0.1",))
    (source,) = config.data.sources
    assert (source.path, source.name, config.train.epochs) == (str(ROOT / ROWS), ROWS, 0.1)
    monkeypatch.chdir(ROOT)
    assert quickstart.run_config(quickstart.RUN_FILE, ()) == load(RunConfig, ROOT / quickstart.RUN_FILE)


def test_own_rows_and_run_files_are_not_replaced(empty: Path) -> None:
    (empty / "mine.jsonl").touch()
    config = quickstart.run_config(quickstart.RUN_FILE, ("data.sources.0.path=mine.jsonl",))
    assert (config.data.sources[0].path, config.data.sources[0].name) == ("mine.jsonl", "")
    with pytest.raises(NotFound, match=r"'mine\.yaml' does not exist"):
        quickstart.run_config("mine.yaml", ())


def test_the_next_steps_work_where_they_are_typed(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, serve, _, copy = (shlex.split(line, comments=True) for line in show.next_steps("ds_1", "mv_1"))
    assert serve == ["forge", "serve", str(ROOT / "jobs" / "deploy.yaml")]
    assert copy == ["cp", "-r", str(ROOT / "jobs"), "."]
    monkeypatch.chdir(ROOT)
    assert show.next_steps("ds_1", "mv_1") == [
        "forge data show ds_1 --rows 3",
        "forge serve jobs/deploy.yaml",
        "forge lineage mv_1",
    ]


def test_activation_is_asked_for_only_where_forge_is_another_command(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = empty / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").touch()
    (programs / "forge").touch(mode=0o755)
    monkeypatch.setattr(sys, "prefix", str(empty / ".venv"))
    monkeypatch.setenv("PATH", str(empty))
    assert show.activation() == "  (after `source .venv/bin/activate`)"
    monkeypatch.setenv("PATH", str(programs))
    assert show.activation() == ""


def test_missing_deployment_file_names_the_shipped_one(empty: Path) -> None:
    for words in (["serve", "jobs/deploy.yaml"], ["deploy", "jobs/deploy.yaml", "--serve-yaml"], ["deploy", "--serve-yaml"]):
        done = CliRunner().invoke(cli, [*words, "--store", str(empty / "store")])
        assert done.exit_code == 2
        assert str(shipped.folder() / "jobs" / "deploy.yaml") in done.stderr
