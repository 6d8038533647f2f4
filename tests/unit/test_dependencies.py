"""What an installation without any extra can do, and docs/reference/dependencies.md lists what pyproject.toml wants."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = [pytest.mark.unit, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Modules of the extras' packages, of what those packages bring along, and of dependencies that are gone.
OPTIONAL = (
    *("mistral_common", "sentencepiece", "tiktoken", "pycountry", "pydantic_extra_types"),
    "py3langid",
    *("inscriptis", "lxml", "pypdf", "docx", "openpyxl", "deltalake"),
    *("tensorboard", "mlflow", "sqlalchemy", "alembic", "bitsandbytes", "vllm"),
    *("httpx", "httpcore"),
)
# Absent packages are not found, which is what libraries ask: an error of the finder would be another thing.
WITHOUT = """
import importlib, importlib.machinery, importlib.util, pkgutil, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {optional!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
assert not any(map(importlib.util.find_spec, {optional!r}))
import forge_ray
names = [module.name for module in pkgutil.walk_packages(forge_ray.__path__, "forge_ray.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names), sorted({optional!r} & {{name.partition(".")[0] for name in sys.modules}}))
"""


def test_every_module_imports_without_the_extras() -> None:
    code = WITHOUT.format(optional=set(OPTIONAL))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    number, loaded = done.stdout.strip().splitlines()[-1].split(" ", 1)
    assert int(number) > 150
    assert loaded == "[]"


def requirements(lines: list[str]) -> set[str]:
    return {Requirement(line).name for line in lines}


def listed(heading: str) -> set[str]:
    """The packages in the first column of the table under a heading."""
    page = (ROOT / "docs/reference/dependencies.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return {
        name for cell in re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE) for name in re.findall(r"`([^`]+)`", cell)
    }


def test_page_lists_every_direct_dependency() -> None:
    assert listed("What every installation has") == requirements(PROJECT["dependencies"])


def test_page_lists_every_extra() -> None:
    own = {"dev", "bench"}  # for work on forge_ray itself
    assert listed("Extras") == set(PROJECT["optional-dependencies"]) - own
