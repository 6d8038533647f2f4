"""How an alias moves: canary, promote, roll back. Each move is one event; endpoints follow it by themselves."""

from __future__ import annotations

from typing import Any

from forge_ray.config.release import AliasRoute, Guard
from forge_ray.errors import ConfigError, NotFound
from forge_ray.release import promotion
from forge_ray.store.aliases import route_of
from forge_ray.store.catalog import Catalog


def route(catalog: Catalog, alias: str) -> AliasRoute:
    """What an alias stands for now."""
    current = catalog.routes().get(alias)
    if current is None:
        names = ", ".join(sorted(catalog.routes())) or "none yet"
        raise NotFound(f"no alias {alias!r} in {catalog.store.place}", hint=f"aliases: {names}")
    return current


def canary(catalog: Catalog, alias: str, reference: str, percent: float, guard: Guard, why: str = "") -> AliasRoute:
    """Send `percent` of an alias's requests to another version; the rest stays with the stable one."""
    if not 0 < percent < 100:
        raise ConfigError(f"percent={percent:g} is not between 0 and 100", hint="`forge alias set` moves all of it")
    now = route(catalog, alias)
    version = promotion.releasable(catalog, reference).id
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
    before = next((earlier for earlier in reversed(past[:-1]) if earlier and earlier != now), None)
    if before is None:
        raise NotFound(f"{alias!r} never stood for anything else", hint=f"`forge alias history {alias}`")
    return _move(catalog, alias, before, why or "rolled back")


def history(catalog: Catalog, alias: str) -> list[dict[str, Any]]:
    """Every move of an alias, oldest first."""
    moves = []
    for event in catalog.events("alias", alias):
        at = route_of(event)
        moves.append({"at": event.at, "route": at and shown(at), "why": event.data.get("why", "")})
    return moves


def shown(route: AliasRoute) -> dict[str, Any]:
    """A route without what is default."""
    return route.model_dump(mode="json", exclude_defaults=True)


def in_words(route: AliasRoute | None) -> str:
    """One line for people."""
    if route is None:
        return "archived"
    total = sum(route.versions.values())
    shares = [version if len(route.versions) == 1 else f"{version} {w / total:.3g}" for version, w in route.versions.items()]
    more = [f"{len(route.rules)} rules"] if route.rules else []
    more += [f"shadow {', '.join(route.shadow)}"] if route.shadow else []
    more += [f"fallback {route.fallback}"] if route.fallback else []
    return "; ".join([", ".join(shares), *more])


def _move(catalog: Catalog, alias: str, new: AliasRoute, why: str) -> AliasRoute:
    promotion.set_route(catalog, alias, new, why)
    return catalog.routes()[alias]
