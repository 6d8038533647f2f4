"""The identity of the code is that of the whole package, whichever folder asks for it."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import pytest

from forge_ray.machine import environment

pytestmark = pytest.mark.unit

PACKAGE = Path(__file__).parents[3] / "forge_ray"


def test_the_code_digest_is_over_every_module() -> None:
    files = {path.relative_to(PACKAGE).as_posix(): path.read_bytes() for path in PACKAGE.rglob("*.py")}
    assert {"__init__.py", "pipeline.py", "train/loop.py", "data/build/build.py", "cli/main.py"} <= files.keys()
    hasher = hashlib.sha256()
    for name in sorted(files, key=Path):
        hasher.update(name.encode() + b"\0" + files[name] + b"\0")
    assert environment.code_digest() == "sha256:" + hasher.hexdigest()


def test_the_commit_is_that_of_the_package() -> None:
    root = inspect.signature(inspect.unwrap(environment.code_commit)).parameters["root"].default
    assert root == environment.PACKAGE == PACKAGE
