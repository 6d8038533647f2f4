"""`forge alias …`: what the names of endpoints stand for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from forge_ray.config.release import AliasRoute
    from forge_ray.store.files import Store


@click.group(cls=Verbs)
def alias() -> None:
    """What the names of an endpoint stand for: list, set, canary, promote, rollback, archive."""


WHY = click.option("--why", default="", help="Kept in the alias's history.")
WAIT_URL = click.option("--url", default="", help="Wait until this endpoint answers by it.")
WAIT_S = 120.0


@verb(alias, "list")
def alias_list(store: Store, as_json: bool) -> Any:
    """Every alias and what it stands for."""
    from forge_ray.cli.show import print_table
    from forge_ray.release.traffic import in_words, shown
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        found = index.routes()
    if not as_json:
        print_table("Aliases", ("alias", "stands for"), [(name, in_words(route)) for name, route in sorted(found.items())])
    return {name: shown(route) for name, route in found.items()}


@verb(alias, "history")
@click.argument("name")
def alias_history(store: Store, as_json: bool, name: str) -> Any:
    """Every move of an alias, with its reason."""
    from forge_ray.cli.show import print_table
    from forge_ray.config.release import AliasRoute
    from forge_ray.release.traffic import history, in_words
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        found = history(index, name)
    if not as_json:
        rows = [
            (move["at"][:19], in_words(AliasRoute.model_validate(move["route"]) if move["route"] else None), move["why"])
            for move in found
        ]
        print_table(name, ("at (UTC)", "stands for", "why"), rows)
    return found


@verb(alias, "set")
@click.argument("name")
@click.option("--to", "versions", multiple=True, metavar="VERSION[=WEIGHT]", help="The first is the stable one.")
@click.option("--shadow", multiple=True, metavar="VERSION", help="Answers too; only metrics see it.")
@click.option("--fallback", type=click.Choice(["", "base"]), default="", help="Who answers where no version can.")
@click.option("--file", metavar="ROUTE.yaml", help="A whole route, with rules; instead of the options.")
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
    """Let a name stand for a version, a weighted set, or a route."""
    from forge_ray.config.base import load, parse
    from forge_ray.config.release import AliasRoute
    from forge_ray.store.catalog import Catalog

    if bool(file) == bool(versions):
        raise ConfigError("give --to VERSION, or --file with a whole route", hint="forge alias set NAME --to mv_…")
    if file:
        wanted = load(AliasRoute, file)
    else:
        weights = {ref: _weight(weight or "1") for ref, _, weight in (given.partition("=") for given in versions)}
        wanted = parse(AliasRoute, {"versions": weights, "shadow": list(shadow), "fallback": fallback})
    with Catalog(store) as index:
        index.set_route(name, wanted, why)
        return _moved(as_json, name, index.routes()[name], url)


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"weight {text!r} is no number", hint="--to mv_a=95 --to mv_b=5") from None


@verb(alias, "canary")
@click.argument("name")
@click.option("--to", "reference", required=True, metavar="VERSION", help="The new version.")
@click.option("--percent", default=5.0, show_default=True, help="Of the requests.")
@click.option("--max-error-rate", default=0.05, show_default=True, help="Above it the canary is taken back.")
@click.option("--max-latency-ratio", default=2.0, show_default=True, help="Time per token against the stable version's.")
@click.option("--min-requests", default=20, show_default=True, help="Before it is judged.")
@WHY
@WAIT_URL
def alias_canary(
    store: Store,
    as_json: bool,
    name: str,
    reference: str,
    percent: float,
    max_error_rate: float,
    max_latency_ratio: float,
    min_requests: int,
    why: str,
    url: str,
) -> Any:
    """Send some of a name's requests to another version; it is taken back by itself if it does badly."""
    from forge_ray.config.base import parse
    from forge_ray.config.release import Guard
    from forge_ray.release.traffic import canary
    from forge_ray.store.catalog import Catalog

    bounds = {"max_error_rate": max_error_rate, "max_latency_ratio": max_latency_ratio, "min_requests": min_requests}
    with Catalog(store) as index:
        return _moved(as_json, name, canary(index, name, reference, percent, parse(Guard, bounds), why), url)


@verb(alias, "promote")
@click.argument("name")
@WHY
@WAIT_URL
def alias_promote(store: Store, as_json: bool, name: str, why: str, url: str) -> Any:
    """The canary becomes the stable version."""
    from forge_ray.release.traffic import promote
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        return _moved(as_json, name, promote(index, name, why), url)


@verb(alias, "rollback")
@click.argument("name")
@WHY
@WAIT_URL
def alias_rollback(store: Store, as_json: bool, name: str, why: str, url: str) -> Any:
    """What the name stood for before its last move."""
    from forge_ray.release.traffic import rollback
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        return _moved(as_json, name, rollback(index, name, why), url)


@verb(alias, "archive")
@click.argument("name")
@WHY
def alias_archive(store: Store, as_json: bool, name: str, why: str) -> Any:
    """Take a name out of use: endpoints answer 410 for it. `alias rollback` brings it back."""
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        index.set_route(name, None, why)
    if not as_json:
        click.echo(f"{name}: archived")
    return {"alias": name, "archived": True}


def _moved(as_json: bool, name: str, route: AliasRoute, url: str) -> Any:
    from forge_ray.release.traffic import in_words, shown

    if url:
        _wait_until_live(url, name, route)
    if not as_json:
        click.echo(f"{name}: {in_words(route)}")
    return {"alias": name, "route": shown(route)}


def _wait_until_live(url: str, name: str, route: AliasRoute) -> None:
    import os

    from forge_ray.client import Client
    from forge_ray.errors import NotFound

    deadline, said = time.monotonic() + WAIT_S, ""
    with Client(url, api_key=os.environ.get("FORGE_API_KEY", "")) as client:
        while time.monotonic() < deadline:
            try:
                card = client.model(name)
                said = str(card["model_version"])
                if said == route.stable and set(card.get("route", {"versions": {said: 1}})["versions"]) == set(
                    route.versions
                ):
                    return
            except NotFound as error:
                said = error.message
            time.sleep(0.2)
    raise EngineError(
        f"{url} does not answer {name!r} by {route.stable} after {WAIT_S:.0f} s (last: {said})",
        hint="`forge deploy --status` says which replicas prepare and what cannot be served",
    )
