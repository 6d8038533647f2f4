"""The rows that the quick start learns from: what jobs/data/README.md promises about them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.unit

DATA = Path(__file__).parents[2] / "jobs" / "data"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_debian_sections", DATA / "make_debian_sections.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "debian_sections.jsonl").read_text(encoding="utf-8").splitlines()]


def test_rows_are_short_chats(rows: list[dict[str, Any]], make: ModuleType) -> None:
    for row in rows:
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert all(list(message) == ["role", "content"] for message in row["messages"])
        system, user, assistant = (message["content"] for message in row["messages"])
        assert system == make.SYSTEM
        name, _, description = user.partition(": ")
        assert name
        assert description
        assert assistant in make.SECTIONS


def test_sections_are_balanced_and_packages_unique(rows: list[dict[str, Any]], make: ModuleType) -> None:
    sections = Counter(row["messages"][2]["content"] for row in rows)
    assert sections == dict.fromkeys(make.SECTIONS, 200)
    names = [row["messages"][1]["content"].partition(": ")[0] for row in rows]
    assert len(set(names)) == len(names) == 3000


def test_sections_have_no_near_duplicates(rows: list[dict[str, Any]], make: ModuleType) -> None:
    for section in make.SECTIONS:
        prompts = [row["messages"][1]["content"].partition(": ") for row in rows if row["messages"][2]["content"] == section]
        packages = [make.Package(name, name, section, description) for name, _, description in prompts]
        assert len(make.distinct(packages, 200)) == 200


def test_readme_describes_this_file(rows: list[dict[str, Any]]) -> None:
    data = (DATA / "debian_sections.jsonl").read_bytes()
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    assert len(data) <= 1_000_000
    assert f"{len(data):,} bytes" in readme
    assert hashlib.sha256(data).hexdigest() in readme


def stanza(name: str, section: str, description: str, source: str = "", pool: str = "pool/main") -> str:
    lines = [f"Package: {name}", f"Description: {description}", f"Section: {section}", f"Filename: {pool}/{name}.deb"]
    return "\n".join([*lines, f"Source: {source}"] if source else lines)


def test_one_package_per_source_and_no_companions(make: ModuleType) -> None:
    index = "\n\n".join(
        [
            stanza("chess", "games", "play chess against the machine"),
            stanza("chess2", "games", "play chess against a second machine", source="chess-2.0"),
            stanza("chess-data", "games", "boards and pieces of chess - data"),
            stanza("chess-old", "games", "transitional package"),
            stanza("rogue", "games", "explore a dungeon", pool="pool/non-free/m/main"),
            stanza("snake", "games", "Play Chess Against the Machine"),
            stanza("libthing", "libs", "a library"),
        ]
    )
    (row,) = make.rows(index, 10)
    assert row["messages"][1]["content"].lower().endswith(": play chess against the machine")  # of two twins, one


def test_order_is_independent_of_index(make: ModuleType) -> None:
    stanzas = [stanza(f"game{letter}", "games", f"number {letter * 3} of the games") for letter in "abcdefgh"]
    assert make.rows("\n\n".join(stanzas), 5) == make.rows("\n\n".join(reversed(stanzas)), 5)
    assert len(make.rows("\n\n".join(stanzas), 5)) == 5
