"""`forge init`: a short run file for each task that loads, is never overwritten, and is written atomically."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import fabricated
import pytest
from click.testing import CliRunner, Result

from forge_ray.cli.init import TASKS, run_file_text
from forge_ray.cli.main import cli
from forge_ray.config.base import load, parse, resolved
from forge_ray.config.run import RunConfig
from forge_ray.records import ModelVersion
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*words: str) -> Result:
    return CliRunner().invoke(cli, ["init", *words])


@pytest.mark.parametrize("task", TASKS)
def test_the_file_of_each_task_loads_and_is_short(task: str, folder: Path) -> None:
    done = init("--task", task, "--data", "rows/*.jsonl", "--base-model", "base@prod", "--name", "support")
    assert done.exit_code == 0, done.output
    config = load(RunConfig, "run.yaml")
    assert (config.name, config.base_model, config.release.alias) == ("support", "base@prod", "support")
    assert [source.path for source in config.data.sources] == ["rows/*.jsonl"]
    lines = (folder / "run.yaml").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if not line.startswith("#")]) <= 18
    assert max(map(len, lines)) <= 125
    assert os.listdir(folder) == ["run.yaml"]  # no store, no partial file


def test_tasks_differ_in_what_they_need() -> None:
    configs = {}
    for task in TASKS:
        Path("run.yaml").write_text(run_file_text(task, "rows.jsonl", "base", "a"), encoding="utf-8")
        configs[task] = load(RunConfig, "run.yaml")
    exact = {task for task, config in configs.items() if "exact_match" in config.release.gate.thresholds}
    assert exact == {"classify", "extract"}
    assert {task for task, config in configs.items() if config.eval.labels} == {"classify"}
    assert {task for task, config in configs.items() if config.eval.max_new_tokens > 32} == {"extract", "tools"}
    assert {task for task, config in configs.items() if config.train.adapter is None} == {"pretrain"}
    methods = {task: config.train.method for task, config in configs.items() if config.train.method != "sft"}
    assert {task: method.kind for task, method in methods.items()} == {"preferences": "dpo"}
    assert all(config.deploy and config.release.gate.better_than for config in configs.values())
    (rule,) = configs["pretrain"].release.gate.better_than
    assert rule.metric == "bits_per_byte"


def test_the_minimal_run_file_is_its_output(folder: Path) -> None:
    assert init("--task", "chat").exit_code == 0
    assert (folder / "run.yaml").read_bytes() == (ROOT / "jobs" / "minimal.yaml").read_bytes()


@pytest.mark.parametrize("task", ["classify", "pretrain"])
def test_the_next_commands_are_printed(task: str) -> None:
    done = init("my run.yaml", "--task", task)
    assert done.output.splitlines()[-2:] == ["  forge data prepare 'my run.yaml'", "  forge run 'my run.yaml'"]


def test_the_command_of_the_guide_prints_what_the_guide_shows() -> None:
    page = (ROOT / "docs" / "guides" / "fine-tune.md").read_text(encoding="utf-8")
    command = page.partition("\nforge init support.yaml ")[2].partition("\n")[0]
    output = page[page.index("wrote support.yaml") :].partition("```")[0]
    assert init("support.yaml", *shlex.split(command)).output == output
    assert load(RunConfig, "support.yaml").release.alias == "support"


def test_json_gives_path_and_task() -> None:
    done = init("a.yaml", "--task", "tools", "--json")
    assert json.loads(done.stdout) == {"path": "a.yaml", "task": "tools"}


def test_an_existing_file_is_replaced_only_with_force(folder: Path) -> None:
    target = folder / "run.yaml"
    target.write_text("mine\n")
    done = init("--json")
    assert done.exit_code == 2
    assert "already exists" in json.loads(done.stdout)["error"]["message"]
    assert "--force" in json.loads(done.stdout)["error"]["hint"]
    assert target.read_text() == "mine\n"
    assert init("--force").exit_code == 0
    assert load(RunConfig, target).name == "my-model"


def test_a_write_that_fails_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    target = folder / "run.yaml"
    target.write_text("mine\n")
    monkeypatch.setattr(os, "fsync", fail)
    done = init("--force")
    assert done.exit_code == 2
    assert "No space left" in done.stderr
    assert target.read_text() == "mine\n"
    assert os.listdir(folder) == ["run.yaml"]


@pytest.mark.parametrize("path", ["absent/run.yaml", "."])
def test_a_path_that_cannot_be_a_file_is_refused_with_a_hint(path: str, folder: Path) -> None:
    done = init(path, "--force")
    assert done.exit_code == 2
    assert "hint: give a file" in done.stderr
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    "path", ["*.jsonl", "a, b: c}.jsonl", 'it\'s "rows" # 1.jsonl', "1.5", "null", "rows " * 40 + "ü.jsonl"]
)
def test_values_are_quoted_where_yaml_needs_it(path: str) -> None:
    assert init("--data", path, "--base-model", path).exit_code == 0
    config = load(RunConfig, "run.yaml")
    assert (config.data.sources[0].path, config.base_model) == (path, path)


def test_a_name_that_no_run_may_have_is_refused_before_writing(folder: Path) -> None:
    done = init("--name", "My Model")
    assert done.exit_code == 2
    assert "name='My Model'" in done.stderr
    assert os.listdir(folder) == []


# ---------------------------------------------------------------- the next cycle

RUN = {
    "name": "support",
    "base_model": "tiny",
    "licence": "MIT",
    "data": {"sources": [{"path": "old/*.jsonl"}], "sequence_length": 256, "splits": {"test": 0.2}},
    "train": {"adapter": {"r": 4, "target_modules": ["q_proj"]}, "seed": 5, "init_from": "merge"},
    "release": {"alias": "support@prod"},
}


def made(catalog: Catalog, weights: str = "adapter", **more: Any) -> ModelVersion:
    """A version and the run that made it, with the settings `RUN`."""
    config = resolved(parse(RunConfig, RUN))
    run = fabricated.run(catalog, weights, "ds_1", "mv_base", config=config, train=config["train"])
    return fabricated.version(catalog, f"v-{weights}", run.id, "mv_base", weights=weights, **more)


def from_version(catalog: Catalog, *words: str) -> Result:
    return init("--store", catalog.store.uri, "--force", *words)


def test_the_next_cycle_has_the_settings_of_the_run_and_starts_from_its_version(catalog: Catalog) -> None:
    version = made(catalog)
    promotion.promote(catalog, version.id, "support@prod")
    for reference in (version.id, "support@prod"):
        done = from_version(catalog, "--from", reference)
        assert done.exit_code == 0, done.output
        config, before = load(RunConfig, "run.yaml"), parse(RunConfig, RUN)
        assert (config.base_model, config.train.init_from, config.licence) == (version.id, "continue", "")
        assert config.data == before.data
        assert config.train == before.train.model_copy(update={"init_from": "continue"})
        assert (config.name, config.release) == ("support", before.release)
    text = Path("run.yaml").read_text(encoding="utf-8")
    assert "Name the rows of this cycle." in text
    assert max(map(len, text.splitlines())) <= 125
    done = from_version(catalog, "--from", version.id, "--data", "new.jsonl", "--name", "again")
    assert done.exit_code == 0, done.output
    config = load(RunConfig, "run.yaml")
    assert ([source.path for source in config.data.sources], config.name) == (["new.jsonl"], "again")
    assert config.data.splits.test == 0.2


def test_full_weights_need_no_init_from(catalog: Catalog) -> None:
    done = from_version(catalog, "--from", made(catalog, "full").id)
    assert done.exit_code == 0, done.output
    config = load(RunConfig, "run.yaml")
    assert config.train.init_from is None
    assert config.train.adapter == parse(RunConfig, RUN).train.adapter


def test_what_no_run_made_and_options_that_do_not_count_are_refused(catalog: Catalog, folder: Path) -> None:
    base, trained = fabricated.version(catalog, "base"), made(catalog)
    without_run = fabricated.version(catalog, "gone", "run_gone", "mv_base")
    for words, message in (
        (("--from", base.id), "was made by no run"),
        (("--from", without_run.id), "the settings of run_gone"),
        (("--from", "nobody"), "'nobody' is no id, alias or fingerprint"),
        (("--from", trained.id, "--task", "chat"), "--task with --from"),
        (("--from", trained.id, "--base-model", "x"), "--base-model with --from"),
    ):
        done = from_version(catalog, *words)
        assert done.exit_code != 0
        assert message in done.output
    assert not (folder / "run.yaml").exists()
