"""Usage in the store: lines that replicas write, and their sums."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from forge_ray.cli.main import cli
from forge_ray.errors import ConfigError
from forge_ray.serve import keys
from forge_ray.serve import ledger as ledger_module
from forge_ray.serve.ledger import Ledger, Used, lines, usage
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def used(key: str = "fk_a", model: str = "support@prod", **more: Any) -> Used:
    values = {"request_id": "r", "key": key, "model": model, "model_version": "mv_1", "prompt_tokens": 10}
    return Used(**{**values, "completion_tokens": 5, "status": 200, "ms": 3, **more})


class Clock:
    def __init__(self) -> None:
        self.at = "2027-03-01T23:59:59.000+00:00"

    def __call__(self) -> str:
        return self.at


def slow(store: Store, replica: str, clock: Clock) -> Ledger:
    """A ledger whose thread never comes to write: the test flushes."""
    return Ledger(store, replica, clock, flush_s=1e6)


def test_lines_are_grouped_by_day_and_replica(store: Store) -> None:
    clock = Clock()
    first, second = slow(store, "r0", clock), slow(store, "r1", clock)
    first.add(used())
    first.flush()
    first.add(used())
    second.add(used())
    clock.at = "2027-03-02T00:00:00.000+00:00"
    first.add(used())
    for ledger in (first, second):
        ledger.close()
        ledger.close()
    assert store.list("usage", recursive=True) == [
        "usage/2027-03-01/r0-0.jsonl",
        "usage/2027-03-01/r1-0.jsonl",
        "usage/2027-03-02/r0-0.jsonl",
    ]
    assert [line.at[:10] for line in lines(store)] == ["2027-03-01"] * 3 + ["2027-03-02"]
    assert len(list(lines(store, "2027-03-02"))) == 1


def test_separators_in_a_name_end_no_line(store: Store) -> None:
    ledger = slow(store, "r0", Clock())
    ledger.add(used(model="support\u2028de\x85"))
    ledger.close()
    assert [line.model for line in lines(store)] == ["support\u2028de\x85"]


def test_full_segments_are_closed_and_earlier_ones_never_overwritten(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "SEGMENT_BYTES", 500)
    for _ in range(2):  # the second has the first one's name
        ledger = slow(store, "r0", Clock())
        for _ in range(6):
            ledger.add(used())
            ledger.flush()
        ledger.close()
    assert len(list(lines(store))) == 12
    assert len(store.list("usage", recursive=True)) == 4


def test_unreachable_store_loses_no_lines(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    ledger = slow(store, "r0", clock)
    ledger.add(used())
    clock.at = "2027-03-02T00:00:00.000+00:00"
    ledger.add(used())
    real, calls = Store.write, []

    def away(self: Store, path: str, data: bytes) -> None:
        calls.append(path)
        if len(calls) > 1:
            raise OSError("away")
        real(self, path, data)

    monkeypatch.setattr(Store, "write", away)
    with pytest.raises(OSError, match="away"):
        ledger.flush()
    monkeypatch.undo()
    ledger.add(used())
    ledger.close()
    assert [line.at[:10] for line in lines(store)] == ["2027-03-01", "2027-03-02", "2027-03-02"]


def test_lines_are_flushed_periodically(store: Store) -> None:
    ledger = Ledger(store, "r0", flush_s=0.02)
    ledger.add(used())
    deadline = time.monotonic() + 20
    while not list(lines(store)) and time.monotonic() < deadline:
        time.sleep(0.02)
    (line,) = lines(store)
    assert line == used(at=line.at)
    ledger.close()


def test_usage_sums(store: Store) -> None:
    clock = Clock()
    ledger = slow(store, "r0", clock)
    ledger.add(used("fk_a"))
    ledger.add(used("fk_b", status=499, completion_tokens=2, model_version="mv_2"))
    clock.at = "2027-03-02T00:00:00.000+00:00"
    ledger.add(used("fk_b", model="base", status=503, completion_tokens=0, prompt_tokens=40))
    ledger.close()
    assert usage(store) == [
        {"key": "fk_b", "requests": 2, "prompt_tokens": 50, "completion_tokens": 2, "cancelled": 1, "failed": 1},
        {"key": "fk_a", "requests": 1, "prompt_tokens": 10, "completion_tokens": 5, "cancelled": 0, "failed": 0},
    ]
    assert [(row["model"], row["prompt_tokens"]) for row in usage(store, "model")] == [("base", 40), ("support@prod", 20)]
    assert [(row["version"], row["requests"]) for row in usage(store, "version")] == [("mv_1", 2), ("mv_2", 1)]
    assert [(row["day"], row["requests"]) for row in usage(store, "day")] == [("2027-03-01", 2), ("2027-03-02", 1)]
    assert [row["key"] for row in usage(store, "key", "2027-03-02")] == ["fk_b"]
    with pytest.raises(ConfigError, match="is not a date"):
        usage(store, "key", "yesterday")


def test_usage_command(store: Store) -> None:
    with Catalog.open(store) as catalog:
        key, _ = keys.create(catalog, "app", models=("*",))
    ledger = slow(store, "r0", Clock())
    ledger.add(used(key.id))
    ledger.add(used("", prompt_tokens=1))
    ledger.close()
    result = CliRunner().invoke(cli, ["usage", "--store", store.uri, "--json"])
    rows = json.loads(result.stdout)["results"]
    assert [(row["key"], row["name"], row["prompt_tokens"]) for row in rows] == [(key.id, "app", 10), ("", "", 1)]
    table = CliRunner().invoke(cli, ["usage", "--store", store.uri]).stdout
    assert "app" in table
    assert "(no key)" in table
    by_day = CliRunner().invoke(cli, ["usage", "--by", "day", "--since", "2027-03-02", "--store", store.uri, "--json"])
    assert json.loads(by_day.stdout)["results"] == []
