"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """An empty catalogue of a store of its own."""
    with Catalog.open(Store(str(tmp_path / "store"))) as catalog:
        yield catalog
