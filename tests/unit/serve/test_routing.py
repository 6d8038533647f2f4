"""Which version answers which name: tables from facts, rules before weights, bad versions that take nothing away."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.config.base import parse
from forge_ray.config.release import AliasRoute, DeployConfig
from forge_ray.errors import ConfigError
from forge_ray.records import FileEntry, ModelVersion, files_digest
from forge_ray.serve.canary import AnswerOutcome, Outcomes, judge, without_canaries
from forge_ray.serve.routing import RoutingFacts, RoutingInputs, Table, decide, sticky, table_of
from forge_ray.serve.scaling import TokensPolicy

pytestmark = pytest.mark.unit


def version(name: str, base: ModelVersion | None = None) -> ModelVersion:
    files = (FileEntry(path="w.safetensors", size=1, sha256=name),)
    return ModelVersion(
        name=name,
        status="accepted",
        weights="adapter" if base else "full",
        files=files,
        files_digest=files_digest(files),
        base_model=base.id if base else "",
        licence="mit",
    ).sealed()


BASE, OTHER = version("base"), version("other")
ONE, TWO, FAR = version("one", BASE), version("two", BASE), version("far", OTHER)
KNOWN = {item.id: item for item in (BASE, OTHER, ONE, TWO, FAR)}


def route(*versions: ModelVersion, **more: Any) -> AliasRoute:
    return parse(AliasRoute, {"versions": {item.id: 1 for item in versions}, **more})


def table(routes: dict[str, AliasRoute], broken: dict[str, str] | None = None, **more: Any) -> Table:
    before = more.pop("before", None)
    config = parse(DeployConfig, {"name": "bot", "models": ["prod"], **more})
    facts = RoutingFacts(routes, frozenset(), KNOWN.get)
    return table_of(config, facts, broken or {}, before)


def test_a_table_has_the_base_and_every_published_alias_on_it() -> None:
    served = table({"prod": route(ONE), "more": route(TWO), "far": route(FAR), "raw": route(BASE)})
    assert set(served.routes) == {"prod", "more", "raw"}
    assert set(served.versions) == {BASE.id, ONE.id, TWO.id}
    assert {item.engine for item in served.versions.values()} == {BASE.id}
    both = {"prod": route(ONE), "more": route(TWO)}
    assert set(table(both, published=False).routes) == {"prod"}
    own = {"more": {"versions": {TWO.id: 1}}}
    assert set(table(both, published=False, aliases=own).routes) == {"prod", "more"}


def test_equal_facts_give_equal_tables() -> None:
    routes = {"prod": route(ONE), "more": route(TWO)}
    assert table(routes).id == table(dict(reversed(routes.items()))).id
    assert table(routes).id != table({"prod": route(TWO), "more": route(TWO)}).id


def test_a_merged_version_has_an_engine_of_its_own() -> None:
    served = table({"prod": route(ONE)}, merged=[ONE.id])
    assert (served.versions[ONE.id].weights, served.versions[ONE.id].engine) == ("merged", ONE.id)


def test_an_alias_whose_new_version_is_broken_keeps_the_old_one() -> None:
    before = table({"prod": route(ONE)})
    after = table({"prod": route(TWO)}, {TWO.id: "torn"}, before=before)
    assert after.routes["prod"] == before.routes["prod"]
    assert after.versions.keys() == before.versions.keys()
    first = table({"prod": route(TWO)}, {TWO.id: "torn"})
    assert first.broken == {TWO.id: "torn"}  # nothing to go back to: it is said why


INPUTS = RoutingInputs(headers={}, user="", prompt_ids=(1,) * 10)


def inputs(num_prompt_tokens: int = 10, **more: Any) -> RoutingInputs:
    return replace(INPUTS, prompt_ids=(1,) * num_prompt_tokens, **more)


def test_the_first_rule_that_matches_wins() -> None:
    rules = [
        {"to": TWO.id, "header": {"X-Team": "cards"}, "prompt_tokens_below": 50},
        {"to": "base", "user": ["guest", "bot"]},
        {"to": "base", "prompt_tokens_from": 100},
        {"to": TWO.id, "classifier": ONE.id, "label": "domain"},
    ]
    ruled = route(ONE, rules=rules)
    cards = {"x-team": "cards"}
    assert decide(ruled, inputs(headers=cards, user="guest"), 0.0) == (TWO.id, "rule 1")
    assert decide(ruled, inputs(headers=cards, num_prompt_tokens=60), 0.0) == (ONE.id, "stable")
    assert decide(ruled, inputs(user="guest"), 0.0) == ("base", "rule 2")
    assert decide(ruled, inputs(num_prompt_tokens=100), 0.0) == ("base", "rule 3")
    assert decide(ruled, inputs(labels={ONE.id: ("domain", "other")}), 0.0) == (TWO.id, "rule 4")
    assert decide(ruled, inputs(labels={ONE.id: ("else",)}), 0.0) == (ONE.id, "stable")


@given(draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=1), weight=st.integers(0, 100))
def test_weights_divide_the_draws(draws: list[float], weight: int) -> None:
    weighted = AliasRoute(versions={ONE.id: 100 - weight, TWO.id: weight})
    for draw in draws:
        expected = (ONE.id, "stable") if draw < (100 - weight) / 100 else (TWO.id, "canary")
        assert decide(weighted, INPUTS, draw) == expected


def test_users_are_sticky_and_evenly_spread() -> None:
    places = [sticky("prod", f"user {number}") for number in range(1000)]
    assert places == [sticky("prod", f"user {number}") for number in range(1000)]
    assert 400 < sum(place < 0.5 for place in places) < 600
    assert sticky("prod", "a") != sticky("other", "a")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"versions": {}}, "versions"),
        ({"versions": {"a": 0}}, "weights must be shares"),
        ({"versions": {"a": 1}, "rules": [{"to": "b"}]}, "has no condition"),
        ({"versions": {"a": 1}, "rules": [{"to": "b", "classifier": "c"}]}, "`classifier` and `label`"),
    ],
)
def test_invalid_routes_are_refused(wrong: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(AliasRoute, wrong)


# ---------------------------------------------------------------- canaries


def outcomes(version: str, good: int, bad: int = 0, token_s: float = 0.01) -> list[AnswerOutcome]:
    return [AnswerOutcome("prod", version, 200, token_s)] * good + [AnswerOutcome("prod", version, 503, 0.0)] * bad


def test_a_canary_is_judged_by_errors_and_by_time_per_token() -> None:
    guard = route(ONE).guard
    stable = outcomes("one", 50)
    assert judge("two", outcomes("two", 10, 9), stable, guard) == ""  # too few to tell
    assert judge("two", outcomes("two", 96, 4), stable, guard) == ""
    assert "4.8% of" not in judge("two", outcomes("two", 90, 10), stable, guard)
    assert "10.0% of 100 answers failed" in judge("two", outcomes("two", 90, 10), stable, guard)
    assert judge("two", outcomes("two", 50, token_s=0.019), stable, guard) == ""
    assert "2.5 times" in judge("two", outcomes("two", 50, token_s=0.025), stable, guard)
    assert judge("two", outcomes("two", 50, token_s=1.0), stable[:5], guard) == ""  # nothing to compare with


def test_only_the_window_counts_and_a_new_route_begins_anew() -> None:
    now = [0.0]
    seen = Outcomes(clock=lambda: now[0])
    weighted = AliasRoute(versions={ONE.id: 90, TWO.id: 10})
    for outcome in outcomes(TWO.id, 0, 30):
        seen.add(outcome)
    assert "100.0% of 30" in seen.verdict("prod", weighted)
    now[0] = weighted.guard.window_s + 1
    assert seen.verdict("prod", weighted) == ""
    for outcome in outcomes(TWO.id, 0, 30):
        seen.add(outcome)
    seen.forget("prod")
    assert seen.verdict("prod", weighted) == ""
    assert without_canaries(weighted).versions == {ONE.id: 1.0}


# ---------------------------------------------------------------- replicas


def test_autoscaling_targets_tokens_per_replica() -> None:
    policy = TokensPolicy(target_tokens=1000)

    def num_replicas(tokens: list[float], current: int, requests: float = 1) -> int:
        counted = {"tokens": dict(enumerate(tokens))} if tokens else {}
        context = SimpleNamespace(
            aggregated_metrics=counted,
            current_num_replicas=current,
            target_num_replicas=current,
            total_num_requests=requests,
        )
        return policy(context)[0]

    assert num_replicas([2500, 1400], 2) == 4
    assert num_replicas([100, 0], 2) == 1
    assert num_replicas([0, 0], 2, requests=0) == 0
    assert num_replicas([0, 0], 2, requests=1) == 1
    assert num_replicas([], 2) == 2  # they have not reported yet
    assert num_replicas([], 0, requests=3) == 1
