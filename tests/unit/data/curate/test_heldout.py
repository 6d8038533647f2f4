"""Test records of earlier cycles stay out of later training, whatever the shares of the splits."""

from __future__ import annotations

import fabricated
import numpy as np
import pytest
from fabricated import dataset, record_of

from forge_ray.config.base import parse
from forge_ray.config.curate import HeldOut
from forge_ray.config.data import DataConfig
from forge_ray.data.curate.heldout import index_of, is_held_out
from forge_ray.data.curate.rules import compile_rule
from forge_ray.data.dataset.version import SPLITS, records, split_of
from forge_ray.errors import ConfigError
from forge_ray.records import ModelVersion
from forge_ray.store.catalog import Catalog
from forge_ray.train.start import with_held_out

pytestmark = pytest.mark.unit
RECORDS = [record_of(number) for number in range(200)]


def config_of(test: float, *rules: dict[str, object]) -> DataConfig:
    splits = {"test": test, "validation": 0.1}
    return parse(DataConfig, {"sources": [{"path": "rows.jsonl"}], "splits": splits, "curate": list(rules)})


def ids(catalog: Catalog, name: str, test: float) -> tuple[str, set[str]]:
    """A dataset version, and its test records."""
    manifest = dataset(catalog, RECORDS, data={"splits": {"test": test, "validation": 0.1}}, name=name)
    catalog.store.write(f"datasets/{manifest.id}/MANIFEST.json", b"{}")
    tables = list(records(catalog.store, manifest, "test", ["record"]))
    return manifest.id, {one for table in tables for one in table.column("record").to_pylist()}


@pytest.mark.parametrize("now", [0.0, 0.1, 0.4, 0.6])
def test_records_of_an_earlier_test_split_are_dropped_unless_they_are_tested_again(catalog: Catalog, now: float) -> None:
    """Against the definition: a record of that split that these shares train or validate on."""
    name, tested = ids(catalog, "before", 0.4)
    assert 50 < len(tested) < 110
    splits = config_of(now).splits
    check = compile_rule(HeldOut(rule="held_out", against=(name,)), index_of((name,), catalog.store), splits)
    dropped = {record.id for record in RECORDS if check(record).record is None}
    moved = {one for one in tested if SPLITS[split_of(bytes.fromhex(one.removeprefix("rec_")), splits)] != "test"}
    assert dropped == moved
    assert bool(moved) == (now < 0.4)
    assert {check(record).reason for record in RECORDS if record.id in dropped} <= {"a test row of an earlier cycle"}


def test_rows_that_are_gone_are_said(catalog: Catalog, capsys: pytest.CaptureFixture[str]) -> None:
    name, _ = ids(catalog, "before", 0.4)
    catalog.store.delete(f"datasets/{name}/MANIFEST.json")
    assert len(index_of((name,), catalog.store)) == 0
    assert f"{name}: its rows are gone, and its test rows are not held out" in capsys.readouterr().err
    assert not is_held_out(RECORDS[0].id, np.zeros(0, np.uint64), config_of(0.1).splits)


def test_only_dataset_versions_are_held_out() -> None:
    with pytest.raises(ConfigError, match="against"):
        config_of(0.1, {"rule": "held_out", "against": ["eval.jsonl"]})


def test_earlier_cycles_are_held_out_where_the_share_of_the_test_split_fell(catalog: Catalog) -> None:
    """Through `continue` and `merge`: base ← one ← two (continue) ← merged ← three."""
    base = fabricated.version(catalog, "base")
    sets = [ids(catalog, name, share)[0] for name, share in (("one", 0.4), ("two", 0.2), ("three", 0.3))]
    one = fabricated.version(catalog, "1", fabricated.run(catalog, "1", sets[0], base.id).id, base.id, weights="adapter")
    two_run = fabricated.run(catalog, "2", sets[1], base.id, initial_adapter=one.id, initial_digest=one.files_digest)
    two = fabricated.version(catalog, "2", two_run.id, base.id, weights="adapter")
    merged = fabricated.version(catalog, "merged", "", two.id, status="merged", source="2 merged into base")
    three_run = fabricated.run(catalog, "3", sets[2], merged.id)
    three = fabricated.version(catalog, "3", three_run.id, merged.id)

    def against(version: ModelVersion, share: float, *rules: dict[str, object]) -> list[tuple[str, ...]]:
        rules_now = with_held_out(catalog, version, config_of(share, *rules)).curate
        return [rule.against for rule in rules_now if isinstance(rule, HeldOut)]

    assert against(base, 0.0) == []
    assert against(three, 0.4) == []
    assert against(three, 0.3) == [(sets[0],)]
    assert against(three, 0.25) == [(sets[2], sets[0])]
    assert against(three, 0.1) == [(sets[2], sets[1], sets[0])]
    assert against(two, 0.1) == [(sets[1], sets[0])]
    stated = {"rule": "held_out", "against": [sets[0]]}
    assert against(three, 0.25, stated) == [(sets[0],), (sets[2],)]
    unchanged = config_of(0.4)
    assert with_held_out(catalog, three, unchanged) is unchanged
