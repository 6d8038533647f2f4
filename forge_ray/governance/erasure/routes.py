"""Aliases of an erasure: versions that learned from the rows leave them, and their replacements take their places."""

from __future__ import annotations

from forge_ray.config.base import parse
from forge_ray.config.release import AliasRoute
from forge_ray.errors import PolicyError
from forge_ray.governance.erasure.options import Facts, Options
from forge_ray.governance.erasure.plan import ErasurePlan
from forge_ray.progress import stage
from forge_ray.records import Erasure, Event, ModelVersion
from forge_ray.release import promotion
from forge_ray.serve.routing import versions_of
from forge_ray.store.catalog import Catalog
from forge_ray.store.placed import WITHDRAWN


def withdraw(catalog: Catalog, record: Erasure, plan: ErasurePlan, options: Options) -> Facts:
    """Withdraw the affected versions: no alias can be moved to them any more, and with `retire` they stop serving."""
    affected = {version.id for version in plan.versions}
    retire = options.deployments == "retire"
    with stage("withdraw") as it:
        withdrawn, archived = catalog.withdrawn(), catalog.archived()
        for version in sorted(affected - set(withdrawn)):
            state = WITHDRAWN[retire or version in archived]
            data: Facts = {"state": state, "erasure": record.id, "why": record.why or "rows were erased"}
            catalog.append(Event(kind="model", subject=version, data=data))
        routes = {}
        for alias, hit in plan.aliases.items():
            now = catalog.routes().get(alias)
            if now is None or not set(versions_of(now)) & affected:
                continue  # done before an interruption
            routes[alias] = now.model_dump(mode="json") | {"versions": list(now.versions.items())}
            catalog.append(
                Event(kind="erasure", subject=record.id, data={"state": "alias", "alias": alias, "was": routes[alias]})
            )
            if retire:
                reason = f"{record.id}: {', '.join(hit)} withdrawn"
                try:
                    promotion.set_route(catalog, alias, _without(catalog, now, affected), reason)
                except PolicyError:  # the version that it would fall back to has no approval
                    promotion.set_route(catalog, alias, None, reason)
        routes |= {
            event.data["alias"]: event.data["was"]
            for event in catalog.events("erasure", record.id)
            if event.data["state"] == "alias"
        }
        last = catalog.last("deployment")
        for deployment in plan.deployments:
            before = last[deployment.id].data if deployment.id in last else {"state": ""}
            data = {**before, "erasure": record.id, "withdrawn": list(deployment.versions)}
            if before.get("erasure") != record.id:
                catalog.append(Event(kind="deployment", subject=deployment.id, data=data))
        what = "no longer serving" if retire else "still serving"
        it.done(f"{len(affected)} versions blocked, {what}; {len(routes)} aliases, {len(plan.deployments)} deployments")
    return {"policy": options.deployments, "versions": sorted(affected), "routes": routes}


def _without(catalog: Catalog, route: AliasRoute, withdrawn: set[str]) -> AliasRoute | None:
    """The route without the withdrawn versions; its base alone where none is left and it falls back to the base; else
    None."""
    versions = {version: weight for version, weight in route.versions.items() if version not in withdrawn and weight}
    if not versions and route.fallback == "base":
        base = catalog.get_as(ModelVersion, route.stable).base_model
        versions = {base: 1.0} if base and base not in withdrawn else {}
    if not versions:
        return None
    rules = tuple(rule for rule in route.rules if rule.to not in withdrawn and rule.classifier not in withdrawn)
    shadow = tuple(version for version in route.shadow if version not in withdrawn)
    return route.model_copy(update={"versions": versions, "rules": rules, "shadow": shadow})


def move(catalog: Catalog, record: Erasure, routes: dict[str, Facts], versions: dict[str, str]) -> Facts:
    """Restore the routes of the aliases with the replacements of the withdrawn versions. A protected alias waits for the
    approvals of its replacement; the erasure does not wait for it."""
    moved: dict[str, list[str]] = {}
    waiting: dict[str, str] = {}
    with stage("move") as it:
        for alias, was in routes.items():
            before = parse(AliasRoute, was | {"versions": dict(was["versions"])})
            new = replaced(before, versions, set(catalog.withdrawn()))
            if new is None:
                continue
            if catalog.routes().get(alias) != new:
                try:
                    promotion.set_route(catalog, alias, new, f"{record.id}: trained again without the rows")
                except PolicyError as error:
                    waiting[alias] = f"{new.stable}: {error.message}"
                    continue
            moved[alias] = list(new.versions)
        summary = [f"{alias} → {new[0]}" for alias, new in moved.items()]
        summary += [f"{alias} waits for {why}" for alias, why in waiting.items()]
        it.done(", ".join(summary) or "no alias")
    return {"aliases": moved, "waiting": waiting}


def replaced(route: AliasRoute, versions: dict[str, str], withdrawn: set[str]) -> AliasRoute | None:
    """The route with each withdrawn version replaced; None where the stable version has no replacement."""
    weights: dict[str, float] = {}
    for version, weight in route.versions.items():
        if (new := versions.get(version, version)) not in withdrawn:
            weights[new] = weights.get(new, 0) + weight
    if (first := versions.get(route.stable, route.stable)) in withdrawn or not any(weights.values()):
        return None
    rules = []
    for rule in route.rules:
        rule = rule.model_copy(
            update={"to": versions.get(rule.to, rule.to), "classifier": versions.get(rule.classifier, rule.classifier)}
        )
        if rule.to not in withdrawn and rule.classifier not in withdrawn:
            rules.append(rule)
    shadow = tuple(new for one in route.shadow if (new := versions.get(one, one)) not in withdrawn)
    order = {first: weights.pop(first), **weights}
    return route.model_copy(update={"versions": order, "rules": tuple(rules), "shadow": shadow})
