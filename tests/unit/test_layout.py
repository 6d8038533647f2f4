"""Names of modules and files that stand in texts, where no import would fail: they must be there."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "forge_ray"
DOTTED = re.compile(r"\bforge_ray((?:\.[A-Za-z_]\w*)+)(?::(\w+))?")
FILES = re.compile(r"(?<![\w/.-])((?:forge_ray|tests|jobs|benchmarks|cluster|docs)/[\w./-]*\w\.(?:py|sh|yaml|md))\b")
LOGGERS = {"access"}  # `forge_ray.access` is a logger
MADE_UP = {"tests/unit/test_layering.py", "tests/unit/test_layout.py"}  # which have names of modules that are not there
IN_A_WHEEL = "forge_ray/files/"
LINK = re.compile(r"\]\(([^)\s]+)\)")
TEXTS = (".py", ".md", ".toml", ".yaml", ".sh", "Makefile", "Dockerfile")


def texts() -> Iterator[tuple[str, str]]:
    folders = [PACKAGE, *(ROOT / name for name in ("tests", "jobs", "benchmarks", "cluster", "docs"))]
    for path in [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]:
        if path.is_file() and path.name.endswith(TEXTS) and path.name != "CHANGELOG.md":
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


@cache
def names_of(path: Path) -> set[str]:
    """What a module binds at its top."""
    names: set[str] = set()
    nodes: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    for node in nodes:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            nodes += ast.iter_child_nodes(node)
    return names


def is_there(parts: list[str]) -> bool:
    """A module or package below forge_ray, with at most names of it behind."""
    folder = PACKAGE
    for number, part in enumerate(parts):
        if (folder / part).is_dir():
            folder = folder / part
            continue
        if (folder / f"{part}.py").is_file():
            return len(parts) == number + 1 or parts[number + 1] in names_of(folder / f"{part}.py")
        return part in names_of(folder / "__init__.py") or part.startswith("__")
    return True


def missing(text: str) -> list[str]:
    names = []
    for match in DOTTED.finditer(text):
        parts = [*match[1].strip(".").split("."), *filter(None, [match[2]])]
        if parts[0] not in LOGGERS and not is_there(parts):
            names.append(match[0])
    return names


def test_dotted_names_exist() -> None:
    assert {name: bad for name, text in texts() if name not in MADE_UP and (bad := missing(text))} == {}


def test_missing_dotted_name_is_detected() -> None:
    assert is_there(["serve", "deploy", "app_from_args"])
    assert missing("import_path: forge_ray.serve.deploy:app_from_args; forge_ray.cli, forge_ray.store.files.Store") == []
    stale_names = ["forge_ray.serve.deploy:app_of_arguments", "forge_ray.fenced", "forge_ray.store.Store"]
    assert missing(f"import_path: {stale_names[0]}, -m {stale_names[1]}, {stale_names[2]}()") == stale_names


def test_named_files_exist() -> None:
    missing_paths = {
        name: [path for path in FILES.findall(text) if not path.startswith(IN_A_WHEEL) and not (ROOT / path).exists()]
        for name, text in texts()
    }
    assert {name: bad for name, bad in missing_paths.items() if bad} == {}


def anchors(page: str) -> set[str]:
    """What a heading of a page is linked by: lower case, words and hyphens."""
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in LINK.findall(re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def test_relative_links_resolve() -> None:
    pages = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "cluster/README.md", "jobs/data/README.md")]
    pages += sorted((ROOT / "docs").rglob("*.md"))
    broken = {page.relative_to(ROOT).as_posix(): broken_links(page, page.read_text(encoding="utf-8")) for page in pages}
    assert {name: links for name, links in broken.items() if links} == {}
    assert len(pages) > 25


def test_broken_link_is_detected() -> None:
    good = "[a](docs/benchmarks.md#the-quick-start) [b](#forge_ray) [c](https://example.com/x)"
    bad = "[a](docs/benchmarks.md#nowhere) [b](gone.md)"
    assert broken_links(ROOT / "README.md", f"# forge_ray\n{good} {bad}") == ["docs/benchmarks.md#nowhere", "gone.md"]


def test_pytest_collects_every_test_folder(pytestconfig: pytest.Config) -> None:
    """Its own list of folders to pass over has `build`."""
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    passed_over = pytestconfig.getini("norecursedirs")
    assert [name for name in sorted(folders) if any(fnmatch.fnmatch(name, pattern) for pattern in passed_over)] == []


def test_gitignore_excludes_no_package_file() -> None:
    """`ray job submit` leaves out what .gitignore names: a package `build/` would be gone."""
    inside = subprocess.run(["git", "rev-parse", "--is-inside-work-tree"], cwd=ROOT, capture_output=True, check=False)
    if inside.returncode:
        pytest.skip("no checkout")
    files = [path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")]
    command = ["git", "check-ignore", "--no-index", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""
