"""`forge submit`: the folder is compared with the run file before anything is sent, and no proxy is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge_ray.cli import job_folder
from forge_ray.cli.submit import EXCLUDES, submit
from forge_ray.config.base import parse
from forge_ray.config.run import RunConfig
from forge_ray.errors import ConfigError, NotFound
from tests.scripted_http import Reply, as_json, corporate_proxy, scripted

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a run file and rows."""
    work = tmp_path / "work"
    for name in ("run.yaml", "rows/a.jsonl", "rows/b.jsonl"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("{}\n")
    monkeypatch.chdir(work)
    return work


def config_of(*paths: str, **more: Any) -> RunConfig:
    data = {"sources": [{"path": path} for path in paths], **more.pop("data", {})}
    return parse(RunConfig, {"name": "x", "base_model": "b", "data": data, "release": {"alias": "a"}, **more})


def check(config: RunConfig) -> None:
    job_folder.require_complete(config, EXCLUDES, Path.cwd())


def test_rows_that_are_sent_are_accepted(folder: Path) -> None:
    (folder / "linked").symlink_to("rows")
    check(config_of("rows/*.jsonl", "./rows/../rows/a.jsonl"))
    check(config_of("/mnt/rows/*.jsonl", "s3://bucket/rows/*.jsonl", "~/rows.jsonl"))  # read where the cluster has them


@pytest.mark.parametrize(("where", "line", "ignore_file"), [
    (".gitignore", "rows/", ".gitignore"),
    (".gitignore", "*.jsonl", ".gitignore"),
    ("rows/.gitignore", "*", "rows/.gitignore"),
    (".rayignore", "/rows", ".rayignore"),
])  # fmt: skip
def test_rows_that_an_ignore_file_leaves_out(where: str, line: str, ignore_file: str, folder: Path) -> None:
    (folder / where).write_text(f"{line}\n")
    with pytest.raises(ConfigError) as caught:
        check(config_of("rows/*.jsonl"))
    assert caught.value.message.startswith(
        f"data.sources: the job would not have rows/a.jsonl (left out by {ignore_file}), rows/b.jsonl (left out by"
    )
    assert "all nodes share" in caught.value.hint


def test_rows_that_come_along_are_not_sent(folder: Path) -> None:
    check(config_of("rows/a.jsonl", eval={"general": {"rows": "chats"}}))
    check(config_of("rows/a.jsonl", eval={"general": {"rows": "ds_0123456789abcdef"}}))


def test_the_switch_of_ray_sends_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".gitignore").write_text("rows/\n")
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    check(config_of("rows/*.jsonl"))


def test_other_files_that_the_job_would_not_have(folder: Path) -> None:
    (folder.parent / "outside.jsonl").write_text("{}\n")
    (folder / ".venv").mkdir()
    for name in (".venv/rows.jsonl", "sums", "key", "safe.jsonl", "tone.py", "schema.json", "bench.jsonl", "model.gguf"):
        (folder / name).write_text("")
    (folder / ".gitignore").write_text("sums\nkey\nsafe.jsonl\ntone.py\nschema.json\nbench.jsonl\n*.gguf\n")
    for config, message in (
        (config_of("../outside.jsonl"), "outside.jsonl (outside the current folder)"),
        (config_of(".venv/rows.jsonl"), ".venv/rows.jsonl (in a folder that is never sent)"),
        (config_of("rows/a.jsonl", data={"subject": {"field": "u", "key_file": "key"}}), "data.subject.key_file: the job"),
        (config_of("rows/a.jsonl", eval={"safety": ["safe.jsonl"]}), "eval.safety: the job would not have safe.jsonl"),
        (config_of("rows/a.jsonl", eval={"metrics": ["tone.py:tone"]}), "eval.metrics: the job would not have tone.py"),
        (config_of("rows/a.jsonl", eval={"json_schema": "schema.json"}), "eval.json_schema: the job would not have schema"),
        (config_of("rows/a.jsonl", eval={"general": {"rows": "safe.jsonl"}}), "eval.general.rows: the job would not have"),
        (config_of("rows/a.jsonl", base_model="model.gguf"), "base_model: the job would not have model.gguf"),
        (
            config_of("rows/a.jsonl", data={"curate": [{"rule": "decontaminate", "against": ["bench.jsonl", "ds_1"]}]}),
            "data.curate.against: the job would not have bench.jsonl",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            check(config)
        assert message in caught.value.message
    with pytest.raises(NotFound, match="no file matches 'rows/none"):
        check(config_of("rows/none*.jsonl"))


def test_many_missing_files_are_counted(folder: Path) -> None:
    for number in range(9):
        (folder / f"rows/{number}.jsonl").write_text("{}\n")
    (folder / ".gitignore").write_text("rows\n")
    with pytest.raises(ConfigError, match=r"and 8 more: it gets a copy"):
        check(config_of("rows/*.jsonl"))


def test_a_folder_that_is_too_large(folder: Path) -> None:
    (folder / "checkpoints").mkdir()
    with (folder / "checkpoints/weights.bin").open("wb") as stream:
        stream.truncate(700 << 20)  # a hole: nothing is written
    with pytest.raises(ConfigError) as caught:
        check(config_of("rows/*.jsonl"))
    sizes = "sent with 700 MiB in 4 files, and a cluster accepts 100 MiB; the largest are checkpoints 700 MiB"
    assert sizes in caught.value.message
    assert ".rayignore" in caught.value.hint
    (folder / ".rayignore").write_text("checkpoints\n")
    check(config_of("rows/*.jsonl"))


def dashboard(method: str, path: str) -> Reply:
    """Ray's, as far as a submission asks."""
    if path == "/api/version":
        return as_json({"ray_version": "2.60.0", "ray_commit": "", "version": "4"})
    if path.startswith("/api/packages"):
        return as_json({}, 404 if method == "GET" else 200)
    return as_json({"job_id": "raysubmit_1", "submission_id": "raysubmit_1"})


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for variable in (name, name.upper()):
            monkeypatch.setenv(variable, "")
            monkeypatch.delenv(variable)


@pytest.mark.usefixtures("no_token")
def test_the_cluster_is_asked_without_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(corporate_proxy) as proxy, scripted(dashboard) as ray:
        monkeypatch.setenv("http_proxy", proxy.url)
        result = submit("run.yaml", config_of("rows/*.jsonl"), ray.url, "/mnt/forge", (), wait=False)
        assert result["job"] == "raysubmit_1"
        assert ray.requests[-1] == "POST /api/jobs/"
        assert not proxy.requests


@pytest.mark.usefixtures("no_token")
def test_nothing_is_sent_before_the_folder_is_compared(folder: Path) -> None:
    (folder / ".gitignore").write_text("rows\n")
    with scripted(dashboard) as ray:
        with pytest.raises(ConfigError, match=r"left out by \.gitignore"):
            submit("run.yaml", config_of("rows/*.jsonl"), ray.url, "/mnt/forge", (), wait=False)
        assert not ray.requests


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize(("answer", "message"), [
    (corporate_proxy, r"was answered by a proxy or another server \(server: squid/6.1; via: .*not by the dashboard"),
    (lambda *_: (200, {"content-type": "text/html"}, b"<html>hello</html>"), "was answered by a proxy or another server"),
    (lambda *_: (401, {"content-type": "text/plain"}, b"Unauthorized"), "could not be submitted to http://127.0.0.1"),
    (lambda *_: as_json({"detail": "wrong"}, 500), "could not be submitted to http://127.0.0.1"),
    (lambda *_: as_json({"other": 1}), "could not be submitted to http://127.0.0.1"),
])  # fmt: skip
def test_another_server_at_the_address_is_named_as_such(answer: Any, message: str) -> None:
    with scripted(answer) as server, pytest.raises(NotFound, match=message):
        submit("run.yaml", config_of("rows/*.jsonl"), server.url, "/mnt/forge", (), wait=False)
