"""Whatever is wrong in a run file, a model or rows ends in one `error:`, at most one `hint:` and an exit code."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from forge_ray.cli.ends import report
from forge_ray.cli.main import cli
from forge_ray.config.base import parse
from forge_ray.config.run import RunConfig
from forge_ray.errors import ConfigError, Interrupted, PolicyError, StoreError, first_cause

pytestmark = pytest.mark.unit

FOREIGN = ("Traceback", "ray::", "RayTaskError", "pydantic", "report it with", "\n  File ", "C++")
RUN_VERBS = (("plan",), ("train",), ("run",), ("release",), ("eval",), ("data", "prepare"))
WHOLE: dict[str, Any] = {
    "name": "wrong",
    "base_model": "tiny",
    "data": {"sources": [{"path": "rows.jsonl"}]},
    "release": {"alias": "wrong"},
}
# None is a value of some settings and wrong for others; a mapping with this key is a value of none
WRONG: tuple[Any, ...] = ({"no such key": 1}, "no such word", -1e30, 1e30, None, True, [], [[]], "", -1, {})


def ends_well(done: Result) -> str:
    """The error's text of a command that ended in our words."""
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code in (1, 2, 3), done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    hints = [line for line in done.stderr.splitlines() if line.startswith("hint: ")]
    assert len(errors) == 1, done.output
    assert len(hints) <= 1, done.output
    assert not [word for word in FOREIGN if word in done.output], done.output
    assert len(errors[0]) > len("error: ") + 5
    return errors[0]


def forge(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


def places(schema: dict[str, Any], root: dict[str, Any], at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a run file has settings: every property of every section, the items of lists and mappings too."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if len(at) > 8:
        return
    for kind in schema.get("anyOf", ()):
        yield from places(kind, root, at)
    for name, inner in schema.get("properties", {}).items():
        yield (*at, name)
        yield from places(inner, root, (*at, name))
    if isinstance(inner := schema.get("items"), dict):
        yield (*at, 0)
        yield from places(inner, root, (*at, 0))
    if isinstance(inner := schema.get("additionalProperties"), dict):
        yield (*at, "added")
        yield from places(inner, root, (*at, "added"))


def with_value(place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A run file with one wrong setting, in sections that are made for it."""
    whole: dict[str, Any] = json.loads(json.dumps(WHOLE))
    node: Any = whole
    for here, following in itertools.pairwise(place):
        section: Any = [] if isinstance(following, int) else {}
        if isinstance(node, list):
            if not node:
                node.append(section)
            node = node[0]
        else:
            if not isinstance(node.get(here), type(section)):
                node[here] = section
            node = node[here]
    if isinstance(node, list):
        node[:] = [value]
    else:
        node[place[-1]] = value
    return whole


def wrong_run_files(most: int = len(WRONG)) -> Iterator[tuple[str, dict[str, Any]]]:
    """(the setting in words, a run file that is refused): each setting with up to `most` values that it does not take."""
    schema = RunConfig.model_json_schema()
    for place in dict.fromkeys(places(schema, schema)):
        num_found = 0
        for value in WRONG:
            wrong = with_value(place, value)
            try:
                parse(RunConfig, wrong)
            except ConfigError:
                yield ".".join(map(str, place)), wrong
                num_found += 1
                if num_found == most:
                    break


def test_there_are_hundreds_of_settings() -> None:
    schema = RunConfig.model_json_schema()
    named = {".".join(map(str, place)) for place in places(schema, schema)}
    assert len(named) > 200
    assert {"train.scaling.num_workers", "deploy.aliases.added.guard.window_s", "data.sources.0.path", "eval.leak"} <= named


def check(name: str, wrong: dict[str, Any], verb: tuple[str, ...], folder: Path) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(wrong))
    text = ends_well(forge(*verb, str(folder / "run.yaml"), "--store", str(folder / "store")))
    assert "run.yaml" in text, (name, text)


def test_a_wrong_setting_ends_in_our_words(tmp_path: Path) -> None:
    """One value of each setting, on one verb each."""
    for (name, wrong), verb in zip(wrong_run_files(most=1), itertools.cycle(RUN_VERBS), strict=False):
        check(name, wrong, verb, tmp_path)


@pytest.mark.large
@pytest.mark.parametrize("verb", RUN_VERBS, ids=" ".join)
def test_every_wrong_value_ends_in_our_words(verb: tuple[str, ...], tmp_path: Path) -> None:
    for name, wrong in wrong_run_files():
        check(name, wrong, verb, tmp_path)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, store: Any) -> Path:
    """A store with the tiny model, next to a folder of every kind of wrong model and wrong rows."""
    root = tmp_path_factory.mktemp("ends")
    shutil.copytree(store.uri, root / "store")
    (root / "rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    (root / "empty.jsonl").touch()
    (root / "bytes.jsonl").write_bytes(bytes(range(256)) * 40)
    (root / "list.jsonl").write_text("[1, 2]\n")
    (root / "not.parquet").write_text("text\n")
    (root / "no-files").mkdir()
    (root / "no-rows").mkdir()
    (root / "no-rows" / "notes.txt.bak").write_text("text\n")
    (root / "loop.jsonl").symlink_to(root / "loop.jsonl")
    models = root / "models"
    (models / "empty").mkdir(parents=True)
    (models / "file.txt").write_text("no model\n")
    (models / "file.gguf").write_bytes(b"GGUF" + bytes(40))
    (models / "adapter").mkdir()
    (models / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "tiny", "r": 8}'
    )
    shutil.copyfile(tiny_model_dir / "model.safetensors", models / "adapter" / "adapter_model.safetensors")

    def broken(name: str, file: str, change: Callable[[Path], None]) -> None:
        shutil.copytree(tiny_model_dir, models / name)
        change(models / name / file)

    broken("no weights", "model.safetensors", Path.unlink)
    broken("cut weights", "model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:1000]))
    broken("text weights", "model.safetensors", lambda path: path.write_text("no weights") and None)
    broken("empty weights", "model.safetensors", lambda path: path.write_bytes(b""))
    broken("no config", "config.json", Path.unlink)
    broken("cut config", "config.json", lambda path: path.write_text('{"model_type": "lla') and None)
    broken("list config", "config.json", lambda path: path.write_text("[]") and None)
    broken("null config", "config.json", lambda path: path.write_text("null") and None)
    broken("bytes config", "config.json", lambda path: path.write_bytes(b"\xff\xfe\x00"))
    broken("text sizes", "config.json", lambda path: path.write_text(path.read_text().replace(": 64,", ': "x",')) and None)
    broken("no tokenizer", "tokenizer.json", Path.unlink)
    broken("cut tokenizer", "tokenizer.json", lambda path: path.write_text('{"version"') and None)
    broken("list tokenizer", "tokenizer_config.json", lambda path: path.write_text("[]") and None)
    broken("pickle", "model.bin", lambda path: path.write_bytes(b"\x80\x04."))
    return root


MODELS = (
    *("empty", "file.txt", "file.gguf", "adapter", "no weights", "cut weights", "text weights", "empty weights"),
    *("no config", "cut config", "list config", "null config", "bytes config", "text sizes"),
    *("no tokenizer", "cut tokenizer", "list tokenizer", "pickle", "absent"),
)
NAMES = (
    "",
    " ",
    "absent",
    "no/such/folder",
    "mv_0000000000000000",
    "ds_0000000000000000",
    "run_0",
    "~nobody/x",
    "a\nb",
    "x" * 5000,
)


@pytest.mark.parametrize("verb", [("models", "check"), ("models", "import")], ids=" ".join)
@pytest.mark.parametrize("model", MODELS)
def test_a_wrong_model_ends_in_our_words(verb: tuple[str, ...], model: str, filled: Path) -> None:
    ends_well(forge(*verb, str(filled / "models" / model), "--store", str(filled / "store")))


def run_file(folder: Path, **sections: Any) -> str:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(WHOLE | {"data": {"sources": [{"path": str(folder / "rows.jsonl")}]}} | sections))
    return str(file)


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_wrong_base_model_ends_in_our_words(name: str, filled: Path) -> None:
    for verb in RUN_VERBS:
        ends_well(forge(*verb, run_file(filled, base_model=name), "--store", str(filled / "store")))


@pytest.mark.parametrize(
    "verb",
    [
        *(("models", verb) for verb in ("show", "check", "archive", "restore", "import")),
        *(("data", verb) for verb in ("show", "card")),
        *(("runs", verb) for verb in ("show", "export")),
        *(("serve",), ("lineage",), ("export",), ("verify",), ("approve",), ("reproduce",), ("trace",)),
        *(("chat", "hello", "--url"), ("eval", "--data", "absent.jsonl", "--model")),
        *((verb,) for verb in ("plan", "train", "run", "release", "eval")),
    ],
    ids=" ".join,
)
def test_a_wrong_name_ends_in_our_words(verb: tuple[str, ...], filled: Path) -> None:
    for name in NAMES:
        done = forge(*verb, name, "--store", str(filled / "store"))
        if "Usage: " not in done.stderr:  # click's own words
            ends_well(done)


@pytest.mark.parametrize(
    "path", ["absent.jsonl", "no-files", "no-rows", "loop.jsonl", "*.none", "rows.jsonl/below", "absent/"]
)
def test_wrong_paths_of_rows_end_in_our_words(path: str, filled: Path) -> None:
    """They are refused before Ray starts."""
    for verb in RUN_VERBS:
        file = run_file(filled, data={"sources": [{"path": str(filled / path)}]})
        ends_well(forge(*verb, file, "--store", str(filled / "store")))


@pytest.mark.large
@pytest.mark.parametrize("path", ["empty.jsonl", "bytes.jsonl", "list.jsonl", "not.parquet"])
def test_wrong_rows_end_in_our_words(path: str, filled: Path, ray_cluster: None) -> None:
    for verb in RUN_VERBS:
        file = run_file(filled, data={"sources": [{"path": str(filled / path)}]})
        ends_well(forge(*verb, file, "--store", str(filled / "store")))


@pytest.mark.large
def test_an_empty_split_ends_in_our_words(filled: Path, ray_cluster: None) -> None:
    data = {"sources": [{"path": str(filled / "rows.jsonl")}], "splits": {"test": 0.5}, "sequence_length": 64}
    train = {"validation": {"every_steps": 1}, "export_step": "best", "precision": "fp32", "scaling": {"num_workers": 0}}
    for verb in (("train",), ("run",), ("eval",)):
        ends_well(forge(*verb, run_file(filled, data=data, train=train), "--store", str(filled / "store")))


@pytest.mark.large
def test_more_than_there_is_ends_in_our_words(filled: Path, ray_cluster: None) -> None:
    """On a Ray of its own a command refuses at once what it could only wait for, with what is asked and what there is."""
    asked: dict[str, dict[str, Any]] = {
        "GPU": {"train": {"scaling": {"gpus_per_worker": 1}, "precision": "fp32"}},
        "800 × 2 CPU": {"train": {"scaling": {"num_workers": 800, "cpus_per_worker": 2}, "global_batch": 800}},
        "6400 CPU": {"eval": {"cpus": 6400}},
        "70 GPU": {"eval": {"gpus": 70}},
        "9000 CPU": {"deploy": {"name": "large", "models": ["tiny"], "cpus_per_replica": 9000}},
    }
    for words, sections in asked.items():
        text = ends_well(forge("run", run_file(filled, **sections), "--store", str(filled / "store")))
        assert words in text
        assert "this machine has" in text


class FakeTaskError(Exception):
    """As Ray wraps what a task raised."""


FakeTaskError.__module__ = "ray.exceptions"


def wrapped(cause: BaseException) -> FakeTaskError:
    error = FakeTaskError("ray::task() (pid=1, ip=127.0.0.1)\n  File x, line 1")
    error.cause = cause  # type: ignore[attr-defined]
    return error


def test_the_first_cause_is_inside_every_wrapper() -> None:
    try:
        raise StoreError("file x is cut", hint="restore it") from OSError("short read")
    except StoreError as error:
        inner = error
    assert first_cause(wrapped(wrapped(inner))) is inner
    assert first_cause(wrapped(inner.__cause__ or inner)) is inner.__cause__
    group = FakeTaskError("workers failed")
    group.worker_failures = {1: wrapped(inner)}  # type: ignore[attr-defined]
    assert first_cause(group) is inner


def test_an_error_of_a_real_task_is_found() -> None:
    from ray.exceptions import RayTaskError

    error = RayTaskError("f", "Traceback …", PolicyError("unsafe", hint="do not"), "ray::f", 1, "127.0.0.1")
    assert type(first_cause(error.as_instanceof_cause())) is PolicyError


def test_a_defect_is_one_error_and_its_traceback_is_in_a_private_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for _ in range(30):
        assert report(wrapped(KeyError("a\nerror: b"))) == 1
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 60
    assert printed[0].startswith("error: KeyError: ")
    logs = sorted((tmp_path / "forge_ray" / "errors").iterdir())
    assert len(logs) == 20
    assert str(logs[-1]) in printed[-1]
    assert "KeyError" in logs[-1].read_text() or "ray::task()" in logs[-1].read_text()
    assert logs[-1].stat().st_mode & 0o077 == 0


def test_an_error_of_the_system_names_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for error, words in (
        (FileNotFoundError(2, "No such file or directory", "rows"), "check the path"),
        (OSError(28, "No space left on device", str(tmp_path)), "free space"),
        (MemoryError(), "smaller"),
    ):
        assert report(error) == 1
        printed = capsys.readouterr().err
        assert words in printed
        assert getattr(error, "filename", None) is None or str(error.filename) in printed  # type: ignore[attr-defined]


def test_ctrl_c_ends_with_its_code_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(Interrupted("train"), as_json=True) == 130
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["code"] == "interrupted"
    assert "stopped by Ctrl-C (SIGINT) in stage train" in printed.err
    assert "the same command resumes" in printed.err


@pytest.mark.parametrize(
    ("alias", "words"),
    [("base", "alias 'base' is the id of a record"), ("support prod", "'support prod' is not a valid alias")],
)
def test_an_alias_that_cannot_be_is_refused_before_the_import(
    alias: str, words: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    done = CliRunner().invoke(
        cli, ["models", "import", str(tiny_model_dir), "--alias", alias, "--store", str(tmp_path / "store")]
    )
    assert done.exit_code == 2
    assert words in done.output
    assert not (tmp_path / "store/models").exists()
