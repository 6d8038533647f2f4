"""How an alias moves: canary, promote, roll back. Each move is one event; endpoints follow it by themselves."""

from __future__ import annotations

from typing import Any

from forge_ray.config.release import AliasRoute, Guard
from forge_ray.errors import ConfigError, NotFound
from forge_ray.store.aliases import route_of
from forge_ray.store.catalog import Catalog


def route(catalog: Catalog, alias: str) -> AliasRoute:
    """What an alias stands for now."""
    found = catalog.routes().get(alias)
    if found is None:
        known = ", ".join(sorted(catalog.routes())) or "none yet"
        raise NotFound(f"no alias {alias!r} in {catalog.store.place}", hint=f"aliases: {known}")
    return found


def canary(catalog: Catalog, alias: str, reference: str, percent: float, guard: Guard, why: str = "") -> AliasRoute:
    """Send `percent` of an alias's requests to another version; the rest stays with the stable one."""
    if not 0 < percent < 100:
        raise ConfigError(f"percent={percent:g} is not between 0 and 100", hint="`forge alias set` moves all of it")
    now = route(catalog, alias)
    version = catalog.releasable(reference).id
    if version == now.stable:
        raise ConfigError(f"{version} is {alias!r}'s stable version already", hint="name the new one")
    versions = {now.stable: 100 - percent, version: percent}
    return _move(catalog, alias, now.model_copy(update={"versions": versions, "guard": guard}), why)


def promote(catalog: Catalog, alias: str, why: str = "") -> AliasRoute:
    """The canary becomes the stable version."""
    now = route(catalog, alias)
    canaries = list(now.versions)[1:]
    if len(canaries) != 1:
        raise ConfigError(f"{alias!r} has {len(canaries)} canaries; there is no one to promote", hint="`forge alias set`")
    return _move(catalog, alias, now.model_copy(update={"versions": {canaries[0]: 1.0}}), why)


def rollback(catalog: Catalog, alias: str, why: str = "") -> AliasRoute:
    """What the alias stood for before its last move; also brings back one that was archived."""
    past = [route_of(event) for event in catalog.events("alias", alias)]
    now = past[-1] if past else None
    before = next((found for found in reversed(past[:-1]) if found and found != now), None)
    if before is None:
        raise NotFound(f"{alias!r} never stood for anything else", hint=f"`forge alias history {alias}`")
    return _move(catalog, alias, before, why or "rolled back")


def history(catalog: Catalog, alias: str) -> list[dict[str, Any]]:
    """Every move of an alias, oldest first."""
    found = []
    for event in catalog.events("alias", alias):
        at = route_of(event)
        found.append({"at": event.at, "route": at and shown(at), "why": event.data.get("why", "")})
    return found


def shown(found: AliasRoute) -> dict[str, Any]:
    """A route without what is default."""
    return found.model_dump(mode="json", exclude_defaults=True)


def in_words(found: AliasRoute | None) -> str:
    """One line for people."""
    if found is None:
        return "archived"
    total = sum(found.versions.values())
    shares = [version if len(found.versions) == 1 else f"{version} {w / total:.3g}" for version, w in found.versions.items()]
    more = [f"{len(found.rules)} rules"] if found.rules else []
    more += [f"shadow {', '.join(found.shadow)}"] if found.shadow else []
    more += [f"fallback {found.fallback}"] if found.fallback else []
    return "; ".join([", ".join(shares), *more])


def _move(catalog: Catalog, alias: str, wanted: AliasRoute, why: str) -> AliasRoute:
    catalog.set_route(alias, wanted, why)
    return catalog.routes()[alias]
