"""The page of settings is what the fields say."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray.config.reference import reference

pytestmark = pytest.mark.unit


def test_the_reference_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference.md"
    assert page.read_text(encoding="utf-8") == reference(), "python -m forge_ray.config.reference > docs/reference.md"
