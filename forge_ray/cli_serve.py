"""`forge deploy · undeploy · serve · chat · alias …`: endpoints and what their names stand for (level 6)."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from forge_ray.errors import ConfigError, EngineError
from forge_ray.verbs import Verbs, verb

if TYPE_CHECKING:
    from forge_ray.client import Client
    from forge_ray.config.release import AliasRoute
    from forge_ray.store import Store


@click.group()
def top() -> None:
    """Holds the verbs that `forge` itself takes."""


@verb(top, "deploy")
@click.argument("file", metavar="DEPLOY.yaml", required=False)
@click.option("--address", help="The Ray cluster, e.g. `auto` on one of its nodes; else RAY_ADDRESS.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the file.")
@click.option("--status", "show_status", is_flag=True, help="Show what the cluster serves, and change nothing.")
@click.option("--serve-yaml", is_flag=True, help="Print the file for Ray's own `serve deploy`, and change nothing.")
def deploy(
    store: Store,
    as_json: bool,
    file: str | None,
    address: str | None,
    overrides: tuple[str, ...],
    show_status: bool,
    serve_yaml: bool,
) -> Any:
    """Put released models behind an endpoint on a running cluster; it stays when this command ends."""
    import os

    from forge_ray import pipeline
    from forge_ray.cluster import connect

    if serve_yaml:
        return _serve_yaml(store, as_json, _deploy_file(file, overrides))
    if not (address or os.environ.get("RAY_ADDRESS")):
        raise ConfigError("no cluster to deploy on", hint="give --address auto on a node of it, or use `forge serve` here")
    if not show_status:
        config = _deploy_file(file, overrides)
        connect(address, show_logs=False)
        return pipeline.deploy(config, store)
    connect(address, show_logs=False)
    return _status(store, as_json)


def _deploy_file(file: str | None, overrides: tuple[str, ...]) -> Any:
    from forge_ray.config.base import load
    from forge_ray.config.release import DeployConfig

    if file is None:
        raise ConfigError("no deployment file given", hint="forge deploy jobs/deploy.yaml, or --status")
    return load(DeployConfig, file, overrides)


def _serve_yaml(store: Store, as_json: bool, config: Any) -> Any:
    import yaml

    from forge_ray.serve.deploy import serve_file

    found = serve_file(config, store.uri)
    if not as_json:
        click.echo(yaml.safe_dump(found, sort_keys=False).rstrip())
    return found


def _status(store: Store, as_json: bool) -> Any:
    from forge_ray.catalog import Catalog
    from forge_ray.config.release import AliasRoute
    from forge_ray.serve.deploy import status
    from forge_ray.show import print_table
    from forge_ray.traffic import in_words

    with Catalog(store) as index:
        found = status(index)
    if not as_json:
        for endpoint in found or [{"name": "nothing is deployed", "status": "", "url": "", "replicas": {}}]:
            click.echo(f"{endpoint['name']}  {endpoint['status'].lower()}  {endpoint['url']}  {endpoint.get('message', '')}")
            table = endpoint.get("table", {"routes": {}, "broken": {}})
            routes = [(name, in_words(AliasRoute.model_validate(route))) for name, route in table["routes"].items()]
            print_table("Names", ("name", "stands for"), routes)
            rows = [
                (
                    name,
                    "yes" if seen["live"] else "preparing",
                    *(str(seen.get(key, 0)) for key in ("running", "waiting", "tokens")),
                )
                for name, seen in endpoint.get("replicas", {}).items()
            ]
            print_table("Replicas", ("replica", "up to date", "running", "waiting", "tokens"), rows)
            for version, why in table["broken"].items():
                click.secho(f"{version} cannot be served: {why}", fg="red")
    return found


@verb(top, "undeploy")
@click.argument("name")
@click.option("--address", help="The Ray cluster, e.g. `auto` on one of its nodes; else RAY_ADDRESS.")
def undeploy(store: Store, as_json: bool, name: str, address: str | None) -> Any:
    """Take an endpoint away once it has finished what it began."""
    import os

    from forge_ray.catalog import Catalog
    from forge_ray.cluster import connect
    from forge_ray.serve.deploy import undeploy as stop

    if not (address or os.environ.get("RAY_ADDRESS")):
        raise ConfigError("no cluster given", hint="--address auto on a node of it, or set RAY_ADDRESS")
    connect(address, show_logs=False)
    with Catalog(store) as index:
        stop(name, index)
    return {"stopped": name}


@verb(top, "serve")
@click.argument("file", metavar="DEPLOY.yaml")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the file.")
@click.option("--haproxy", is_flag=True, help="HAProxy in front of the replicas: faster, and it listens on all interfaces.")
def serve(store: Store, as_json: bool, file: str, overrides: tuple[str, ...], haproxy: bool) -> Any:
    """Serve released models from this machine until Ctrl-C."""
    from forge_ray import pipeline
    from forge_ray.haproxy import set_haproxy

    config = _deploy_file(file, overrides)
    if haproxy:
        set_haproxy()
    deployment = pipeline.deploy(config, store)
    if as_json:
        click.echo(deployment.model_dump_json())
    wait_for_ctrl_c(deployment.name)
    sys.exit(0)


def wait_for_ctrl_c(name: str) -> None:
    """Until SIGINT or SIGTERM."""
    import signal

    click.echo(f"serving {name!r} until Ctrl-C", err=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


@verb(top, "chat")
@click.argument("text", required=False)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The endpoint.")
@click.option("--api-key", default="", envvar="FORGE_API_KEY", help="Where it wants one; else FORGE_API_KEY.")
@click.option("--model", help="Name of the model; default: the first that the endpoint has.")
@click.option("--system", help="System message.")
@click.option("--max-tokens", type=int, help="Of an answer; default: what the endpoint allows.")
@click.option("--temperature", default=0.0, show_default=True)
def chat(
    store: Store,
    as_json: bool,
    text: str | None,
    url: str,
    api_key: str,
    model: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float,
) -> Any:
    """Ask a served model: one question, or without TEXT a conversation."""
    from forge_ray.client import Client

    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    options: dict[str, Any] = {"temperature": temperature} | ({"max_tokens": max_tokens} if max_tokens else {})
    with Client(url, api_key=api_key) as client:
        name = model or client.models()[0]
        if text is None:
            if as_json or not sys.stdin.isatty():
                raise ConfigError("no question given", hint="forge chat 'What is …?'")
            return _converse(client, name, messages, options)
        answer = client.chat(name, [*messages, {"role": "user", "content": text}], **options)
    if not as_json:
        click.echo(answer.text)
    return answer


def _converse(client: Client, name: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> Any:
    click.secho(f"{name}: an empty line or Ctrl-D ends", dim=True, err=True)
    while True:
        try:
            question = input("> ")
        except EOFError:
            break
        if not question.strip():
            break
        messages.append({"role": "user", "content": question})
        said = []
        for piece in client.stream_chat(name, messages, **options):
            click.echo(piece, nl=False)
            said.append(piece)
        click.echo()
        messages.append({"role": "assistant", "content": "".join(said)})
    return {"messages": messages}


@click.group(cls=Verbs)
def alias() -> None:
    """What the names of an endpoint stand for: list, set, canary, promote, rollback, archive."""


WHY = click.option("--why", default="", help="Kept in the alias's history.")
WAIT_URL = click.option("--url", default="", help="Wait until this endpoint answers by it.")
WAIT_S = 120.0


@verb(alias, "list")
def alias_list(store: Store, as_json: bool) -> Any:
    """Every alias and what it stands for."""
    from forge_ray.catalog import Catalog
    from forge_ray.show import print_table
    from forge_ray.traffic import in_words, shown

    with Catalog(store) as index:
        found = index.routes()
    if not as_json:
        print_table("Aliases", ("alias", "stands for"), [(name, in_words(route)) for name, route in sorted(found.items())])
    return {name: shown(route) for name, route in found.items()}


@verb(alias, "history")
@click.argument("name")
def alias_history(store: Store, as_json: bool, name: str) -> Any:
    """Every move of an alias, with its reason."""
    from forge_ray.catalog import Catalog
    from forge_ray.config.release import AliasRoute
    from forge_ray.show import print_table
    from forge_ray.traffic import history, in_words

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
    from forge_ray.catalog import Catalog
    from forge_ray.config.base import load, parse
    from forge_ray.config.release import AliasRoute

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
    from forge_ray.catalog import Catalog
    from forge_ray.config.base import parse
    from forge_ray.config.release import Guard
    from forge_ray.traffic import canary

    bounds = {"max_error_rate": max_error_rate, "max_latency_ratio": max_latency_ratio, "min_requests": min_requests}
    with Catalog(store) as index:
        return _moved(as_json, name, canary(index, name, reference, percent, parse(Guard, bounds), why), url)


@verb(alias, "promote")
@click.argument("name")
@WHY
@WAIT_URL
def alias_promote(store: Store, as_json: bool, name: str, why: str, url: str) -> Any:
    """The canary becomes the stable version."""
    from forge_ray.catalog import Catalog
    from forge_ray.traffic import promote

    with Catalog(store) as index:
        return _moved(as_json, name, promote(index, name, why), url)


@verb(alias, "rollback")
@click.argument("name")
@WHY
@WAIT_URL
def alias_rollback(store: Store, as_json: bool, name: str, why: str, url: str) -> Any:
    """What the name stood for before its last move."""
    from forge_ray.catalog import Catalog
    from forge_ray.traffic import rollback

    with Catalog(store) as index:
        return _moved(as_json, name, rollback(index, name, why), url)


@verb(alias, "archive")
@click.argument("name")
@WHY
def alias_archive(store: Store, as_json: bool, name: str, why: str) -> Any:
    """Take a name out of use: endpoints answer 410 for it. `alias rollback` brings it back."""
    from forge_ray.catalog import Catalog

    with Catalog(store) as index:
        index.set_route(name, None, why)
    if not as_json:
        click.echo(f"{name}: archived")
    return {"alias": name, "archived": True}


def _moved(as_json: bool, name: str, route: AliasRoute, url: str) -> Any:
    from forge_ray.traffic import in_words, shown

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


SERVING: tuple[click.Command, ...] = (*(top.commands[name] for name in ("deploy", "undeploy", "serve", "chat")), alias)
