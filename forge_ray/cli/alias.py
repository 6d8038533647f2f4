"""`forge alias …`: which model versions an alias routes to."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from forge_ray.config.release import AliasRoute
    from forge_ray.store.files import Store


@click.group(cls=Verbs)
def alias() -> None:
    """Route an alias to versions: set, canary, promote, roll back."""


WHY = click.option("--why", default="", help="Reason, kept in the alias's history.")
WAIT_URL = click.option("--url", default="", help="Wait until the endpoint at this URL serves the new route.")
WAIT_S = 120.0


@verb(alias, "list", "forge alias list")
def alias_list(store: Store, as_json: bool) -> Any:
    """List every alias and the versions it routes to."""
    from forge_ray.cli.show import print_table
    from forge_ray.release.traffic import in_words, shown
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        routes = index.routes()
    if not as_json:
        print_table("Aliases", ("alias", "routes to"), [(name, in_words(route)) for name, route in sorted(routes.items())])
    return {name: shown(route) for name, route in routes.items()}


@verb(alias, "history", "forge alias history support@prod")
@click.argument("name")
def alias_history(store: Store, as_json: bool, name: str) -> Any:
    """List every change of an alias, with its reason."""
    from forge_ray.cli.show import print_table
    from forge_ray.config.release import AliasRoute
    from forge_ray.release.traffic import history, in_words
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        moves = history(index, name)
    if not as_json:
        rows = [
            (move["at"][:19], in_words(AliasRoute.model_validate(move["route"]) if move["route"] else None), move["why"])
            for move in moves
        ]
        print_table(name, ("at (UTC)", "routes to", "why"), rows)
    return moves


@verb(alias, "set", "forge alias set support@prod --to mv_0123456789abcdef")
@click.argument("name")
@click.option(
    "--to",
    "versions",
    multiple=True,
    metavar="VERSION[=WEIGHT]",
    help="Version with its weight; the first is the stable one. Repeatable.",
)
@click.option(
    "--shadow",
    multiple=True,
    metavar="VERSION",
    help="Version that gets a copy of the requests, for metrics only. Repeatable.",
)
@click.option("--fallback", type=click.Choice(["", "base"]), default="", help="What serves the alias when no version can.")
@click.option("--file", metavar="ROUTE.yaml", help="File with the whole route, including rules, instead of the options.")
@WHY
@WAIT_URL
def alias_set(
    store: Store,
    as_json: bool,
    name: str,
    versions: tuple[str, ...],
    shadow: tuple[str, ...],
    fallback: str,
    file: str | None,
    why: str,
    url: str,
) -> Any:
    """Route an alias to a version, a weighted set, or a route file."""
    from forge_ray.config.base import load, parse
    from forge_ray.config.release import AliasRoute
    from forge_ray.release import promotion
    from forge_ray.store.catalog import Catalog

    if bool(file) == bool(versions):
        raise ConfigError("give --to VERSION, or --file with a whole route", hint="forge alias set NAME --to mv_…")
    if file:
        route = load(AliasRoute, file)
    else:
        weights = {ref: _weight(weight or "1") for ref, _, weight in (option.partition("=") for option in versions)}
        route = parse(AliasRoute, {"versions": weights, "shadow": list(shadow), "fallback": fallback})
    with Catalog.open(store) as index:
        promotion.set_route(index, name, route, why)
        return _moved(as_json, name, index.routes()[name], url)


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"weight {text!r} is not a number", hint="--to mv_a=95 --to mv_b=5") from None


@verb(alias, "canary", "forge alias canary support@prod --to mv_fedcba9876543210 --percent 10")
@click.argument("name")
@click.option("--to", "reference", required=True, metavar="VERSION", help="The new version.")
@click.option("--percent", default=5.0, show_default=True, help="Percentage of requests sent to the new version.")
@click.option("--max-error-rate", default=0.05, show_default=True, help="Roll back above this share of failed requests.")
@click.option(
    "--max-latency-ratio",
    default=2.0,
    show_default=True,
    help="Roll back above this ratio of time per token to the stable version's.",
)
@click.option("--min-requests", default=20, show_default=True, help="Requests to observe before the canary is evaluated.")
@WHY
@WAIT_URL
def alias_canary(
    store: Store,
    as_json: bool,
    name: str,
    reference: str,
    percent: float,
    why: str,
    url: str,
    **limits: float,
) -> Any:
    """Send a share of an alias's requests to another version.

    The canary is rolled back automatically if it exceeds one of the limits."""
    from forge_ray.config.base import parse
    from forge_ray.config.release import Guard
    from forge_ray.release.traffic import canary
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        return _moved(as_json, name, canary(index, name, reference, percent, parse(Guard, limits), why), url)


@verb(alias, "promote", "forge alias promote support@prod")
@click.argument("name")
@WHY
@WAIT_URL
def alias_promote(store: Store, as_json: bool, name: str, why: str, url: str) -> Any:
    """Make the canary the stable version."""
    from forge_ray.release.traffic import promote
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        return _moved(as_json, name, promote(index, name, why), url)


@verb(alias, "rollback", "forge alias rollback support@prod --why 'wrong labels'")
@click.argument("name")
@WHY
@WAIT_URL
def alias_rollback(store: Store, as_json: bool, name: str, why: str, url: str) -> Any:
    """Restore the route from before the last change."""
    from forge_ray.release.traffic import rollback
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        return _moved(as_json, name, rollback(index, name, why), url)


@verb(alias, "archive", "forge alias archive support@prod")
@click.argument("name")
@WHY
def alias_archive(store: Store, as_json: bool, name: str, why: str) -> Any:
    """Archive an alias: endpoints answer 410 for it.

    `forge alias rollback` restores it."""
    from forge_ray.release import promotion
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        promotion.set_route(index, name, None, why)
    if not as_json:
        echo(f"{name}: archived")
    return {"alias": name, "archived": True}


def _moved(as_json: bool, name: str, route: AliasRoute, url: str) -> Any:
    from forge_ray.release.traffic import in_words, shown

    if url:
        _wait_until_live(url, name, route)
    if not as_json:
        echo(f"{name}: {in_words(route)}")
    return {"alias": name, "route": shown(route)}


def _wait_until_live(url: str, name: str, route: AliasRoute) -> None:
    import os

    from forge_ray.client import Client
    from forge_ray.errors import NotFound

    deadline, last_answer = time.monotonic() + WAIT_S, ""
    with Client(url, api_key=os.environ.get("FORGE_API_KEY", "")) as client:
        while time.monotonic() < deadline:
            try:
                card = client.model(name)
                last_answer = str(card["model_version"])
                if last_answer == route.stable and set(card.get("route", {"versions": {last_answer: 1}})["versions"]) == set(
                    route.versions
                ):
                    return
            except NotFound as error:
                last_answer = error.message
            time.sleep(0.2)
    raise EngineError(
        f"{url} does not serve {name!r} with {route.stable} after {WAIT_S:.0f} s (last: {last_answer})",
        hint="`forge deploy --status` shows which replicas are still loading and which versions fail to load",
    )
