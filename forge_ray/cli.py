"""`forge …`: every verb of the product, for people and for programs (level 6).

`--json` gives one JSON object on stdout; progress and messages go to stderr. Exit codes: 0 success, 1 the work failed,
2 a mistake of the user, 3 refused by policy.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from forge_ray import __version__
from forge_ray.errors import ConfigError, ForgeError
from forge_ray.offline import set_offline_switches
from forge_ray.quiet import quiet_libraries

if TYPE_CHECKING:
    from forge_ray.config.run import RunConfig
    from forge_ray.store import Store

EXIT_CODES = "Exit codes: 0 success, 1 the work failed, 2 a mistake in what was asked, 3 refused by policy."


class Verbs(click.Group):
    """Verbs in the order of the data flow, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Verbs, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="forge")
def cli() -> None:
    """Train your own language models on your own rows, on your own machines, and serve them."""


@cli.group(cls=Verbs)
def models() -> None:
    """Base models and trained versions: import, list, show, promote."""


@cli.group(cls=Verbs)
def data() -> None:
    """Datasets: prepare, list, show."""


@cli.group(cls=Verbs)
def runs() -> None:
    """Training runs: list."""


@cli.group(cls=Verbs)
def catalog() -> None:
    """The index over the store."""


def verb(group: click.Group, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command with --store and --json; its function returns what --json prints, after printing for people otherwise."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(store: str | None, as_json: bool, **arguments: Any) -> None:
            set_offline_switches()
            quiet_libraries()
            try:
                from forge_ray.cluster import open_store

                result = function(store=open_store(store), as_json=as_json, **arguments)
            except ForgeError as error:
                _fail(error, as_json)
            else:
                if as_json:
                    from forge_ray.job import as_json as plain

                    click.echo(json.dumps(plain(result), ensure_ascii=False))

        command = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(command)
        store_help = "Folder or URI of the store; else FORGE_STORE, else .forge."
        command = click.option("--store", metavar="URI", help=store_help)(command)
        return group.command(name)(command)

    return wrap


def _fail(error: ForgeError, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"error": {"code": error.code, "message": error.message, "hint": error.hint}}))
    click.secho(f"error: {error.message}", fg="red", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
    sys.exit(error.exit_code)


def run_file(function: Callable[..., Any]) -> Callable[..., Any]:
    """RUN.yaml and its overrides, as `config`."""

    @functools.wraps(function)
    def command(file: str, overrides: tuple[str, ...], **arguments: Any) -> Any:
        return function(config=_load(file, overrides), **arguments)

    command = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, e.g. train.seed=1.")(
        command
    )
    return click.argument("file", metavar="RUN.yaml")(command)


def _load(file: str, overrides: tuple[str, ...]) -> RunConfig:
    from forge_ray.config.base import load
    from forge_ray.config.run import RunConfig

    return load(RunConfig, file, overrides)


@verb(cli, "quickstart")
@click.option("--config", "file", default="jobs/quickstart.yaml", show_default=True, help="The run file.")
@click.option("--port", default=0, help="Port of the endpoint; 0: the run file's, or a free one.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the run file.")
def quickstart(store: Store, as_json: bool, file: str, port: int, overrides: tuple[str, ...]) -> Any:
    """The whole path on this machine: rows, training, evaluation, endpoint, lineage."""
    from forge_ray import quickstart as quick

    shown = quick.quickstart(_load(file, overrides), store, port)
    if not as_json:
        from forge_ray.show import print_quickstart

        print_quickstart(shown, store)
    return shown


@verb(models, "import")
@click.argument("path")
@click.option("--name", help="Name of the version; default: the file's.")
@click.option("--licence", default="", help="SPDX identifier, e.g. Apache-2.0.")
@click.option("--alias", default="", help="Point this alias at it.")
def models_import(store: Store, as_json: bool, path: str, name: str | None, licence: str, alias: str) -> Any:
    """A Hugging Face directory or GGUF file → a model version (safetensors only, nothing is executed)."""
    from pathlib import Path

    from forge_ray.catalog import Catalog
    from forge_ray.import_model import import_model
    from forge_ray.progress import stage

    with Catalog(store) as index, stage("import") as it:
        version = import_model(index, path, name or Path(path).stem.lower(), licence, alias)
        it.done(f"{version.id}  {version.name}{f' ← {alias}' if alias else ''}")
        return version


@verb(models, "list")
def models_list(store: Store, as_json: bool) -> Any:
    """Every model version, with its aliases and scores."""
    from forge_ray.catalog import Catalog
    from forge_ray.show import models as listed
    from forge_ray.show import print_table

    with Catalog(store) as index:
        found = listed(index)
    if not as_json:
        header = ("version", "name", "status", "weights", "MB", "aliases", "exact match", "loss")
        rows = [
            (
                *(str(item[key]) for key in ("id", "name", "status", "weights")),
                f"{item['size'] / 1e6:.1f}",
                ", ".join(item["aliases"]),
                *(f"{item['metrics'][key]:.3f}" if key in item["metrics"] else "" for key in ("exact_match", "loss")),
            )
            for item in found
        ]
        print_table("Model versions", header, rows)
    return found


@verb(models, "show")
@click.argument("reference", metavar="VERSION|ALIAS")
def models_show(store: Store, as_json: bool, reference: str) -> Any:
    """One model version: files, digests, licence, what it was made from."""
    from forge_ray.catalog import Catalog
    from forge_ray.lineage import resolve

    with Catalog(store) as index:
        version = index.model(resolve(index, reference))
        if not as_json:
            click.echo(json.dumps(version.model_dump(mode="json"), indent=2, ensure_ascii=False))
        return version


@verb(models, "promote")
@click.argument("reference", metavar="VERSION|ALIAS")
@click.option("--alias", required=True, help="The alias to point at it.")
def models_promote(store: Store, as_json: bool, reference: str, alias: str) -> Any:
    """Point an alias at a version; a rejected one is refused (exit 3)."""
    from forge_ray.catalog import Catalog

    with Catalog(store) as index:
        version = index.promote(reference, alias)
    if not as_json:
        click.echo(f"{alias} → {version.id}")
    return {"alias": alias, "model_version": version.id}


@verb(data, "prepare")
@run_file
def data_prepare(store: Store, as_json: bool, config: RunConfig) -> Any:
    """Rows → a packed, content-addressed dataset version."""
    from forge_ray import pipeline

    manifest = pipeline.prepare(config, store)
    if not as_json:
        from forge_ray.show import print_table

        header = ("split", "records", "packed rows", "tokens", "trained tokens", "fill")
        rows = []
        for name, stats in manifest.splits.items():
            room = max(1, stats.num_rows * manifest.sequence_length)
            counts = (stats.num_records, stats.num_rows, stats.num_tokens, stats.num_trained_tokens)
            rows.append((name, *(f"{count:,}" for count in counts), f"{stats.num_tokens / room:.1%}"))
        print_table(manifest.id, header, rows)
        for reason, count in manifest.rejects.items():
            click.echo(f"  {count} × {reason}")
    return manifest


@verb(data, "list")
def data_list(store: Store, as_json: bool) -> Any:
    """Every dataset version."""
    from forge_ray.catalog import Catalog
    from forge_ray.records import DatasetManifest
    from forge_ray.show import print_table

    with Catalog(store) as index:
        found = index.all(DatasetManifest)
    if not as_json:
        rows = [
            (d.id, d.name, *(f"{d.splits[s].num_records:,}" for s in ("train", "validation", "test")), d.created_at[:19])
            for d in found
        ]
        print_table("Datasets", ("dataset", "name", "train", "validation", "test", "created (UTC)"), rows)
    return [manifest.model_dump(mode="json", exclude={"files"}) for manifest in found]


@verb(data, "show")
@click.argument("dataset", metavar="ds_…")
@click.option("--rows", default=3, show_default=True, help="How many packed rows.")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="train", show_default=True)
def data_show(store: Store, as_json: bool, dataset: str, rows: int, split: str) -> Any:
    """Packed rows token by token, trained tokens coloured, with the records inside."""
    from forge_ray.catalog import Catalog
    from forge_ray.show import packed_rows, print_packed_rows

    with Catalog(store) as index:
        shown = packed_rows(index, dataset, split, rows)
    if not as_json:
        print_packed_rows(shown)
    return {"dataset": dataset, "split": split, "rows": shown}


@verb(cli, "train")
@run_file
def train(store: Store, as_json: bool, config: RunConfig) -> Any:
    """Train as the run file says; an unfinished run of the same settings is resumed."""
    from forge_ray import pipeline

    record = pipeline.train(config, store)
    if not as_json:
        click.echo(f"metrics, loss curve, checkpoints and export: {store.place}/runs/{record.id}")
    return record


@verb(runs, "list")
def runs_list(store: Store, as_json: bool) -> Any:
    """Every training run that has started, with its last state."""
    from forge_ray.catalog import Catalog
    from forge_ray.show import print_table, started_runs

    with Catalog(store) as index:
        found = started_runs(index)
    if not as_json:
        rows = [(r["id"], r["state"], r["name"], r["steps"], r["loss"], r["dataset"], r["at"][:19]) for r in found]
        print_table("Runs", ("run", "state", "name", "steps", "loss", "dataset", "since (UTC)"), rows)
    return found


@verb(cli, "eval")
@run_file
def evaluate(store: Store, as_json: bool, config: RunConfig) -> Any:
    """Score the base model and the trained one on the same held-out rows."""
    from forge_ray import pipeline

    base, tuned = pipeline.evaluate(config, store)
    if not as_json:
        from forge_ray.show import comparison, print_table

        print_table(f"Held-out {tuned.split} rows: {tuned.num_examples}", ("", "base", "tuned", ""), comparison(base, tuned))
        click.echo(f"items and confusion matrix: {store.place}/evals/{tuned.id}")
    return {"base": base, "tuned": tuned}


@verb(cli, "release")
@run_file
def release(store: Store, as_json: bool, config: RunConfig) -> Any:
    """Gate the trained model and register it: accepted and promoted, or rejected with the reasons (exit 3)."""
    from forge_ray import pipeline
    from forge_ray.errors import PolicyError

    version = pipeline.release(config, store)
    if version.status == "rejected":
        raise PolicyError(f"{version.id} was rejected: {'; '.join(version.reasons)}", hint="it is registered, not promoted")
    return version


@verb(cli, "run")
@run_file
def run(store: Store, as_json: bool, config: RunConfig) -> Any:
    """Every stage of a run file: prepare, train, evaluate, release, deploy."""
    from forge_ray import pipeline
    from forge_ray.cluster import in_ray_job
    from forge_ray.errors import PolicyError

    outcome = pipeline.run(config, store)
    if outcome.version.status == "rejected":
        reasons = "; ".join(outcome.version.reasons)
        raise PolicyError(f"{outcome.version.id} was rejected: {reasons}", hint="registered, not promoted, not deployed")
    if outcome.deployment and not in_ray_job() and not as_json:
        _wait_for_ctrl_c(outcome.deployment.name)
    return outcome


@verb(cli, "submit")
@click.argument("file", metavar="RUN.yaml")
@click.option("--address", required=True, help="The cluster's dashboard, e.g. http://head:8265.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the run file.")
@click.option("--no-wait", is_flag=True, help="Return once the job is accepted.")
def submit(store: Store, as_json: bool, file: str, address: str, overrides: tuple[str, ...], no_wait: bool) -> Any:
    """`forge run` as a Ray job on a cluster; the store must be a place that all nodes share."""
    from forge_ray.submit import submit as send

    _load(file, overrides)  # a mistake is told here, not minutes later on the cluster
    result = send(file, address, store.uri, overrides, wait=not no_wait)
    if not as_json:
        click.echo(f"job {result['job']}: {result['status']}")
    return result


@verb(cli, "deploy")
@click.argument("file", metavar="DEPLOY.yaml")
@click.option("--address", help="The Ray cluster, e.g. `auto` on one of its nodes; else RAY_ADDRESS.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the file.")
def deploy(store: Store, as_json: bool, file: str, address: str | None, overrides: tuple[str, ...]) -> Any:
    """Put a released model behind an endpoint on a running cluster; it stays when this command ends."""
    import os

    from forge_ray import pipeline
    from forge_ray.cluster import connect
    from forge_ray.config.base import load
    from forge_ray.config.release import DeployConfig

    config = load(DeployConfig, file, overrides)
    if not (address or os.environ.get("RAY_ADDRESS")):
        raise ConfigError("no cluster to deploy on", hint="give --address auto on a node of it, or use `forge serve` here")
    connect(address)
    return pipeline.deploy(config, store)


@verb(cli, "serve")
@click.argument("file", metavar="DEPLOY.yaml")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the file.")
def serve(store: Store, as_json: bool, file: str, overrides: tuple[str, ...]) -> Any:
    """Serve a released model from this machine until Ctrl-C."""
    from forge_ray import pipeline
    from forge_ray.config.base import load
    from forge_ray.config.release import DeployConfig

    deployment = pipeline.deploy(load(DeployConfig, file, overrides), store)
    if as_json:
        click.echo(deployment.model_dump_json())
    _wait_for_ctrl_c(deployment.name)
    sys.exit(0)


def _wait_for_ctrl_c(name: str) -> None:
    import signal

    click.echo(f"serving {name!r} until Ctrl-C", err=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


@verb(cli, "chat")
@click.argument("text")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The endpoint.")
@click.option("--model", help="Name of the model; default: the first that the endpoint has.")
@click.option("--system", help="System message.")
@click.option("--max-tokens", default=256, show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
def chat(
    store: Store,
    as_json: bool,
    text: str,
    url: str,
    model: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
) -> Any:
    """Ask a served model one question."""
    from forge_ray.client import Client

    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    with Client(url) as client:
        answer = client.chat(model or client.models()[0], messages, max_tokens=max_tokens, temperature=temperature)
    if not as_json:
        click.echo(answer.text)
    return answer


@verb(cli, "lineage")
@click.argument("reference", metavar="ID|ALIAS|FINGERPRINT")
@click.option("--to", "goal", help="Print only the chain from ID to this one.")
@click.option("--rows", default=3, show_default=True, help="Training rows to show under a dataset.")
def lineage(store: Store, as_json: bool, reference: str, goal: str | None, rows: int) -> Any:
    """What something was made from, down to rows one can read, and what was made of it."""
    from forge_ray import lineage as trace
    from forge_ray.catalog import Catalog

    with Catalog(store) as index:
        if goal:
            chain = trace.path(index, reference, goal)
            if not as_json:
                click.echo(" — ".join(chain))
            return {"chain": chain}
        found = trace.lineage(index, reference, rows)
    if not as_json:
        click.echo("\n".join(trace.draw(found)))
    return found


@verb(catalog, "rebuild")
def catalog_rebuild(store: Store, as_json: bool) -> Any:
    """Drop the index and read every record and event of the store again."""
    from forge_ray.catalog import Catalog

    with Catalog(store) as index:
        count = index.rebuild()
    if not as_json:
        click.echo(f"{count} records and events")
    return {"indexed": count}


def main() -> None:
    cli(prog_name="forge")


if __name__ == "__main__":
    main()
