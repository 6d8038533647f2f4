"""The import rule: a module imports only lower levels or its own package, and light modules stay light."""

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

# Bottom first. A level has several rows where one of its modules builds on another.
ROWS: tuple[set[str], ...] = (
    {"errors", "offline", "quiet", "shipped", "supported"},  # L0
    {"records"},
    {"config"},
    {"store", "hardware", "progress", "architecture", "dequantise", "aliases", "haproxy"},  # L1
    {"tail", "signing", "model_files", "fenced", "environment"},
    {"audit_log", "authority"},
    {"signatures"},
    {"catalog"},
    {"data", "inference", "client", "import_model", "cluster", "traffic", "keys", "gateway", "verify"},  # L2
    {"train", "safety", "gate", "lineage", "signers"},  # L3
    {"evaluate", "impact", "lineage_page"},
    {"trace"},
    {"recipes", "serve", "control", "preflight", "candidates", "follow", "doctor", "leak", "compare_runs", "papers"},  # L4
    {"difference"},
    {"reports"},
    {"pipeline", "erasure"},  # L5
    {"job", "quickstart", "submit", "reproduce", "purge", "certificate"},
    {"erase"},
    {"show"},
    {"verbs"},  # L6
    {"cli_data", "cli_audit", "cli_runs", "cli_serve", "cli_alias", "cli_keys", "cli_gateway", "cli_doctor", "cli_erase"},
    {"cli_reproduce", "cli_trace"},
    {"cli_trust", "cli_papers"},
    {"cli"},
    {"__main__"},
)
ROW = {name: row for row, names in enumerate(ROWS) for name in names}

# Upward imports that are meant: (module, package) → the cause.
ALLOWED: dict[tuple[str, str], str] = {}

HEAVY = ("torch", "ray", "deepspeed", "transformers", "peft", "accelerate", "pandas", "matplotlib")


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:  # the root's __init__ imports nothing, see below
            yield name, path


def forge_imports(path: Path, name: str) -> Iterator[tuple[str, int]]:
    """Each module of forge_ray that the file imports, without the root's name, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are absolute"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in found:
            root, _, rest = module.partition(".")
            if root == "forge_ray" and rest and rest != "__version__":
                yield rest, node.lineno


def breaches(name: str, path: Path) -> Iterator[str]:
    top = name.partition(".")[0]
    for imported, line in forge_imports(path, name):
        other = imported.partition(".")[0]
        if other == top or (name, other) in ALLOWED:
            continue
        if other not in ROW:
            yield f"{name}:{line} imports forge_ray.{other}, which has no level here"
        elif ROW[other] >= ROW[top]:
            yield f"{name}:{line} imports {imported}, which is not below it"


def test_every_module_has_a_level() -> None:
    assert {name.partition(".")[0] for name, _ in modules()} <= set(ROW)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_only_lower_levels_or_its_own_package(name: str, path: Path) -> None:
    assert not list(breaches(name, path))


def test_allowed_exceptions_are_used() -> None:
    paths = dict(modules())
    for name, other in ALLOWED:
        assert name in paths
        assert other in {imported.partition(".")[0] for imported, _ in forge_imports(paths[name], name)}


def test_a_breach_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "x.py"
    source.write_text("def f():\n    from forge_ray import cli\n    import forge_ray.nowhere\n")
    assert list(breaches("data.x", source)) == [
        "data.x:2 imports cli, which is not below it",
        "data.x:3 imports forge_ray.nowhere, which has no level here",
    ]


def test_the_root_imports_nothing() -> None:
    assert not list(forge_imports(PACKAGE / "__init__.py", "forge_ray"))


# ---------------------------------------------------------------- weight

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
import {module}
"""

LOADED = """
import sys
import {module}
print(*sorted({{name.partition(".")[0] for name in sys.modules}} & set({heavy!r})))
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


LIGHT = [
    "forge_ray.errors",
    "forge_ray.records",
    "forge_ray.config.run",
    "forge_ray.store",
    "forge_ray.catalog",
    "forge_ray.client",
    "forge_ray.gateway",
    "forge_ray.pipeline",
    "forge_ray.job",
    "forge_ray.cli",
]


@pytest.mark.parametrize("module", LIGHT)
def test_imports_with_heavy_packages_blocked(module: str) -> None:
    result = python(BLOCKED.format(heavy=HEAVY, module=module))
    assert result.returncode == 0, result.stderr


def test_the_command_line_loads_nothing_heavy() -> None:
    """What `forge --help` waits for: these imports take seconds."""
    result = python(LOADED.format(heavy=HEAVY, module="forge_ray.cli"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
