"""`forge deploy · undeploy · serve · chat`: start, stop and query endpoints."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.ends import end_in_order
from forge_ray.cli.terminal import echo, secho
from forge_ray.cli.verbs import verb
from forge_ray.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from forge_ray.client import Client
    from forge_ray.store.files import Store


@click.group()
def top() -> None:
    """Top-level verbs; `forge` registers them."""


@verb(top, "deploy", "forge deploy DEPLOY.yaml --address auto")
@click.argument("file", metavar="DEPLOY.yaml", required=False)
@click.option("--address", help="Address of the Ray cluster, e.g. auto on one of its nodes. Default: RAY_ADDRESS.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the deployment file. Repeatable."
)
@click.option(
    "--status",
    "show_status",
    is_flag=True,
    help="Show what the cluster serves, and the endpoints elsewhere; change nothing.",
)
@click.option("--serve-yaml", is_flag=True, help="Print the file for Ray's `serve deploy`, and change nothing.")
def deploy(
    store: Store,
    as_json: bool,
    file: str | None,
    address: str | None,
    overrides: tuple[str, ...],
    show_status: bool,
    serve_yaml: bool,
) -> Any:
    """Deploy released models to a running Ray cluster.

    The endpoint keeps running when this command ends."""
    import os

    from forge_ray import pipeline
    from forge_ray.machine.cluster import connect

    if serve_yaml:
        return _serve_yaml(store, as_json, _deploy_file(file, overrides))
    has_cluster = bool(address or os.environ.get("RAY_ADDRESS"))
    if not has_cluster and not show_status:
        raise ConfigError(
            "no cluster to deploy on", hint="give --address auto on one of its nodes, or use `forge serve` on this machine"
        )
    if not show_status:
        config = _deploy_file(file, overrides)
        connect(address, show_logs=False)
        return pipeline.deploy(config, store)
    if has_cluster:
        connect(address, show_logs=False)
    return _status(store, as_json, has_cluster)


def _deploy_file(file: str | None, overrides: tuple[str, ...]) -> Any:
    from forge_ray.config.base import load
    from forge_ray.config.release import DeployConfig
    from forge_ray.machine.shipped import here_or_shipped

    if file is None:
        raise ConfigError(
            "no deployment file given", hint=f"forge deploy {here_or_shipped('jobs/deploy.yaml')}, or --status"
        )
    shipped = here_or_shipped(file)
    if shipped != file:
        raise NotFound(f"deployment file {file!r} does not exist", hint=f"the one shipped with forge_ray is {shipped}")
    return load(DeployConfig, file, overrides)


def _serve_yaml(store: Store, as_json: bool, config: Any) -> Any:
    import yaml

    from forge_ray.serve.deploy import serve_file

    serve_config = serve_file(config, store.uri)
    if not as_json:
        echo(yaml.safe_dump(serve_config, sort_keys=False).rstrip())
    return serve_config


def _status(store: Store, as_json: bool, has_cluster: bool) -> Any:
    from forge_ray.cli.show import print_table
    from forge_ray.config.release import AliasRoute
    from forge_ray.release.traffic import in_words
    from forge_ray.serve.endings import status_on_record
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        if has_cluster:
            from forge_ray.serve.deploy import status

            endpoints = status(index)
        else:
            endpoints = status_on_record(index, set())
    if not as_json:
        for endpoint in endpoints or [{"name": "nothing is deployed", "status": "", "url": "", "replicas": {}}]:
            echo(f"{endpoint['name']}  {endpoint['status'].lower()}  {endpoint['url']}  {endpoint.get('message', '')}")
            if "table" not in endpoint:  # it is not on this cluster, or its coordinator is not there
                continue
            table = endpoint["table"]
            routes = [(name, in_words(AliasRoute.model_validate(route))) for name, route in table["routes"].items()]
            print_table("Aliases", ("alias", "routes to"), routes)
            rows = [
                (
                    name,
                    "yes" if seen["live"] else "preparing",
                    *(str(seen.get(key, 0)) for key in ("running", "waiting", "tokens")),
                    ", ".join(seen["held"]),
                )
                for name, seen in endpoint.get("replicas", {}).items()
            ]
            print_table("Replicas", ("replica", "up to date", "running", "waiting", "tokens", "in memory"), rows)
            for version, why in table["broken"].items():
                secho(f"{version} cannot be served: {why}", fg="red")
    return endpoints


@verb(top, "undeploy", "forge undeploy support --address auto")
@click.argument("name")
@click.option("--address", help="Address of the Ray cluster, e.g. auto on one of its nodes. Default: RAY_ADDRESS.")
def undeploy(store: Store, as_json: bool, name: str, address: str | None) -> Any:
    """Remove an endpoint after its running requests finish.

    Without a cluster, records the end of one that crashed or is silent."""
    import os

    from forge_ray.machine.cluster import connect
    from forge_ray.serve.endings import note_unsaid_ends
    from forge_ray.store.catalog import Catalog

    if not (address or os.environ.get("RAY_ADDRESS")):
        with Catalog.open(store) as index:
            ended = note_unsaid_ends(index, name)
        if not ended:
            raise ConfigError(
                f"no cluster given, and no endpoint {name!r} of the store crashed or is silent",
                hint="give --address auto on one of its nodes, or set RAY_ADDRESS; `forge deploy --status` lists endpoints",
            )
    else:
        from forge_ray.serve.deploy import undeploy as stop

        connect(address, show_logs=False)
        with Catalog.open(store) as index:
            ended = stop(name, index)
    if ended and not as_json:
        echo(f"the end of {', '.join(ended)} is on record: nobody saw it")
    return {"stopped": name, "ended": ended}


@verb(top, "serve", "forge serve support@prod")
@click.argument("file", metavar="DEPLOY.yaml|NAME")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the deployment file. Repeatable."
)
@click.option("--haproxy", is_flag=True, help="Put HAProxy in front of the replicas: faster, but listens on all interfaces.")
@click.option("--tls-cert", default="", metavar="FILE", help="TLS certificate of the gateway with its chain, PEM.")
@click.option("--tls-key", default="", metavar="FILE", help="TLS private key of the gateway, PEM.")
def serve(
    store: Store, as_json: bool, file: str, overrides: tuple[str, ...], haproxy: bool, tls_cert: str, tls_key: str
) -> Any:
    """Serve released models on this machine until Ctrl-C.

    NAME is an alias or a version, served with a deployment's default settings. Where `host` is not a loopback address, the
    gateway listens there: it limits what clients may send and hold open."""
    from forge_ray import pipeline
    from forge_ray.cli.gateway import run_gateway
    from forge_ray.serve.deploy import note_end
    from forge_ray.serve.front import gateway_of
    from forge_ray.serve.haproxy import set_haproxy

    config = _served(file, overrides, store)
    gateway = gateway_of(config, tls_cert, tls_key)
    if haproxy:
        set_haproxy()
    deployment = pipeline.deploy(config, store, gateway)
    if as_json:
        echo(deployment.model_dump_json())
    try:
        if gateway is None:
            wait_for_ctrl_c(deployment.name)
        else:
            run_gateway(gateway)
    finally:
        note_end(deployment, store)
    sys.exit(0)


def _served(target: str, overrides: tuple[str, ...], store: Store) -> Any:
    """The settings of a deployment file, or the default ones for an alias or a version."""
    from pathlib import Path

    from forge_ray.config.base import apply_overrides, parse
    from forge_ray.config.release import DeployConfig
    from forge_ray.store.catalog import Catalog

    if Path(target).suffix in (".yaml", ".yml"):
        return _deploy_file(target, overrides)
    with Catalog.read_only(store) as index:
        index.model(target)
    name = re.sub(r"[^a-z0-9._-]+", "-", target.lower()).strip("-._")[:64] or "model"
    return parse(DeployConfig, apply_overrides({"name": name, "models": [target]}, overrides), where=f"serve {target}")


def wait_for_ctrl_c(name: str) -> None:
    """Wait for SIGINT or SIGTERM, which are the end that is meant here."""
    import threading

    echo(f"serving {name!r} until Ctrl-C", err=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        end_in_order()


@verb(top, "chat", "forge chat 'Where is my parcel?' --model support@prod")
@click.argument("text", required=False)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="URL of the endpoint.")
@click.option(
    "--api-key", default="", envvar="FORGE_API_KEY", help="API key, if the endpoint requires one. Default: FORGE_API_KEY."
)
@click.option("--model", help="Name of the model. Default: the first one served.")
@click.option("--system", help="System message.")
@click.option("--max-tokens", type=int, help="Maximum tokens of an answer. Default: the endpoint's limit.")
@click.option("--temperature", default=0.0, show_default=True, help="Sampling temperature; 0: greedy.")
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
    """Ask a served model one question, or start a conversation.

    Without TEXT, starts a conversation."""
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
        echo(answer.text)
    return answer


def _converse(client: Client, name: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> Any:
    secho(f"{name}: an empty line or Ctrl-D ends", dim=True, err=True)
    while True:
        try:
            question = input("> ")
        except EOFError:
            break
        if not question.strip():
            break
        messages.append({"role": "user", "content": question})
        pieces = []
        for piece in client.stream_chat(name, messages, **options):
            echo(piece, nl=False)
            pieces.append(piece)
        echo()
        messages.append({"role": "assistant", "content": "".join(pieces)})
    return {"messages": messages}


SERVING: tuple[click.Command, ...] = tuple(top.commands[name] for name in ("deploy", "undeploy", "serve", "chat"))
