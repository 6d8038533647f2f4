"""How an alias moves: one event a move, its history kept, nothing that clients must not get."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_ray.config.base import parse
from forge_ray.config.release import AliasRoute, Guard
from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.records import Event, FileEntry, ModelVersion, files_digest
from forge_ray.release import traffic
from forge_ray.serve.published import Published
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog(Store(str(tmp_path))) as catalog:
        yield catalog


def add(catalog: Catalog, name: str, status: str = "accepted") -> str:
    files = (FileEntry(path="w.safetensors", size=1, sha256=name),)
    version = ModelVersion(
        name=name,
        status=status,
        weights="full",
        files=files,
        files_digest=files_digest(files),
        licence="mit",  # type: ignore[arg-type]
    )
    return catalog.put(version.sealed()).id


def test_a_canary_is_promoted_or_rolled_back(catalog: Catalog) -> None:
    two, one = sorted([add(catalog, "one"), add(catalog, "two")])  # the stable one is not the first by name
    catalog.promote(one, "support@prod")
    found = traffic.canary(catalog, "support@prod", two, 10, Guard(min_requests=5), "new rows")
    assert found.versions == {one: 90, two: 10}
    assert catalog.aliases() == {"support@prod": one}
    assert traffic.rollback(catalog, "support@prod").versions == {one: 1}
    traffic.canary(catalog, "support@prod", two, 10, Guard())
    assert traffic.promote(catalog, "support@prod").versions == {two: 1}
    assert catalog.aliases() == {"support@prod": two}
    moves = traffic.history(catalog, "support@prod")
    assert [move["why"] for move in moves] == ["", "new rows", "rolled back", "", ""]
    assert traffic.in_words(found) == f"{one} 0.9, {two} 0.1"


def test_a_release_keeps_what_else_the_alias_says(catalog: Catalog) -> None:
    one, two = add(catalog, "one"), add(catalog, "two")
    catalog.set_route("a", parse(AliasRoute, {"versions": {one: 95, two: 5}, "fallback": "base", "shadow": [two]}))
    catalog.promote(two, "a")
    assert catalog.routes()["a"] == parse(AliasRoute, {"versions": {two: 1}, "fallback": "base", "shadow": [two]})
    moves = len(traffic.history(catalog, "a"))
    catalog.promote(two, "a")
    assert len(traffic.history(catalog, "a")) == moves


def test_an_archived_alias_is_none_until_it_is_rolled_back(catalog: Catalog) -> None:
    one = add(catalog, "one")
    catalog.promote(one, "a")
    catalog.set_route("a", None, "retired")
    assert catalog.aliases() == {}
    with pytest.raises(NotFound):
        catalog.model("a")
    with pytest.raises(NotFound, match="no alias"):
        catalog.set_route("a", None)
    assert traffic.rollback(catalog, "a").stable == one


def test_what_clients_must_not_get_is_refused(catalog: Catalog) -> None:
    one, bad, new = add(catalog, "one"), add(catalog, "bad", "rejected"), add(catalog, "new", "candidate")
    for wrong in (
        {"versions": {one: 1, bad: 1}},
        {"versions": {new: 1}},
        {"versions": {one: 1}, "rules": [{"to": bad, "user": ["x"]}]},
    ):
        with pytest.raises(PolicyError):
            catalog.set_route("a", parse(AliasRoute, wrong))
    catalog.set_route("a", parse(AliasRoute, {"versions": {one: 1}, "shadow": [new]}))  # nobody sees its answers
    catalog.archive(one)
    with pytest.raises(PolicyError, match="archived"):
        catalog.promote(one, "b")
    catalog.archive(one, restore=True)
    catalog.promote(one, "b")
    for name in ("base", one, "with space", "-x"):
        with pytest.raises(ConfigError):
            catalog.set_route(name, AliasRoute(versions={one: 1}))
    with pytest.raises(ConfigError, match="not between"):
        traffic.canary(catalog, "a", one, 100, Guard())
    with pytest.raises(ConfigError, match="stable version already"):
        traffic.canary(catalog, "a", one, 5, Guard())
    with pytest.raises(ConfigError, match="0 canaries"):
        traffic.promote(catalog, "a")
    with pytest.raises(NotFound, match="never stood"):
        traffic.rollback(catalog, "b")
    with pytest.raises(NotFound, match="aliases: a, b"):
        traffic.route(catalog, "c")


def test_a_reader_without_an_index_sees_the_same_and_reads_each_event_once(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = add(catalog, "one"), add(catalog, "two")
    catalog.promote(one, "a")
    catalog.append(Event(kind="run", subject="run_1", data={"state": "running"}))
    seen = Published(catalog.store)
    assert seen.refresh()
    assert seen.routes() == catalog.routes()
    reads: list[str] = []
    read = Store.read_json
    monkeypatch.setattr(Store, "read_json", lambda self, path: reads.append(path) or read(self, path))
    assert not seen.refresh()
    catalog.promote(two, "a")
    catalog.archive(one)
    assert seen.refresh()
    assert len(reads) == 2
    assert seen.routes() == catalog.routes() == {"a": AliasRoute(versions={two: 1})}
    assert seen.archived() == {one}
    version = seen.version(two)
    assert version is not None
    assert version.id == two
    assert seen.version("mv_none") is None


def test_a_reader_that_appends_comes_after_what_it_read(catalog: Catalog) -> None:
    one = add(catalog, "one")
    catalog.append(Event(at="2999-01-01T00:00:00.000+00:00", kind="alias", subject="a", data={"model_version": one}))
    seen = Published(catalog.store)
    seen.refresh()
    seen.append(Event(kind="alias", subject="a", data={"archived": True}))
    with Catalog(catalog.store) as fresh:
        assert fresh.routes() == {}
