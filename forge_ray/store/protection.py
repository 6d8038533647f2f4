"""The two-person rule: what a move of a protected alias needs, from approvals in their places of the log (pure).

Commands ask before they write, endpoints before they follow, by the same function: a move that one person made by hand is
not followed. Approvals name the full digest of a record; a person's last decision counts, and a no stops everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from forge_ray.config.release import AliasRoute
from forge_ray.store.authority import Policy

Action = Literal["use", "archive", "restore"]
DECIDERS = ("data_steward", "validator", "releaser")


@dataclass(frozen=True)
class Decision:
    """One approval or refusal that was signed by somebody who could, at its place in the log."""

    line: int
    person: str
    roles: tuple[str, ...]
    is_yes: bool
    alias: str
    action: Action


@dataclass(frozen=True)
class VersionFacts:
    """What the log says of a model version: the digest of its record, its base, and who signed the run that trained it.
    `trained_by` None: it was trained, and nobody signed the run."""

    sha256: str
    base: str
    trained_by: frozenset[str] | None


@dataclass(frozen=True)
class Shortfall:
    """Why a move is refused: the rule's name, and what is missing for which version."""

    rule: Literal["protected", "independent_validation", "refused"]
    version: str
    people: tuple[str, ...] = ()


def is_protected(policy: Policy, alias: str) -> bool:
    return any(fnmatchcase(alias, pattern) for pattern in policy.protected)


def reached(route: AliasRoute | None, base_of: Callable[[str], str]) -> list[str]:
    """Every version that a request or its copy can reach by a route: weights, rules, classifiers, shadows, the base."""
    if route is None:
        return []
    targets = [name for rule in route.rules for name in (rule.to, rule.classifier)]
    base = base_of(route.stable) if route.fallback == "base" or "base" in targets else ""
    names = (*route.versions, *(name for name in targets if name != "base"), *route.shadow, base)
    return list(dict.fromkeys(name for name in names if name))


def to_approve(before: AliasRoute | None, after: AliasRoute, base_of: Callable[[str], str]) -> list[str]:
    """The versions of `after` that two people must have approved: all but the stable one where it was stable before."""
    stable = before.stable if before else ""
    return [version for version in reached(after, base_of) if version != stable or version not in after.versions]


def shortfall(
    policy: Policy,
    alias: str,
    version: str,
    facts: VersionFacts,
    mover: str,
    decisions: Iterable[Decision],
    action: Action = "use",
) -> Shortfall | None:
    """What is missing for `mover` (a releaser's person; "": nobody) to let a version answer under a protected alias, or to
    archive or restore it. `decisions` are those about the version, oldest first, that name the digest of its record."""
    last = {one.person: one for one in decisions if one.alias in ("", alias) and one.action == action}
    if refusing := sorted(person for person, one in last.items() if not one.is_yes and set(one.roles) & set(DECIDERS)):
        return Shortfall("refused", version, tuple(refusing))
    agreed = {person for person, one in last.items() if one.alias == alias and "releaser" in one.roles}
    agreed |= {mover} if mover else set()
    if len(agreed) < 2:
        return Shortfall("protected", version, tuple(sorted(agreed)))
    if policy.independent_validation and action != "archive":
        validators = {person for person, one in last.items() if "validator" in one.roles}
        if facts.trained_by is None or not validators - facts.trained_by:
            return Shortfall("independent_validation", version, tuple(sorted(facts.trained_by or ())))
    return None
