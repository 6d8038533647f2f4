"""`forge …`: every verb of the product, for people and for programs.

`--json` gives one JSON object on stdout; progress and messages go to stderr. Exit codes: 0 success, 1 the work failed,
2 invalid usage or settings, 3 refused by policy.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from forge_ray import __version__
from forge_ray.cli.alias import alias
from forge_ray.cli.audit import audit
from forge_ray.cli.catalog import catalog
from forge_ray.cli.cycles import CYCLES
from forge_ray.cli.data import data
from forge_ray.cli.doctor import DOCTOR
from forge_ray.cli.ends import show_exception
from forge_ray.cli.erase import ERASE
from forge_ray.cli.evaluate import EVALUATE
from forge_ray.cli.feedback import feedback
from forge_ray.cli.gateway import GATEWAY
from forge_ray.cli.init import INIT
from forge_ray.cli.keys import ACCESS
from forge_ray.cli.models import models
from forge_ray.cli.papers import PAPERS
from forge_ray.cli.policy import policy
from forge_ray.cli.reproduce import REPRODUCTION
from forge_ray.cli.runs import runs
from forge_ray.cli.serve import SERVING, wait_for_ctrl_c
from forge_ray.cli.store import store as store_group
from forge_ray.cli.terminal import echo
from forge_ray.cli.trace import TRACING
from forge_ray.cli.trust import TRUST
from forge_ray.cli.verbs import Verbs, load_run_file, run_file, verb
from forge_ray.errors import ConfigError
from forge_ray.store import paths

if TYPE_CHECKING:
    from forge_ray.config.run import RunConfig
    from forge_ray.store.files import Store

EXIT_CODES = "Exit codes: 0 success, 1 failure, 2 invalid usage or settings, 3 refused by policy."


SECTIONS = {
    "Start": ("quickstart", "init", "run"),
    "Data": ("data", "feedback"),
    "Train": ("plan", "train", "runs", "reproduce"),
    "Evaluate and release": ("eval", "release", "models", "diff", "export"),
    "Serve": ("serve", "deploy", "undeploy", "alias", "gateway", "chat"),
    "Access": ("keys", "usage"),
    "Governance": (
        "cycles",
        "trace",
        "lineage",
        "audit",
        "verify",
        "signers",
        "policy",
        "approve",
        "sign",
        "erase",
        "papers",
    ),
    "Cluster and store": ("submit", "store", "catalog", "doctor"),
}


@click.group(cls=Verbs, sections=SECTIONS, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="forge")
def cli() -> None:
    """Train your own language models on your own rows, on your own machines, and serve them."""


COMMANDS = (
    *INIT,
    models,
    data,
    feedback,
    runs,
    audit,
    *SERVING,
    *GATEWAY,
    alias,
    *ACCESS,
    *TRACING,
    *CYCLES,
    *ERASE,
    *TRUST,
    policy,
    *DOCTOR,
    *REPRODUCTION,
    EVALUATE,
    *PAPERS,
    catalog,
    store_group,
)
for command in COMMANDS:
    cli.add_command(command)


@verb(cli, "quickstart", "forge quickstart --store .forge")
@click.option(
    "--config",
    "file",
    default="jobs/quickstart.yaml",
    show_default=True,
    help="Run file. If it does not exist, the one of that name shipped with forge_ray is used.",
)
@click.option("--port", default=0, help="Port of the endpoint. 0: the run file's, or a free one.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the run file. Repeatable."
)
def quickstart(store: Store, as_json: bool, file: str, port: int, overrides: tuple[str, ...]) -> Any:
    """Run the whole pipeline on this machine with example rows.

    Builds a dataset, trains, evaluates, serves, asks one question and shows the lineage of the answer."""
    from forge_ray.cli import quickstart as quick

    result = quick.quickstart(quick.run_config(file, overrides), store, port)
    if not as_json:
        from forge_ray.cli.show import print_quickstart

        print_quickstart(result, store)
    return result


@verb(cli, "plan", "forge plan RUN.yaml --workers 4 --memory-gb 80")
@run_file
@click.option("--workers", default=0, help="Number of workers. 0: the run file's maximum.")
@click.option("--memory-gb", default=0.0, help="Memory per worker in GB. Default: detected from the cluster.")
@click.option("--tokens-per-s", default=0.0, help="Measured tokens per second of one worker, to estimate time and cost.")
@click.option("--cost-per-hour", default=0.0, help="Cost of one worker per hour, in any currency.")
@click.option(
    "--rows",
    default=0,
    metavar="N",
    help="Plan for N packed rows without reading data.",
)
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
    """Estimate steps, memory, disk and time of a run.

    Also the held-out rows that a gate with a confidence needs. Where base_model
    is a folder with config.json alone, the rows follow from the sizes of files.
    Exit code 2 if the run cannot fit, as `forge train` would end, or could not be evaluated, as `forge run` would."""
    from forge_ray import pipeline
    from forge_ray.cli.show import print_plan
    from forge_ray.evaluate.reports import refuse_empty_split
    from forge_ray.records import DatasetManifest
    from forge_ray.release.rows_needed import line, rows_needed_of
    from forge_ray.store.catalog import Catalog
    from forge_ray.train.preflight import Assumptions

    estimate = pipeline.plan(config, store, Assumptions(workers, memory_gb, tokens_per_s, cost_per_hour, rows))
    if not as_json:
        print_plan(estimate)
    if estimate.problem:
        raise ConfigError(estimate.problem, hint=estimate.remedy)
    if not estimate.is_assumed:
        with Catalog.read_only(store) as catalog:
            refuse_empty_split(catalog.get_as(DatasetManifest, estimate.dataset), config.eval)
    needed = rows_needed_of(config, store, "" if estimate.is_assumed else estimate.dataset)
    for one in needed if not as_json else ():
        echo(line(one, config.eval.split))
    return estimate.to_json() | {"gate": [asdict(one) for one in needed]}


FORCE = click.option("--force", is_flag=True, help="Start even if the plan predicts it will not fit.")


@verb(cli, "train", "forge train RUN.yaml --set train.seed=1")
@FORCE
@run_file
def train(store: Store, as_json: bool, config: RunConfig, force: bool) -> Any:
    """Train, or resume an unfinished run with the same settings.

    A run that cannot fit is refused (exit code 2)."""
    from forge_ray import pipeline
    from forge_ray.evaluate.reports import refuse_unusable

    refuse_unusable(config.eval)
    record = pipeline.train(_forced(config) if force else config, store)
    if not as_json:
        echo(f"metrics, loss curve, checkpoints and export: {store.place}/{paths.run(record.id)}")
    return record


def _forced(config: RunConfig) -> RunConfig:
    guards = config.train.guards.model_copy(update={"refuse_impossible": False})
    return config.model_copy(update={"train": config.train.model_copy(update={"guards": guards})})


@verb(cli, "release", "forge release RUN.yaml")
@run_file
def release(store: Store, as_json: bool, config: RunConfig) -> Any:
    """Check the trained model against the gates and register it.

    It is accepted and promoted, or rejected with the reasons (exit code 3)."""
    from forge_ray import pipeline
    from forge_ray.errors import PolicyError

    version = pipeline.release(config, store)
    if version.status == "rejected":
        raise PolicyError(f"{version.id} was rejected: {'; '.join(version.reasons)}", hint="it is registered, not promoted")
    return version


@verb(cli, "run", "forge run RUN.yaml")
@FORCE
@run_file
def run(store: Store, as_json: bool, config: RunConfig, force: bool) -> Any:
    """Run every stage: prepare, train, evaluate, release, deploy."""
    from forge_ray import pipeline
    from forge_ray.errors import PolicyError
    from forge_ray.machine.cluster import in_ray_job

    serves = config.deploy if not in_ray_job() and not as_json else None
    if serves:
        where = f"http://{serves.host}:{serves.port}/v1"
        echo(f"serves {serves.name!r} at its end on {where}, until Ctrl-C; without: --set deploy=null", err=True)
    outcome = pipeline.run(_forced(config) if force else config, store)
    if outcome.version.status == "rejected":
        reasons = "; ".join(outcome.version.reasons)
        raise PolicyError(f"{outcome.version.id} was rejected: {reasons}", hint="registered, not promoted, not deployed")
    if outcome.deployment:
        from forge_ray.serve.deploy import note_end

        try:
            if serves:
                wait_for_ctrl_c(outcome.deployment.name)
        finally:
            note_end(outcome.deployment, store)
    return outcome


@verb(cli, "submit", "forge submit RUN.yaml --address http://head:8265 --store /mnt/forge")
@click.argument("file", metavar="RUN.yaml")
@click.option("--address", required=True, help="URL of the cluster's dashboard, e.g. http://head:8265.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting of the run file. Repeatable."
)
@click.option("--no-wait", is_flag=True, help="Return as soon as the job is accepted.")
def submit(store: Store, as_json: bool, file: str, address: str, overrides: tuple[str, ...], no_wait: bool) -> Any:
    """Submit `forge run` as a Ray job to a cluster.

    All nodes must be able to read and write the store."""
    from forge_ray.cli.submit import submit as send

    config = load_run_file(file, overrides)  # reports a mistake here, not minutes later on the cluster
    result = send(file, config, address, store.uri, overrides, wait=not no_wait)
    if not as_json:
        echo(f"job {result['job']}: {result['status']}")
    return result


def main() -> None:
    sys.excepthook = show_exception
    cli(prog_name="forge")
