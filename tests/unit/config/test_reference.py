"""The page of settings is what the fields say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from forge_ray.config.data import DataConfig
from forge_ray.config.reference import reference
from forge_ray.config.release import AliasRoute, EngineConfig
from forge_ray.config.run import RunConfig

pytestmark = pytest.mark.unit


def test_the_reference_is_up_to_date() -> None:
    page = Path(__file__).parents[3] / "docs" / "reference" / "settings.md"
    command = "python -m forge_ray.config.reference > docs/reference/settings.md"
    assert page.read_text(encoding="utf-8") == reference(), command


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
