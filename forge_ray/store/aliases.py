"""What an alias stands for, as its events say it."""

from __future__ import annotations

from typing import Any

from forge_ray.config.release import AliasRoute
from forge_ray.records import Event


def alias_event(alias: str, route: AliasRoute | None, why: str = "") -> Event:
    """`route` None: the alias is archived."""
    if route is None:
        return Event(kind="alias", subject=alias, data={"archived": True, "why": why})
    data: dict[str, Any] = {"model_version": route.stable}
    if route != AliasRoute(versions={route.stable: 1}):
        data["route"] = route.model_dump(mode="json", exclude_defaults=True)
    return Event(kind="alias", subject=alias, data=data | ({"why": why} if why else {}))


def route_of(event: Event) -> AliasRoute | None:
    """What an alias event says; None: archived."""
    if event.data.get("archived"):
        return None
    stable = event.data["model_version"]
    route = AliasRoute.model_validate(event.data.get("route") or {"versions": {stable: 1}})
    # what is stored has its keys sorted; the stable version is the first
    return route.model_copy(update={"versions": {stable: route.versions[stable], **route.versions}})


def gives_up_canaries(before: AliasRoute | None, after: AliasRoute | None) -> bool:
    """Whether `after` is `before` with its stable version alone."""
    if before is None or after is None:
        return False
    return after.versions.keys() == {before.stable} and after.model_copy(update={"versions": before.versions}) == before
