"""Incidents: written once, read as decisions; and the page that a failed run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge_ray.store.files import Store
from forge_ray.train import attempts, diagnosis, incidents

pytestmark = pytest.mark.unit


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def failure(store: Store, rows: list[int], step: int = 4, error: str = "IndexError: 9", rank: int = 0) -> Any:
    return incidents.write(store, "run_a", "failure", step, rank=rank, rows=rows, records=[], error=error)


def test_incident_is_recorded_once(store: Store) -> None:
    one = incidents.write(store, "run_a", "not_finite", 3, rows=[1, 2])
    assert incidents.write(store, "run_a", "not_finite", 3, rows=[1, 2]) == one
    other = incidents.write(store, "run_a", "not_finite", 4, rows=[1, 2])
    assert [one["number"], other["number"]] == [1, 2]
    assert incidents.read(store, "run_a") == [one, other]


def test_skipped_steps_and_rows_follow_from_incidents(store: Store) -> None:
    assert incidents.left_out([]).digest(99) == ""
    incidents.write(store, "run_a", "spike", 5, last_step=7)
    incidents.write(store, "run_a", "quarantine", 9, rows=[31])
    failure(store, [1, 2], step=11)
    exclusions = incidents.left_out(incidents.read(store, "run_a"))
    assert (exclusions.steps, exclusions.rows, exclusions.careful) == ({5, 6, 7}, {31: 9}, {11})
    digests = [exclusions.digest(step) for step in (4, 5, 7, 8, 9, 99)]
    assert digests[0] == ""
    assert len(set(digests)) == 4  # before, after step 5, after step 7 and with it 8, from step 9 on
    assert digests[2] == digests[3]
    assert digests[4] == digests[5]


def test_row_is_quarantined_when_retried_alone_with_same_error(store: Store) -> None:
    def chosen() -> list[list[int]]:
        return [item["rows"] for item in incidents.to_quarantine(incidents.read(store, "run_a"))]

    failure(store, [1, 2])
    assert chosen() == []
    failure(store, [3], step=5)  # another step
    failure(store, [2], error="MemoryError: 1")  # another error
    assert chosen() == []
    failure(store, [2])
    assert chosen() == [[2]]
    incidents.write(store, "run_a", "quarantine", 4, rows=[2])
    assert chosen() == []


def test_single_row_micro_batch_is_quarantined_after_second_failure(store: Store) -> None:
    failure(store, [7])  # micro_batch_size=1
    assert incidents.to_quarantine(incidents.read(store, "run_a")) == []
    failure(store, [7])
    assert [item["rows"] for item in incidents.to_quarantine(incidents.read(store, "run_a"))] == [[7]]


def test_overview_describes_every_incident_kind_and_names_records(store: Store) -> None:
    attempts.start(store, "run_a", 2, 0)
    for kind in incidents.KINDS:
        incidents.write(store, "run_a", kind, 3, rows=[1], records=[["rec_1"]] if kind == "not_finite" else [])
    text = diagnosis.overview(diagnosis.facts(store, "run_a"))
    assert "not finished, step 0 of ?" in text
    assert "2 workers, from step 0" in text
    for words in incidents.KINDS.values():
        assert words in text
    assert "records rec_1" in text
