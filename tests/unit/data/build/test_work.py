"""The work area of dataset builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray.data.build import work
from forge_ray.machine.cluster import open_store
from forge_ray.store import paths

pytestmark = pytest.mark.unit


def test_clean_keeps_a_running_reproduction(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    work.write_plan(store, "jobs", {"of": "a build"})
    reproduction = paths.work("reproduce", "0123", "rows.parquet")
    store.write(reproduction, b"rows")
    assert work.clean(store) > 0
    assert store.list(paths.work("data"), recursive=True) == []
    assert store.read(reproduction) == b"rows"
