"""`forge erase`: erase rows and everything derived from them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import verb
from forge_ray.errors import ConfigError

if TYPE_CHECKING:
    from forge_ray.governance.erasure.options import Options
    from forge_ray.governance.erasure.plan import ErasurePlan
    from forge_ray.governance.erasure.search import ErasureRequest
    from forge_ray.store.files import Store

LINES = 20  # of a source file, or matches, are shown


@click.group()
def top() -> None:
    """Top-level verbs; `forge` registers them."""


ROWS = (
    click.option("--subject", default="", help="Value of the subject column; - reads it from standard input."),
    click.option("--key-file", default="", help="File with the HMAC key, if it is no longer where the run file named it."),
    click.option("--record", "records", multiple=True, metavar="rec_…", help="Id of a record. Repeatable."),
    click.option(
        "--answer",
        "answers",
        multiple=True,
        metavar="chatcmpl-…",
        help="Id of a kept answer or of its request; rows that were made of it go too. Repeatable.",
    ),
    click.option(
        "--file", "file", default="", metavar="ROWS", help="File of rows, in any format that data.sources accepts."
    ),
    click.option("--no-near-duplicates", is_flag=True, help="Keep near duplicates of the rows."),
    click.option(
        "--similarity",
        type=click.FloatRange(0.1, 1.0),
        help="Also erase rows of at least this Jaccard index of their runs of five words. Default: list those from 0.8 on.",
    ),
    click.option("--any-case", is_flag=True, help="With --subject: erase rows in whatever case the value is written."),
    click.option(
        "--keep", "keep", multiple=True, metavar="rec_…", help="Keep this variant or near duplicate of the rows. Repeatable."
    ),
)
HANDLING = (
    click.option(
        "--deployments",
        type=click.Choice(["retire", "mark"]),
        default="retire",
        show_default=True,
        help="retire: affected versions stop serving at once; mark: they serve until a replacement is released.",
    ),
    click.option(
        "--retrain",
        type=click.Choice(["all", "used", "none"]),
        default="all",
        show_default=True,
        help="Runs to repeat without the rows: all, only those that an alias routes to, or none.",
    ),
    click.option(
        "--remove-adapters",
        is_flag=True,
        help="Remove adapters whose base model is not affected, instead of retraining them.",
    ),
    click.option(
        "--keep-weights", is_flag=True, help="Keep the weights of affected versions in the store, blocked from use."
    ),
    click.option(
        "--wait",
        "wait_s",
        type=click.FloatRange(0),
        default=120.0,
        show_default=True,
        help="Seconds for trainings to end and for endpoints to let go of weights.",
    ),
    click.option(
        "--stopped",
        multiple=True,
        metavar="dep_…",
        help="Deployment that no longer exists; the certificate says that it is your word. Repeatable.",
    ),
)


def _request(
    subject: str,
    key_file: str,
    records: tuple[str, ...],
    answers: tuple[str, ...],
    file: str,
    no_near_duplicates: bool,
    similarity: float | None,
    any_case: bool,
    keep: tuple[str, ...],
) -> ErasureRequest:
    from pathlib import Path

    from forge_ray.errors import NotFound
    from forge_ray.governance.erasure.search import ErasureRequest

    if sum(map(bool, (subject, records, answers, file))) != 1:
        raise ConfigError(
            "give --subject, --record, --answer or --file (exactly one)", hint="forge erase --record rec_… --plan"
        )
    if key_file and not subject:
        raise ConfigError("--key-file needs --subject", hint="leave it out")
    if any_case and not subject:
        raise ConfigError("--any-case needs --subject", hint="leave it out: rows match in any case")
    if no_near_duplicates and similarity is not None:
        raise ConfigError("--similarity finds near duplicates, and --no-near-duplicates keeps them", hint="give one of them")
    choices: dict[str, Any] = {"near_duplicates": not no_near_duplicates, "similarity": similarity}
    choices["keep"] = tuple(sorted(set(keep)))
    if subject:
        if subject == "-":  # an argument would stay in the shell's history
            subject = sys.stdin.read().strip()
        return ErasureRequest("subject", (subject,), key_file=key_file, any_case=any_case, **choices)
    if file and not Path(file).is_file():
        raise NotFound(f"no file {file}", hint="give a file of rows, in any format that data.sources accepts")
    if file:
        return ErasureRequest("file", (file,), **choices)
    if answers:
        return ErasureRequest("answer", tuple(sorted(set(answers))), **choices)
    return ErasureRequest("record", tuple(sorted(set(records))), **choices)


def _rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that select the rows, as `request`."""

    @functools.wraps(function)
    def command(**arguments: Any) -> Any:
        names = ("subject", "key_file", "records", "answers", "file", "no_near_duplicates", "similarity", "any_case", "keep")
        selection = {name: arguments.pop(name) for name in names}
        return function(request=_request(**selection), **arguments)

    for option in reversed(ROWS):
        command = option(command)
    return command


def _handling(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of how affected runs, versions and deployments are handled, as `options`."""

    @functools.wraps(function)
    def command(**arguments: Any) -> Any:
        from forge_ray.governance.erasure.options import Options

        names = ("deployments", "retrain", "remove_adapters", "keep_weights", "wait_s", "stopped")
        return function(options=Options(**{name: arguments.pop(name) for name in names}), **arguments)

    for option in reversed(HANDLING):
        command = option(command)
    return command


@verb(top, "erase", "forge erase --file rows.jsonl --plan")
@_rows
@click.option("--plan", "plan_only", is_flag=True, help="Show what would change, and change nothing.")
@click.option("--apply", "apply", is_flag=True, help="Erase. After an interruption, the same command resumes.")
@_handling
@click.option("--why", default="", help="Reason, kept in the audit log and in the certificate.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
def erase(
    store: Store,
    as_json: bool,
    request: ErasureRequest,
    plan_only: bool,
    apply: bool,
    options: Options,
    why: str,
    yes: bool,
) -> Any:
    """Erase rows and everything derived from them.

    --plan shows the impact; --apply deletes, retrains, and writes a certificate."""
    from forge_ray.governance.erasure.apply import begun
    from forge_ray.governance.erasure.apply import erase as run
    from forge_ray.governance.erasure.plan import plan_of
    from forge_ray.governance.erasure.search import search
    from forge_ray.store.catalog import Catalog

    if plan_only == apply:
        raise ConfigError("give --plan or --apply (exactly one)", hint="--plan changes nothing")
    with Catalog.read_only(store) as catalog:
        unfinished = begun(catalog, request)
        plan = unfinished or plan_of(catalog, search(catalog, request))
    if plan_only:
        if not as_json:
            show(plan, begun=unfinished is not None)
        return plan.model_dump(mode="json") | {"worker_hours": plan.worker_hours, "gpu_hours": plan.gpu_hours}
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise ConfigError(
                "--apply deletes irrevocably, and there is no terminal to ask for confirmation", hint="add --yes"
            )
        show(plan, begun=unfinished is not None)
        click.confirm("Erase this?", abort=True)
    statement = run(store, request, options, why)
    if not as_json:
        predicate = statement["predicate"]
        for name, lines in predicate["remains"]["source files"].items():
            echo(f"outside the store, remove it yourself: {name}, {_lines(lines)}")
        for copy in predicate["remains"].get("copies that left the store", ()):
            echo(_left(copy))
        for rows in predicate["remains"].get("rows that were sent to other systems", ()):
            echo(_sent(rows))
        for name, content in predicate["remains"].get("files that forge_ray did not write", {}).items():
            echo(f"not written by forge_ray, look at it yourself: {name} ({content})")
        for name, reason in predicate["remains"].get("outside the store", {}).items():
            echo(f"outside the store: {name}: {reason}")
        echo(f"{store.place}/erasures/{predicate['erasure']}/certificate.json")
    return statement


def show(plan: ErasurePlan, begun: bool) -> None:
    """Print the plan."""
    from forge_ray.cli.show import print_table

    state = " (already started)" if begun else ""
    echo(f"{plan.num_records} records, {plan.num_near_duplicates} near duplicates of them{state}")
    if plan.num_answers:
        echo(f"{plan.num_answers} answers that endpoints keep")
    if plan.variants:
        matches = [(v.record, v.why, "erased" if v.erased else "stays", " ".join(v.where)) for v in plan.variants[:LINES]]
        title = f"{len(plan.variants)} matches that are not equal; --keep rec_… keeps one"
        print_table(title, ("record", "why", "", "datasets"), matches)
    if plan.datasets:
        rows = [(d.id, d.name, ", ".join(f"{split} {count}" for split, count in d.held.items())) for d in plan.datasets]
        print_table("Datasets to rebuild", ("dataset", "name", "records in"), rows)
    if plan.runs:
        runs = [
            (
                run.id,
                run.name,
                f"{run.steps} of {run.num_steps}" + (f" ({run.first_step}..{run.last_step})" if run.steps else ""),
                "retrained" if run.used and run.finished else "removed" if run.used else "kept: not trained on the rows",
                f"{run.worker_hours:.2f}",
            )
            for run in plan.runs
        ]
        print_table("Runs", ("run", "name", "steps with the rows", "action", "worker hours"), runs)
    if plan.versions:
        aliases = {v: ", ".join(n for n, hit in plan.aliases.items() if v in hit) for v in (one.id for one in plan.versions)}
        versions = [(v.id, v.name, v.status, v.weights, aliases[v.id]) for v in plan.versions]
        print_table("Model versions to withdraw", ("version", "name", "status", "weights", "aliases"), versions)
    for deployment in plan.deployments:
        state = ", ".join(filter(None, (deployment.state, deployment.seen)))
        echo(f"{deployment.id} {deployment.name} ({state}) serves {', '.join(deployment.versions)}")
    for report in plan.evals:
        about = f"{report.quotes} items about the rows" if report.quotes else "answers or labels derived from them"
        echo(f"evaluation {report.id} of {report.subject}: {about}")
    for name, lines in plan.outside.items():
        echo(f"outside the store, remove it yourself: {name}, {_lines(lines)}")
    for copy in plan.exported:
        echo(_left(copy.model_dump()))
    for sent in plan.sent:
        echo(_sent(sent.model_dump()))
    for note in plan.notes:
        echo(f"note: {note}")
    echo(f"retraining: {plan.worker_hours:.2f} worker hours, {plan.gpu_hours:.2f} GPU hours, estimated from the first runs")


def _left(copy: Mapping[str, Any]) -> str:
    """A line about a copy that left the store."""
    about = f"{copy['form']} of {copy['version']}, written at {copy['at'][:19]} by {copy['by']}"
    return f"left the store, remove it yourself: {copy['to']} ({about})"


def _sent(rows: Mapping[str, Any]) -> str:
    """A line about rows that were sent to another system."""
    from forge_ray.store.disclosures import SentRows

    return f"left the premises, ask for deletion there, they may be among them: {SentRows.model_validate(dict(rows))}"


def _lines(lines: Sequence[int]) -> str:
    return f"line {', '.join(map(str, lines[:LINES]))}{' …' if len(lines) > LINES else ''}"


ERASE = (*top.commands.values(),)
