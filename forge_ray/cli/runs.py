"""`forge runs …`: what was trained, how it went, how attempts compare, and a checkpoint of one to serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.verbs import Verbs, verb

if TYPE_CHECKING:
    from forge_ray.store.files import Store


@click.group(cls=Verbs)
def runs() -> None:
    """Training runs: list, show, export, compare."""


@verb(runs, "list")
def runs_list(store: Store, as_json: bool) -> Any:
    """Every training run that has started: its state, what changed against the one before, and what that brought."""
    from forge_ray.cli.show import print_table
    from forge_ray.release.compare_runs import attempts, listed
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        found = listed(attempts(index))
    if not as_json:
        header = ("run", "state", "name", "steps", "score", "change", "verdict", "changed", "since (UTC)")
        rows = []
        for r in found:
            score = f"{r['metric']} {r['score']:.4g}" if r["score"] is not None else ""
            gain = f"{r['gain']:+.4g}" if r["gain"] is not None else ""
            rows.append(
                (r["id"], r["state"], r["name"], r["steps"], score, gain, r["verdict"], r["changed_in_words"], r["at"][:16])
            )
        print_table("Runs", header, rows)
    return found


@verb(runs, "show")
@click.argument("run_id", metavar="run_…")
def runs_show(store: Store, as_json: bool, run_id: str) -> Any:
    """One run: its starts, checkpoints, incidents; finished or not."""
    from forge_ray.errors import NotFound
    from forge_ray.train.diagnosis import facts, overview

    found = facts(store, run_id)
    if not found["starts"]:
        raise NotFound(f"{run_id!r} has never started", hint="`forge runs list` shows the runs of this store")
    if not as_json:
        click.echo(overview(found))
    return found


@verb(runs, "export")
@click.argument("run_id", metavar="run_…")
@click.option("--step", default="", help="Of the checkpoint; `best`: the lowest validation loss; default: the newest.")
def runs_export(store: Store, as_json: bool, run_id: str, step: str) -> Any:
    """A checkpoint of a run, finished or not → a model version (candidate): served by its id, never behind an alias."""
    from forge_ray.machine.shipped import here_or_shipped
    from forge_ray.release.candidates import export_run

    version = export_run(store, run_id, step)
    if not as_json:
        click.echo(f"serve it: forge serve {here_or_shipped('jobs/deploy.yaml')} --set 'models=[{version.id}]'")
    return version


@verb(runs, "compare")
@click.argument("run_ids", metavar="run_… run_… …", nargs=-1, required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="FILE.png, or FILE.html with the differences.")
def runs_compare(store: Store, as_json: bool, run_ids: tuple[str, ...], out: Path | None) -> Any:
    """Loss curves and scores of several runs in one picture, and what differs between them."""
    from forge_ray.cli.show import print_table
    from forge_ray.release.compare_runs import compare, table
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        found, target = compare(index, run_ids, out)
    header, *rows = table(found)
    if not as_json:
        print_table("Runs compared", tuple(header), rows)
        click.echo(f"written: {target}")
    return {"file": str(target), "runs": header[1:], "table": {row[0]: row[1:] for row in rows}}
