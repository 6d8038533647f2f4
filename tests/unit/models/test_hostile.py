"""Hostile files: each is refused, or its row quarantined, with a reason; nothing runs, time and memory are bounded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile import ADAPTERS, DATA, GGUFS, MODELS, Bomb, code

from forge_ray.config.base import load
from forge_ray.config.data import DataConfig
from forge_ray.config.run import RunConfig
from forge_ray.data.read.sources import expand
from forge_ray.errors import ConfigError, DataError, ForgeError, PolicyError
from forge_ray.models.import_model import import_model
from forge_ray.models.sandbox import refuse_bombs
from forge_ray.store.catalog import Catalog

pytestmark = [pytest.mark.unit, pytest.mark.slow]
ROOT = Path(__file__).parents[3]
CPU_S = 30


def test_canary_appears_when_code_runs(tmp_path: Path) -> None:
    """The control: without it the tests below could not fail."""
    for run in (lambda: pickle.loads(pickle.dumps(Bomb(tmp_path / "c"))), lambda: exec(code(tmp_path / "c"))):
        run()
        (tmp_path / "c").unlink()


@pytest.mark.parametrize("name", [*MODELS, *(f"adapter: {name}" for name in ADAPTERS)])
def test_a_hostile_folder_is_refused(name: str, tmp_path: Path, tiny_model_dir: Path, catalog: Catalog) -> None:
    make, word = MODELS[name] if name in MODELS else ADAPTERS[name.removeprefix("adapter: ")]
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(tiny_model_dir, folder)
    make(folder, canary)
    began = time.process_time()
    with pytest.raises((PolicyError, ConfigError)) as error:
        import_model(catalog, folder, "evil")
    assert word in error.value.message
    assert "\x1b" not in error.value.message
    assert error.value.hint
    assert time.process_time() - began < CPU_S
    assert not canary.exists()
    assert catalog.aliases() == {}
    assert not list(Path(catalog.store.root).glob("models/*"))


@pytest.mark.parametrize("name", GGUFS)
def test_a_hostile_gguf_file_is_refused(name: str, tmp_path: Path, catalog: Catalog) -> None:
    (tmp_path / "model.gguf").write_bytes(GGUFS[name])
    with pytest.raises(PolicyError, match="is not a valid GGUF file"):
        import_model(catalog, tmp_path / "model.gguf", "evil")


def test_hostile_rows_are_quarantined(tmp_path: Path) -> None:
    """In a process with 2 GiB more than it starts with; each file has its seconds."""
    canary = tmp_path / "canary"
    for name, (make, _, _) in DATA.items():
        make(tmp_path / name, canary)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/hostile.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    for name, (_, word, good) in DATA.items():
        seconds, reasons = outcomes[name]
        rejects = [reason for reason in reasons if reason]
        assert seconds < CPU_S, name
        assert good < 0 or reasons.count("") == good, (name, reasons)
        assert bool(rejects) == bool(word), (name, reasons)
        assert all(word in reason and not reason.startswith("ERROR") for reason in rejects[:1]), (name, reasons)
    assert not canary.exists()


def test_a_saved_dataset_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (tmp_path / "secret.arrow").write_bytes(b"x")
    for state, value in (
        ("state.json", {"_data_files": [{"filename": "../secret.arrow"}]}),
        ("state.json", {"_data_files": [{"filename": str(tmp_path / "secret.arrow")}]}),
        ("dataset_dict.json", {"splits": [".."]}),
    ):
        (folder / "state.json").unlink(missing_ok=True)
        (folder / state).write_text(json.dumps(value))
        with pytest.raises(DataError, match="leads out of"):
            expand(DataConfig.model_validate({"sources": [{"path": str(folder)}]}))


def test_an_unknown_kind_of_file_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "rows.avro").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="no known format"):
        expand(DataConfig.model_validate({"sources": [{"path": str(tmp_path / "rows.avro")}]}))


@pytest.mark.parametrize("text", [
    "name: !!python/object/apply:os.system ['touch CANARY']",
    "name: !!python/name:os.system",
    "!!python/object/new:subprocess.Popen [['touch', 'CANARY']]",
    "name: &a [x, x]\nbase_model: &b [*a, *a, *a, *a, *a, *a, *a, *a]\n" + "".join(
        f"k{n}: &c{n} [{', '.join([f'*c{n - 1}' if n else '*b'] * 9)}]\n" for n in range(20)),
    "[" * 5000,
], ids=["apply", "name", "new", "laughs", "deep"])  # fmt: skip
def test_a_hostile_run_file_is_refused(text: str, tmp_path: Path) -> None:
    file, canary = tmp_path / "run.yaml", tmp_path / "canary"
    file.write_text(text.replace("CANARY", str(canary)))
    began = time.process_time()
    with pytest.raises(ForgeError):
        load(RunConfig, str(file))
    assert time.process_time() - began < CPU_S
    assert not canary.exists()


def test_terminating_tokenizer_and_template_are_accepted(tiny_model_dir: Path) -> None:
    refuse_bombs(tiny_model_dir)


def test_size_of_the_corpus() -> None:
    assert len(MODELS) >= 40
    assert len(ADAPTERS) + len(GGUFS) + len(DATA) >= 40
