"""A name says what it holds, never how it was obtained; in the package, its jobs and its build."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
PLACES = ("forge_ray", "jobs", "requirements", "cluster", "benchmarks", "tests")
BANNED = {"found", "told", "said", "given", "known", "wanted", "made", "gone", "mine", "shown"}


def names_of(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of every variable, parameter and caught error, wherever it is bound; fields of classes are none."""
    tree = ast.parse(source)
    fields = {
        id(target)
        for body in (node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
        for statement in body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in fields:
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.lineno, node.name


def test_no_name_says_how_its_value_was_obtained() -> None:
    files = [path for place in PLACES for path in sorted((ROOT / place).rglob("*.py"))]
    assert len(files) > 400
    offenders = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files
        for line, name in names_of(path.read_text(encoding="utf-8"))
        if name.strip("_") in BANNED
    ]
    assert not offenders, f"name it for what it holds (report, manifest, dataset_ids): {offenders}"


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "found: int = 1",
        "for told in (): pass",
        "[0 for said in ()]",
        "with open('x') as given: pass",
        "(known := 1)",
        "def f(wanted): pass",
        "lambda *made: 0",
        "try: pass\nexcept OSError as gone: pass",
        "a, (mine, b) = 1, (2, 3)",
        "match 1:\n    case shown: pass",
        "_found = 1",
    ],
)
def test_every_way_to_bind_a_name_is_seen(source: str) -> None:
    assert {name.strip("_") for _, name in names_of(source)} & BANNED


def test_field_of_a_class_is_not_a_variable() -> None:
    assert not [name for _, name in names_of("class Step:\n    found: int\n    made = 1\n") if name in BANNED]
