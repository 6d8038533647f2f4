"""The import rule: packages in one order, each importing earlier ones or itself; no circle; light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "forge_ray"

# The rule, bottom first: a file imports earlier names or its own package, inside functions and for type checking too.
ORDER = (
    *("errors", "file_names", "records", "progress", "client"),
    *(
        "config",
        "store",
        "machine",
        "models",
        "data",
        "inference",
        "train",
        "evaluate",
        "release",
        "serve",
        "doctor",
        "papers",
        "export",
        "feedback",
    ),
    *("pipeline", "governance", "cli"),
)
DATA = ("read", "record", "tokens", "dataset", "curate", "build")  # the same inside data/
AT_THE_ROOT = {"errors", "file_names", "records", "progress", "client", "pipeline", "__init__", "__main__"}
MOST_LINES = 400

HEAVY = ("torch", "ray", "deepspeed", "transformers", "peft", "accelerate", "pandas", "matplotlib")


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Name without the root's → file; a package is named by its folder."""
    paths = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


def imports(path: Path, paths: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Each module of forge_ray that the file imports, without the root's name, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            if root == "forge_ray" and rest and rest != "__version__":
                while rest not in paths and rest.rpartition(".")[0] in paths:  # a name inside a module
                    rest = rest.rpartition(".")[0]
                yield rest, node.lineno


def rank(name: str) -> tuple[int, int]:
    """Where a module stands in ORDER, and in DATA."""
    top, _, rest = name.partition(".")
    inner = rest.partition(".")[0]
    return ORDER.index(top), DATA.index(inner) + 1 if top == "data" and inner else 0


def breaches(name: str, path: Path, paths: dict[str, Path]) -> Iterator[str]:
    for imported, line in imports(path, paths):
        try:
            is_below = name == "__main__" or rank(imported) <= rank(name)
        except ValueError:
            yield f"{name}:{line} imports forge_ray.{imported}, which stands nowhere in the order"
        else:
            if not is_below:
                yield f"{name}:{line} imports {imported}, which is above it"


def circles(paths: dict[str, Path]) -> list[list[str]]:
    """Modules that import each other, over however many others (Tarjan)."""
    edges = {name: sorted({other for other, _ in imports(path, paths) if other in paths}) for name, path in paths.items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    cycles = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in edges[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            start = stack.index(name)
            group = stack[start:]
            del stack[start:]
            if len(group) > 1 or name in edges[name]:
                cycles.append(sorted(group))

    for name in edges:
        if name not in index:
            visit(name)
    return cycles


def unknown(paths: dict[str, Path], package: Path = PACKAGE) -> set[str]:
    """Files and packages that stand nowhere: at the root, and directly in data/."""
    names = set()
    for path in paths.values():
        parts = path.relative_to(package).with_suffix("").parts
        if len(parts) == 1:
            names |= {parts[0]} - AT_THE_ROOT
        else:
            names |= {parts[0]} - (set(ORDER) - AT_THE_ROOT)
            if parts[0] == "data":
                names |= {f"data.{parts[1]}"} - {f"data.{room}" for room in (*DATA, "__init__")}
    return names


def long(paths: dict[str, Path]) -> dict[str, int]:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in paths.items()}
    return {name: count for name, count in lines.items() if count > MOST_LINES}


MODULES = modules()


def test_every_package_has_a_layer() -> None:
    assert unknown(MODULES) == set()


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name, path in MODULES.items() if name], ids=[name for name in MODULES if name]
)
def test_module_imports_only_lower_layers(name: str, path: Path) -> None:
    assert list(breaches(name, path, MODULES)) == []


def test_root_package_imports_nothing() -> None:
    assert list(imports(PACKAGE / "__init__.py", MODULES)) == []


def test_no_import_cycles() -> None:
    assert circles(MODULES) == []


def test_module_length_limit() -> None:
    assert long(MODULES) == {}


def package(folder: Path, **files: str) -> dict[str, Path]:
    """A made-up package: `data__read__x` is data/read/x.py."""
    for name, source in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return modules(folder)


def test_layer_violation_is_detected(tmp_path: Path) -> None:
    paths = package(
        tmp_path,
        cli__main="",
        data__read__x="def f():\n    from forge_ray.cli import main\n    import forge_ray.nowhere\n",
        data__record__y="from forge_ray.data.tokens.z import Z\nfrom forge_ray.data.read import x\n",
        data__tokens__z="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from forge_ray import pipeline\n",
        pipeline="from forge_ray.data.tokens import z\nfrom forge_ray.governance.w import W\n",
        governance__w="",
    )
    assert [breach for name, path in paths.items() for breach in breaches(name, path, paths)] == [
        "data.read.x:2 imports cli.main, which is above it",
        "data.read.x:3 imports forge_ray.nowhere, which stands nowhere in the order",
        "data.record.y:1 imports data.tokens.z, which is above it",
        "data.tokens.z:3 imports pipeline, which is above it",
        "pipeline:2 imports governance.w, which is above it",
    ]


def test_import_cycle_is_detected(tmp_path: Path) -> None:
    paths = package(
        tmp_path,
        serve__a="def f():\n    from forge_ray.serve import b\n",
        serve__b="from forge_ray.serve.c import C\n",
        serve__c="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from forge_ray.serve.a import A\n",
        serve__d="from forge_ray.serve.a import A\n",
    )
    assert circles(paths) == [["serve.a", "serve.b", "serve.c"]]


def test_unknown_package_and_long_module_are_detected(tmp_path: Path) -> None:
    paths = package(tmp_path, __init__="", helpers="", data__flat="", utils__x="", store__long="x = 1\n" * (MOST_LINES + 1))
    assert unknown(paths, tmp_path) == {"helpers", "data.flat", "utils"}
    assert long(paths) == {"store.long": MOST_LINES + 1}


# ---------------------------------------------------------------- weight

BLOCKED = """
import importlib
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
for module in {modules!r}:
    importlib.import_module(module)
"""

LOADED = """
import sys
import {module}
print(*sorted({{name.partition(".")[0] for name in sys.modules}} & set({heavy!r})))
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


# Every module of these imports heavy packages inside functions alone; of serve/, the gateway.
LIGHT = (
    *("errors", "file_names", "records", "progress", "client", "config", "store", "machine", "models", "data", "evaluate"),
    *("doctor", "pipeline", "governance", "cli", "serve.gateway"),
)


@pytest.mark.parametrize("room", LIGHT)
def test_package_imports_without_heavy_dependencies(room: str) -> None:
    inside = [f"forge_ray.{name}" for name in MODULES if f"{name}.".startswith(f"{room}.") and not name.endswith("__main__")]
    assert inside
    result = python(BLOCKED.format(heavy=HEAVY, modules=inside))
    assert result.returncode == 0, result.stderr


def test_cli_loads_no_heavy_dependencies() -> None:
    """What `forge --help` waits for: these imports take seconds."""
    result = python(LOADED.format(heavy=HEAVY, module="forge_ray.cli.main"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


# ---------------------------------------------------------------- names


def types() -> dict[str, list[str]]:
    """Public class → the modules that define one of that name."""
    modules_by_type: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                modules_by_type.setdefault(node.name, []).append(name)
    return modules_by_type


def test_type_names_are_unique() -> None:
    assert {name: modules for name, modules in types().items() if len(modules) > 1} == {}
