"""Which version answers which name (pure).

A `Table` says what an endpoint serves at one moment. It is computed from the store's facts alone, so every process that
reads the same facts has the same table, and its digest names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from forge_ray.config.release import AliasRoute, DeployConfig, Rule
from forge_ray.errors import ForgeError
from forge_ray.models.class_head import is_classifier
from forge_ray.records import Frozen, ModelVersion, digest, hex_of
from forge_ray.serve.loaded import Loaded


class ServedVersion(Frozen):
    """One version of a table. `engine` names the weights that it runs on: its base's, or its own where full, merged, or of a
    classifier."""

    id: str
    digest: str
    weights: Literal["full", "adapter", "merged"]
    engine: str
    base: str
    name: str
    licence: str
    run: str
    dataset: str
    created_at: str
    classifier: bool = False


class Table(Frozen):
    """What an endpoint serves. `archived`: aliases and versions out of use. `broken`: versions that could not be loaded, and
    why."""

    versions: dict[str, ServedVersion]
    routes: dict[str, AliasRoute]
    archived: tuple[str, ...] = ()
    broken: dict[str, str] = {}

    @property
    def id(self) -> str:
        return hex_of(digest(self.model_dump(mode="json")))[:16]

    def base_of(self, route: AliasRoute) -> str:
        """The full version under a route's stable one."""
        stable = self.versions.get(route.stable)
        return stable.base if stable else ""


@dataclass(frozen=True)
class RoutingFacts:
    """The store's current routes, archived names and versions."""

    routes: Mapping[str, AliasRoute]
    archived: frozenset[str]
    version: Callable[[str], ModelVersion | None]


def table_of(config: DeployConfig, facts: RoutingFacts, broken: Mapping[str, str], before: Table | None = None) -> Table:
    """The table that follows from the facts.

    An alias whose stable version is `broken` keeps the route that it had `before`: a version that fails to load never
    replaces the one being served.
    """
    versions: dict[str, ServedVersion] = {}
    routes: dict[str, AliasRoute] = {}
    refused: dict[str, str] = {}
    merged = {facts.routes[name].stable if name in facts.routes else name for name in config.merged}

    def record_of(identifier: str) -> ModelVersion | None:
        try:
            return facts.version(identifier)
        except ForgeError as error:  # of one version; the others are served
            refused[identifier] = error.message
            return None

    def add(identifier: str) -> None:
        record = None if identifier in versions else record_of(identifier)
        if record and (record.weights == "full" or is_classifier(record)):
            base_id = record.base_model if record.weights == "adapter" else identifier
            versions[identifier] = _served(record, base_id, merged=is_classifier(record))
        elif record and (base := record_of(record.base_model)) and base.weights == "full":
            versions.setdefault(base.id, _served(base, base.id, merged=False))
            versions[identifier] = _served(record, base.id, merged=identifier in merged)

    def add_route(name: str, route: AliasRoute) -> None:
        if route.stable in broken and before and name in before.routes and before.routes[name].stable not in broken:
            route = before.routes[name]
        for identifier in versions_of(route):
            add(identifier)
        routes[name] = route

    for name in (*config.models, *config.aliases):
        if name in facts.routes:
            add_route(name, facts.routes[name])
        else:
            add(name)
    if config.published:
        bases = {version.base for version in versions.values() if version.weights == "full" or not version.classifier}
        for name, route in facts.routes.items():
            stable = record_of(route.stable)
            if name not in routes and stable and (stable.base_model or stable.id) in bases:
                add_route(name, route)
    return Table(
        versions=dict(sorted(versions.items())),
        routes=dict(sorted(routes.items())),
        archived=tuple(sorted(facts.archived)),
        broken=dict(sorted({**broken, **refused}.items())),
    )


def versions_of(route: AliasRoute) -> list[str]:
    """Every version that a route names."""
    targets = [rule.to for rule in route.rules if rule.to != "base"] + [rule.classifier for rule in route.rules]
    return [identifier for identifier in (*route.versions, *targets, *route.shadow) if identifier]


def _served(record: ModelVersion, base: str, merged: bool) -> ServedVersion:
    weights: Literal["full", "adapter", "merged"] = "merged" if merged and record.weights == "adapter" else record.weights
    return ServedVersion(
        id=record.id,
        digest=record.files_digest,
        weights=weights,
        engine=base if weights == "adapter" else record.id,
        base=base,
        name=record.name,
        licence=record.licence,
        run=record.run,
        dataset=record.dataset,
        created_at=record.created_at,
        classifier=is_classifier(record),
    )


@dataclass(frozen=True)
class RoutingInputs:
    """What the rules of a route may depend on. `prompt_ids`: the prompt by the stable version's template, `prompt_by`: by
    that of another; `labels`: those that each classifier gives it, by its version."""

    headers: Mapping[str, str]
    user: str
    prompt_ids: tuple[int, ...]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompt_by: Callable[[Loaded], Awaitable[tuple[int, ...]]] | None = None


def decide(route: AliasRoute, inputs: RoutingInputs, draw: float) -> tuple[str, str]:
    """(version or `base`, why): the first rule that matches, else by weight. `draw` in [0, 1)."""
    for number, rule in enumerate(route.rules, start=1):
        if _matches(rule, inputs):
            return rule.to, f"rule {number}"
    total, passed = sum(route.versions.values()), 0.0
    for version, weight in route.versions.items():
        passed += weight / total
        if draw < passed and weight:
            return version, "stable" if version == route.stable else "canary"
    return route.stable, "stable"  # rounding left `draw` above the sum


def _matches(rule: Rule, inputs: RoutingInputs) -> bool:
    num_prompt_tokens = len(inputs.prompt_ids)
    return (
        all(inputs.headers.get(name.lower()) == value for name, value in rule.header.items())
        and (not rule.user or inputs.user in rule.user)
        and (not rule.prompt_tokens_below or num_prompt_tokens < rule.prompt_tokens_below)
        and num_prompt_tokens >= rule.prompt_tokens_from
        and (not rule.classifier or rule.label in inputs.labels.get(rule.classifier, ()))
    )


def sticky(name: str, user: str) -> float:
    """A user's fixed draw in [0, 1) for an alias: the same user gets the same version while the weights stay the same."""
    return int.from_bytes(hashlib.blake2b(f"{name}\0{user}".encode(), digest_size=8).digest(), "big") / 2**64
