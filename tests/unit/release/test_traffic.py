"""How an alias moves: one event a move, its history kept, nothing that clients must not get."""

from __future__ import annotations

import pytest

from forge_ray.config.base import parse
from forge_ray.config.release import AliasRoute, Guard
from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.records import Event, FileEntry, ModelVersion, files_digest
from forge_ray.release import promotion, traffic
from forge_ray.serve.watcher import StoreWatcher
from forge_ray.store.catalog import Catalog

pytestmark = pytest.mark.unit


def add(catalog: Catalog, name: str, status: str = "accepted", base_model: str = "") -> str:
    files = (FileEntry(path="w.safetensors", size=1, sha256=name),)
    version = ModelVersion(
        name=name,
        status=status,
        weights="full",
        files=files,
        files_digest=files_digest(files),
        licence="mit",  # type: ignore[arg-type]
        base_model=base_model,
    )
    return catalog.put(version.sealed()).id


def test_a_canary_is_promoted_or_rolled_back(catalog: Catalog) -> None:
    two, one = sorted([add(catalog, "one"), add(catalog, "two")])  # the stable one is not the first by name
    promotion.promote(catalog, one, "support@prod")
    route = traffic.canary(catalog, "support@prod", two, 10, Guard(min_requests=5), "new rows")
    assert route.versions == {one: 90, two: 10}
    assert catalog.aliases() == {"support@prod": one}
    assert traffic.rollback(catalog, "support@prod").versions == {one: 1}
    traffic.canary(catalog, "support@prod", two, 10, Guard())
    assert traffic.promote(catalog, "support@prod").versions == {two: 1}
    assert catalog.aliases() == {"support@prod": two}
    moves = traffic.history(catalog, "support@prod")
    assert [move["why"] for move in moves] == ["", "new rows", "rolled back", "", ""]
    assert traffic.in_words(route) == f"{one} 0.9, {two} 0.1"


def test_promote_keeps_rules_shadow_and_fallback(catalog: Catalog) -> None:
    one, two = add(catalog, "one"), add(catalog, "two")
    promotion.set_route(
        catalog, "a", parse(AliasRoute, {"versions": {one: 95, two: 5}, "fallback": "base", "shadow": [two]})
    )
    promotion.promote(catalog, two, "a")
    assert catalog.routes()["a"] == parse(AliasRoute, {"versions": {two: 1}, "fallback": "base", "shadow": [two]})
    moves = len(traffic.history(catalog, "a"))
    promotion.promote(catalog, two, "a")
    assert len(traffic.history(catalog, "a")) == moves


def test_rollback_restores_an_archived_alias(catalog: Catalog) -> None:
    one = add(catalog, "one")
    promotion.promote(catalog, one, "a")
    promotion.set_route(catalog, "a", None, "retired")
    assert catalog.aliases() == {}
    with pytest.raises(NotFound):
        catalog.model("a")
    with pytest.raises(NotFound, match="no alias"):
        promotion.set_route(catalog, "a", None)
    assert traffic.rollback(catalog, "a").stable == one


@pytest.mark.parametrize("status", ["rejected", "candidate", "merged"])
def test_layers_of_a_version_that_no_gate_accepted_pass_no_gate(catalog: Catalog, status: str) -> None:
    judged = add(catalog, "judged", status)
    half = add(catalog, "half", "imported", base_model=judged)
    quarter = add(catalog, "quarter", "imported", base_model=half)
    for version in (half, quarter):
        with pytest.raises(PolicyError, match=f"{version} was made of {judged}: {judged} "):
            promotion.promote(catalog, version, "a")
    of_accepted = add(catalog, "small", "imported", base_model=add(catalog, "good"))
    promotion.promote(catalog, of_accepted, "a")
    assert catalog.aliases() == {"a": of_accepted}


def test_versions_that_may_not_answer_are_refused(catalog: Catalog) -> None:
    one, bad, new = add(catalog, "one"), add(catalog, "bad", "rejected"), add(catalog, "new", "candidate")
    for wrong in (
        {"versions": {one: 1, bad: 1}},
        {"versions": {new: 1}},
        {"versions": {one: 1}, "rules": [{"to": bad, "user": ["x"]}]},
    ):
        with pytest.raises(PolicyError):
            promotion.set_route(catalog, "a", parse(AliasRoute, wrong))
    promotion.set_route(catalog, "a", parse(AliasRoute, {"versions": {one: 1}, "shadow": [new]}))  # nobody sees its answers
    promotion.archive(catalog, one)
    with pytest.raises(PolicyError, match="archived"):
        promotion.promote(catalog, one, "b")
    promotion.archive(catalog, one, restore=True)
    promotion.promote(catalog, one, "b")
    for name in ("base", one, "with space", "-x"):
        with pytest.raises(ConfigError):
            promotion.set_route(catalog, name, AliasRoute(versions={one: 1}))
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


def test_the_watcher_agrees_with_the_catalogue_and_reads_each_line_once(
    catalog: Catalog,
) -> None:
    one, two = add(catalog, "one"), add(catalog, "two")
    promotion.promote(catalog, one, "a")
    catalog.append(Event(kind="run", subject="run_1", data={"state": "running"}))
    seen = StoreWatcher(catalog.store)
    assert seen.refresh()
    assert seen.routes() == catalog.routes()
    assert not seen.refresh()
    promotion.promote(catalog, two, "a")
    promotion.archive(catalog, one)
    assert [line.action for line in seen.refresh()] == ["alias.set", "model.archived"]
    assert seen.routes() == catalog.routes() == {"a": AliasRoute(versions={two: 1})}
    assert seen.archived() == {one}
    version = seen.version(two)
    assert version is not None
    assert version.id == two
    assert seen.version("mv_none") is None


def test_an_event_of_the_watcher_follows_those_it_read(catalog: Catalog) -> None:
    one = add(catalog, "one")
    catalog.append(Event(at="2999-01-01T00:00:00.000+00:00", kind="alias", subject="a", data={"model_version": one}))
    seen = StoreWatcher(catalog.store)
    seen.refresh()
    seen.append(Event(kind="alias", subject="a", data={"archived": True}))
    with Catalog.open(catalog.store) as fresh:
        assert fresh.routes() == {}
