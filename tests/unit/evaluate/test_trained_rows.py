"""Rows that a model was trained on, among those that it is scored on without a run file."""

from __future__ import annotations

import pytest
from fabricated import dataset, record_of, report, run, version

from forge_ray.data.dataset.version import read_records
from forge_ray.evaluate.trained_rows import trained_rows
from forge_ray.store.catalog import Catalog

pytestmark = pytest.mark.unit


def test_training_rows_among_the_evaluated_ones_are_counted_for_every_later_cycle(catalog: Catalog) -> None:
    rows = [record_of(number) for number in range(40)]
    trained = dataset(catalog, rows, name="trained", data={"splits": {"validation": 0.0, "test": 0.3}})
    scored = dataset(catalog, rows[:20], name="scored", data={"splits": {"validation": 0.0, "test": 1.0}})
    other = dataset(catalog, [record_of(number) for number in range(100, 110)], name="other")
    base = version(catalog, "base")
    first = version(catalog, "first", run(catalog, "one", trained.id, base.id).id, base.id)
    second = version(catalog, "second", run(catalog, "two", other.id, first.id).id, first.id)
    ids = {record.id for record in rows[:20]}
    count = sum(row["record"] in ids for row in read_records(catalog.store, trained, "train"))
    assert 0 < count < 20
    of_first, of_second = (trained_rows(catalog, one.id, report(catalog, one.id, scored.id)) for one in (first, second))
    assert of_first == {trained.id: count}
    assert of_second == {trained.id: count}
    assert trained_rows(catalog, first.run, report(catalog, first.id, scored.id)) == {trained.id: count}
    assert trained_rows(catalog, base.id, report(catalog, base.id, scored.id)) == {}
    assert trained_rows(catalog, first.id, report(catalog, first.id, trained.id)) == {}
