"""The README's two commands where nothing was prepared: the public package index alone, on each Python of this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.large, pytest.mark.timeout(5400)]

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def interpreter(version: str) -> Path | None:
    """A Python of this version, on PATH or where pyenv keeps them."""
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for candidate in filter(None, candidates):
        asked = [str(candidate), "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == version:
            return Path(candidate)
    return None


def unprepared() -> dict[str, str]:
    """This environment without any setting of pip and uv, and without uv itself: what pip alone does is the harder case."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "VIRTUAL_ENV"))}
    folders = [folder for folder in environ["PATH"].split(os.pathsep) if not (Path(folder) / "uv").exists()]
    return environ | {"PIP_CONFIG_FILE": os.devnull, "PATH": os.pathsep.join(folders)}


def clone(folder: Path) -> Path:
    """What a fresh clone holds, with the changes that are not committed yet."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def make(folder: Path, *words: str) -> str:
    done = subprocess.run(["make", *words], cwd=folder, env=unprepared(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def megabytes(folder: Path) -> int:
    output = subprocess.run(["du", "-sm", folder], capture_output=True, text=True, check=True).stdout
    return int(output.split()[0])


@pytest.mark.parametrize("version", PYTHONS)
def test_quickstart_from_the_public_index(version: str, tmp_path: Path) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} on this machine")
    folder = clone(tmp_path / "clone")
    before = time.monotonic()
    make(folder, "venv", f"PYTHON={python}")
    installed_s = time.monotonic() - before
    output = make(folder, "quickstart", f"PYTHON={python}")
    total_s = time.monotonic() - before
    print(f"Python {version}: installed in {installed_s:.0f} s, {megabytes(folder / '.venv')} MB; answer at {total_s:.0f} s")
    assert "try next" in output
    assert not re.search(r"warning|CUDA|NVIDIA|Traceback", output, re.IGNORECASE), output
    shutil.rmtree(folder)


def test_make_test_from_the_public_index(tmp_path: Path) -> None:
    """With the index's own build of torch, without vLLM."""
    folder = clone(tmp_path / "clone")
    python = next(filter(None, map(interpreter, reversed(PYTHONS))))
    output = make(folder, "test", f"PYTHON={python}")
    print(f"{python}: {megabytes(folder / '.venv')} MB\n{output[-3000:]}")
    assert "without vLLM, whose tests will be skipped: it needs a CPU build of torch" in output
    shutil.rmtree(folder)
