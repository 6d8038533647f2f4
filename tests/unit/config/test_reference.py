"""The reference page of settings matches the fields."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from forge_ray.config.base import Config, parse
from forge_ray.config.data import DataConfig
from forge_ray.config.reference import EXAMPLES, reference, sections
from forge_ray.config.release import AliasRoute, DeployConfig, EngineConfig
from forge_ray.config.run import RunConfig

pytestmark = pytest.mark.unit


def test_the_reference_is_up_to_date() -> None:
    page = Path(__file__).parents[3] / "docs" / "reference" / "settings.md"
    command = "python -m forge_ray.config.reference > docs/reference/settings.md"
    assert page.read_text(encoding="utf-8") == reference(), command


def without_meaning(model: type[Config]) -> list[str]:
    """Paths of the sections and settings that the page would leave unexplained, or explain with a fragment."""
    meanings = {}
    for section in sections(model):
        name = f"{section.path}:{section.rule}" if section.rule else section.path
        meanings[name] = section.meaning
        meanings |= {f"{name}.{setting.key}": setting.meaning for setting in section.settings}
    return [name for name, meaning in meanings.items() if not re.match(r"[A-Z`].*\s", meaning, re.S)]


def test_every_setting_has_a_meaning() -> None:
    assert without_meaning(RunConfig) == []
    assert without_meaning(DeployConfig) == []


def test_a_setting_without_a_meaning_is_noticed() -> None:
    class Inner(Config):
        """A section of a test."""

        silent: int = 3
        empty: int = Field(3, description="")
        fragment: int = Field(3, description="of that task")
        explained: int = Field(3, description="Seconds between two attempts")

    class Outer(Config):
        inner: Inner = Inner()
        items: tuple[Inner, ...] = ()
        by_name: dict[str, Inner] = {}
        absent: Inner | None = None

    paths = ("inner", "items", "by_name", "absent")
    unexplained = [f"{path}.{key}" for path in paths for key in ("silent", "empty", "fragment")]
    assert without_meaning(Outer) == ["", *unexplained]


def test_the_page_has_every_class_of_settings() -> None:
    """Compare with pydantic's schema, which is independent of the page."""
    keys = set()
    for name, schema in RunConfig.model_json_schema()["$defs"].items():
        keys |= {
            key for key, value in schema.get("properties", {}).items() if "$ref" not in str(value) or key == "num_workers"
        }
        assert schema.get("description") or "enum" in schema, name
    page_keys = {setting.key for section in sections(RunConfig) for setting in section.settings}
    assert keys - {"rule"} <= page_keys


def test_the_examples_are_valid() -> None:
    assert set(EXAMPLES) == {section.key for section in sections(RunConfig)}
    smallest = {"name": "n", "base_model": "m", "data": {"sources": [{"path": "rows.jsonl"}]}, "release": {"alias": "a"}}
    for path, line in EXAMPLES.items():
        assert "\n" not in line
        example = yaml.safe_load(line)
        config = parse(RunConfig, _merged(smallest, example), where=line)
        node: Any = example
        for key in filter(
            None, path.partition(":")[0].split(".")
        ):  # the example shows its own section, with at least one of its keys
            while not isinstance(node, dict) or (key not in node and len(node) == 1):
                node = node[0] if isinstance(node, list) else next(iter(node.values()))
            node = node[key]
        assert node, (path, line)
        assert config.name
    (deployment,) = re.findall(r"## Deployment file.*Example: `(.*)`", reference(), re.S)
    parse(DeployConfig, yaml.safe_load(deployment))


def test_the_defaults_are_written_as_in_yaml() -> None:
    page = {(section.path, setting.key): setting.default for section in sections(RunConfig) for setting in section.settings}
    assert page["data", "max_line_bytes"] == "`16777216`"
    assert page["data.sources", "name"] == '`""`'
    assert page["train", "compile"] == "`false`"
    assert page["eval", "labels"] == "`null`"
    assert page["data.curate", "allow"] == '`["true", "yes", "1"]`'  # bare, they would be two booleans and a number


def _merged(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both: Iterator[str] = (key for key in other if isinstance(base.get(key), dict) and isinstance(other[key], dict))
    return base | other | {key: _merged(base[key], other[key]) for key in both}


def test_the_run_files_of_the_pages_are_valid() -> None:
    docs = Path(__file__).parents[3] / "docs"
    blocks = [
        yaml.safe_load(block)
        for page in docs.rglob("*.md")
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S)
    ]
    for block in blocks:
        if set(block) == {"data"}:
            DataConfig.model_validate({"sources": [{"path": "rows.jsonl"}], **block["data"]})
        elif set(block) == {"engine"}:
            EngineConfig.model_validate(block["engine"])
        elif "versions" in block:
            AliasRoute.model_validate(block)
        elif "scrape_configs" not in block:  # Prometheus's own
            RunConfig.model_validate(block)
    assert len(blocks) >= 2
