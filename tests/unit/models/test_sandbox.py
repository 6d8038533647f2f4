"""The sandbox process for imported tokenizers and templates: it must find this package and start."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from forge_ray.errors import PolicyError
from forge_ray.models import sandbox

pytestmark = pytest.mark.unit


def folder_with(template: str, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return tmp_path


def test_module_and_path_of_the_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the package is not installed, a process in another folder finds it by PYTHONPATH."""
    seen: dict[str, Any] = {}

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.update(words=words, path=options["env"]["PYTHONPATH"])
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    sandbox.refuse_bombs(folder_with("{{ messages }}", tmp_path))
    assert seen["words"][1] == "-m"
    module = importlib.util.find_spec(seen["words"][2])
    assert module is not None
    assert module.origin == sandbox.__file__
    assert Path(seen["path"].split(os.pathsep)[0]) == Path(__file__).parents[3]


def test_template_that_accesses_internals_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    sandbox.refuse_bombs(folder_with("{% for m in messages %}{{ m.content }}{% endfor %}", good))
    with pytest.raises(PolicyError, match="accesses Python internals"):
        sandbox.refuse_bombs(folder_with("{{ messages.__class__.__mro__ }}", bad))
