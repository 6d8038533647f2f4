"""`forge …`: every verb of the product, for people and for programs.

`--json` gives one JSON object on stdout; progress and messages go to stderr. Exit codes: 0 success, 1 the work failed,
2 a mistake of the user, 3 refused by policy.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from forge_ray import __version__
from forge_ray.cli.alias import alias
from forge_ray.cli.audit import audit
from forge_ray.cli.data import data
from forge_ray.cli.doctor import DOCTOR
from forge_ray.cli.erase import ERASE
from forge_ray.cli.gateway import GATEWAY
from forge_ray.cli.keys import ACCESS
from forge_ray.cli.papers import PAPERS
from forge_ray.cli.reproduce import REPRODUCTION
from forge_ray.cli.runs import runs
from forge_ray.cli.serve import SERVING, wait_for_ctrl_c
from forge_ray.cli.trace import TRACING
from forge_ray.cli.trust import TRUST
from forge_ray.cli.verbs import Verbs, load_run_file, run_file, verb
from forge_ray.errors import TrainingError
from forge_ray.store import paths

if TYPE_CHECKING:
    from forge_ray.config.run import RunConfig
    from forge_ray.store.files import Store

EXIT_CODES = "Exit codes: 0 success, 1 the work failed, 2 a mistake in what was asked, 3 refused by policy."


@click.group(cls=Verbs, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="forge")
def cli() -> None:
    """Train your own language models on your own rows, on your own machines, and serve them."""


@cli.group(cls=Verbs)
def models() -> None:
    """Base models and trained versions: import, list, show, promote."""


cli.add_command(data)


cli.add_command(runs)
cli.add_command(audit)
COMMANDS = (
    *SERVING,
    *GATEWAY,
    alias,
    *ACCESS,
    *TRACING,
    *ERASE,
    *TRUST,
    *DOCTOR,
    *REPRODUCTION,
    *PAPERS,
)
for command in COMMANDS:
    cli.add_command(command)


@cli.group(cls=Verbs)
def catalog() -> None:
    """The index over the store."""


@verb(cli, "quickstart")
@click.option(
    "--config",
    "file",
    default="jobs/quickstart.yaml",
    show_default=True,
    help="The run file; where there is none of that name, the one that comes with forge_ray.",
)
@click.option("--port", default=0, help="Port of the endpoint; 0: the run file's, or a free one.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the run file.")
def quickstart(store: Store, as_json: bool, file: str, port: int, overrides: tuple[str, ...]) -> Any:
    """The whole path on this machine: rows, training, evaluation, endpoint, lineage."""
    from forge_ray.cli import quickstart as quick

    shown = quick.quickstart(quick.run_config(file, overrides), store, port)
    if not as_json:
        from forge_ray.cli.show import print_quickstart

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

    from forge_ray.models.import_model import import_model
    from forge_ray.progress import stage
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index, stage("import") as it:
        version = import_model(index, path, name or Path(path).stem.lower(), licence, alias)
        it.done(f"{version.id}  {version.name}{f' ← {alias}' if alias else ''}")
        return version


@verb(models, "list")
def models_list(store: Store, as_json: bool) -> Any:
    """Every model version, with its aliases and scores."""
    from forge_ray.cli.show import models as listed
    from forge_ray.cli.show import print_table
    from forge_ray.store.catalog import Catalog

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
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.resolve import resolve

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
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        version = index.promote(reference, alias)
    if not as_json:
        click.echo(f"{alias} → {version.id}")
    return {"alias": alias, "model_version": version.id}


@verb(models, "archive")
@click.argument("reference", metavar="VERSION|ALIAS")
def models_archive(store: Store, as_json: bool, reference: str) -> Any:
    """Take a version out of use: endpoints answer 410 for it, or by the alias's fallback. `models restore` takes it back."""
    return _archived(store, as_json, reference, restore=False)


@verb(models, "restore")
@click.argument("reference", metavar="VERSION|ALIAS")
def models_restore(store: Store, as_json: bool, reference: str) -> Any:
    """Bring an archived version back into use."""
    return _archived(store, as_json, reference, restore=True)


def _archived(store: Store, as_json: bool, reference: str, restore: bool) -> Any:
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        version = index.archive(reference, restore)
    state = "active" if restore else "archived"
    if not as_json:
        click.echo(f"{version.id} {state}")
    return {"model_version": version.id, "state": state}


@verb(cli, "plan")
@run_file
@click.option("--workers", default=0, help="Number of workers; 0: what the run file asks for at most.")
@click.option("--memory-gb", default=0.0, help="Room of one worker; 0: what the cluster says.")
@click.option("--tokens-per-s", default=0.0, help="Measured speed of one worker, for time and cost.")
@click.option("--cost-per-hour", default=0.0, help="Of one worker, in any currency.")
@click.option("--rows", default=0, help="Plan for so many full rows without their data; a folder with config.json will do.")
def plan(
    store: Store,
    as_json: bool,
    config: RunConfig,
    workers: int,
    memory_gb: float,
    tokens_per_s: float,
    cost_per_hour: float,
    rows: int,
) -> Any:
    """Steps, tokens, memory, disk, time of a run before anything is taken; what cannot fit ends with exit 1."""
    from forge_ray import pipeline
    from forge_ray.cli.show import print_plan

    found = pipeline.plan(config, store, workers, memory_gb, tokens_per_s, cost_per_hour, rows)
    if not as_json:
        print_plan(found)
    if found["problem"]:
        raise TrainingError(found["problem"], hint=found["remedy"])
    return found


FORCE = click.option("--force", is_flag=True, help="Start what the plan says cannot fit.")


@verb(cli, "train")
@FORCE
@run_file
def train(store: Store, as_json: bool, config: RunConfig, force: bool) -> Any:
    """Train as the run file says; an unfinished run of the same settings is resumed. What cannot fit is refused (exit 2)."""
    from forge_ray import pipeline

    record = pipeline.train(_forced(config) if force else config, store)
    if not as_json:
        click.echo(f"metrics, loss curve, checkpoints and export: {store.place}/{paths.run(record.id)}")
    return record


def _forced(config: RunConfig) -> RunConfig:
    guards = config.train.guards.model_copy(update={"refuse_impossible": False})
    return config.model_copy(update={"train": config.train.model_copy(update={"guards": guards})})


@verb(cli, "eval")
@run_file
def evaluate(store: Store, as_json: bool, config: RunConfig) -> Any:
    """Score the base model and the trained one on the same held-out rows."""
    from forge_ray import pipeline

    base, tuned = pipeline.evaluate(config, store)
    if not as_json:
        from forge_ray.cli.show import comparison, print_table

        print_table(f"Held-out {tuned.split} rows: {tuned.num_examples}", ("", "base", "tuned", ""), comparison(base, tuned))
        click.echo(f"items and confusion matrix: {store.place}/{paths.report(tuned.id)}")
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
@FORCE
@run_file
def run(store: Store, as_json: bool, config: RunConfig, force: bool) -> Any:
    """Every stage of a run file: prepare, train, evaluate, release, deploy."""
    from forge_ray import pipeline
    from forge_ray.errors import PolicyError
    from forge_ray.machine.cluster import in_ray_job

    outcome = pipeline.run(_forced(config) if force else config, store)
    if outcome.version.status == "rejected":
        reasons = "; ".join(outcome.version.reasons)
        raise PolicyError(f"{outcome.version.id} was rejected: {reasons}", hint="registered, not promoted, not deployed")
    if outcome.deployment and not in_ray_job() and not as_json:
        wait_for_ctrl_c(outcome.deployment.name)
    return outcome


@verb(cli, "submit")
@click.argument("file", metavar="RUN.yaml")
@click.option("--address", required=True, help="The cluster's dashboard, e.g. http://head:8265.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the run file.")
@click.option("--no-wait", is_flag=True, help="Return once the job is accepted.")
def submit(store: Store, as_json: bool, file: str, address: str, overrides: tuple[str, ...], no_wait: bool) -> Any:
    """`forge run` as a Ray job on a cluster; the store must be a place that all nodes share."""
    from forge_ray.cli.submit import submit as send

    load_run_file(file, overrides)  # a mistake is told here, not minutes later on the cluster
    result = send(file, address, store.uri, overrides, wait=not no_wait)
    if not as_json:
        click.echo(f"job {result['job']}: {result['status']}")
    return result


@verb(catalog, "rebuild")
def catalog_rebuild(store: Store, as_json: bool) -> Any:
    """Drop the index and read every record and event of the store again."""
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        count = index.rebuild()
    if not as_json:
        click.echo(f"{count} records and events")
    return {"indexed": count}


def main() -> None:
    cli(prog_name="forge")
