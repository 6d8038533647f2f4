"""`forge trace` and `forge lineage`: which models a row reached, and what an artifact was derived from."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo, one_line
from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import EXIT_FAILED, ConfigError

if TYPE_CHECKING:
    from forge_ray.governance.trace import RecordPlace, Traced
    from forge_ray.store.files import Store

verbs = Verbs()
SHOWN = 20  # records that are printed in full


@verb(verbs, "trace", "forge trace --file rows.jsonl")
@click.argument("records", metavar="[rec_…]", nargs=-1)
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="ROWS",
    help="File of rows, in any format that data.sources accepts. Repeatable.",
)
@click.option("--subject", default="", help="Value of the subject column; - reads it from standard input.")
def trace(store: Store, as_json: bool, records: tuple[str, ...], files: tuple[str, ...], subject: str) -> Any:
    """Find everything that used a record: datasets, runs, models.

    Lists dataset versions, runs with their steps, model versions, aliases and deployments."""
    from forge_ray.governance import trace as tracer
    from forge_ray.store.catalog import Catalog

    if not (records or files or subject):
        raise ConfigError("forge trace needs a record id, --file or --subject", hint="forge trace rec_…")
    if subject == "-":  # an argument would stay in the shell's history
        subject = sys.stdin.read().strip()
    with Catalog.read_only(store) as index:
        queries = [tracer.of_record(record) for record in records]
        queries += [query for file in files for query in tracer.of_file(index, file)]
        queries += [tracer.of_subject_value(index, subject)] if subject else []
        traced = tracer.trace(index, queries)
    if not as_json:
        echo("\n".join(map(one_line, lines(traced))))
    if traced.broken:  # the answer is printed, but it is incomplete
        if as_json:
            from forge_ray.cli.job import as_json as plain

            echo(json.dumps(plain(asdict(traced)), ensure_ascii=False))
        sys.exit(EXIT_FAILED)
    return asdict(traced)


def lines(traced: Traced) -> Iterator[str]:
    """The result as lines of text."""
    for query in traced.queries:
        if query.asked in traced.nowhere:
            yield f"{query.asked}: {query.note or f'no dataset version holds it ({traced.num_datasets} searched)'}"
        elif query.asked not in query.records and len(query.records) > 1:
            yield f"{query.asked}: {len(query.records)} records"
        if query.unsearched:
            count = f"{len(query.unsearched)} of {traced.num_datasets} dataset versions"
            yield f"  {count} cannot be searched: no data.subject, or no sources"
    for reason in traced.broken.values():
        yield f"not searched: {reason}"
    for one in traced.records[:SHOWN]:
        asked = [name for name in one.asked if name != one.record]
        yield one.record + (f"  ({', '.join(asked[:3])})" if asked else "")
        branches = [f"{'  '.join(_held(held))}" for held in one.held]
        branches += [f"alike: {'  '.join(_held(held))}, {held.relation}" for held in one.alike]
        branches += [_used(use) for use in one.uses]
        yield from _tree(branches)
    if len(traced.records) > SHOWN:
        yield f"… and {len(traced.records) - SHOWN} more records (--json lists all)"
    if traced.records:
        reached = traced.reached
        branches = [f"run         {run.run}  {run.name}: {run.state}, {_how(run.how)}" for run in reached.runs]
        branches += [
            f"version     {v.version}  {v.name}: {v.status}{', archived' if v.archived else ''}, {_how(v.how)}"
            for v in reached.versions
        ]
        branches += [
            f"alias       {a.alias} → {a.version}  since {a.since[:19]}"
            + (f", until {a.until[:19]}" if a.until else ", now")
            for a in reached.aliases
        ]
        branches += [
            f"deployment  {d.deployment}  {d.name}: {_up(d.live, d.state, d.seen)}, {', '.join(d.versions)}"
            for d in reached.deployments
        ]
        branches += [f"report      {e.report}  on {e.dataset} {e.how}, of {e.subject}" for e in reached.evals]
        branches += [
            f"copy        left the store: {c.to}  {c.form} of {c.version}, at {c.at[:19]} by {c.by}"
            for c in reached.exported
        ]
        branches += [f"sent        left the premises, it may be among them: {rows}" for rows in reached.sent]
        yield "derived from it" if branches else "nothing was derived from it: no run used a row with it"
        yield from _tree(branches)


def _up(live: bool, state: str, seen: str) -> str:
    """The state in words; `crashed` is one whose process ended without an event, `silent` one that was not seen lately."""
    if live:
        return f"up, {seen}" if seen else "up, by its last event"
    return "replaced" if state == "running" else f"{state}, {seen}" if seen else state


def _tree(branches: list[str]) -> Iterator[str]:
    for number, branch in enumerate(branches):
        yield f"{'└─' if number == len(branches) - 1 else '├─'} {branch}"


def _held(held: RecordPlace) -> tuple[str, ...]:
    place = held.place
    where = f"{place.file}:{place.line}" if place.file else "not in this version under this id"
    split = f"dropped: {place.reason}" if place.split == "dropped" else place.split
    return (*((place.record,) if held.relation else ()), f"{held.dataset}  {held.name}", split, where)


def _used(use: Any) -> str:
    from forge_ray.governance.uses import ranges

    if use.how == "validated":
        return f"{use.run} validated on its split" + (" and selected by it" if use.decided else "")
    if not use.exact:
        return f"{use.run} may have trained on it: its settings are missing"
    out = f"; left out of {ranges([step for step, _ in use.left_out])}" if use.left_out else ""
    return f"{use.run} trained on it at step {ranges(use.steps)}{out}" if use.steps else f"{use.run}{out}"


def _how(how: str) -> str:
    meanings = {
        "trained": "trained on it",
        "chosen": "selected by a validation on it",
        "base": "started from a version trained on it",
        "frozen": "learned from a teacher or reference trained on it",
    }
    return meanings[how]


@verb(verbs, "lineage", "forge lineage support@prod --html lineage.html")
@click.argument("reference", metavar="ID|ALIAS|FINGERPRINT")
@click.option("--to", "goal", help="Print only the chain from ID to this object.")
@click.option("--rows", default=3, show_default=True, help="Training rows to show for each dataset.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the graph as SVG.")
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the graph as an HTML page."
)
def lineage(
    store: Store, as_json: bool, reference: str, goal: str | None, rows: int, svg: Path | None, html: Path | None
) -> Any:
    """Show what an object was derived from, down to its rows.

    Also shows what was derived from it."""
    from forge_ray.governance import lineage as trace
    from forge_ray.governance import lineage_page
    from forge_ray.store.catalog import Catalog

    if goal and (svg or html):
        raise ConfigError("--to prints one chain; --svg and --html draw the whole graph", hint="leave out one of them")
    with Catalog.read_only(store) as index:
        if goal:
            chain = trace.path(index, reference, goal)
            if not as_json:
                echo(one_line(" — ".join(chain)))
            return {"chain": chain}
        tree = trace.lineage(index, reference, rows)
        if svg or html:
            graph = lineage_page.graph_of(index, tree)
            for target, content in ((svg, lineage_page.svg), (html, lineage_page.page)):
                if target:
                    target.write_text(content(graph), encoding="utf-8")
                    echo(f"written: {target}", err=True)
    if not as_json:
        echo("\n".join(map(one_line, trace.draw(tree))))
    return tree


TRACING = tuple(verbs.commands.values())
