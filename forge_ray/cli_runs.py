"""`forge runs …`: what was trained, how it went, and a checkpoint of it to serve (level 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from forge_ray.verbs import Verbs, verb

if TYPE_CHECKING:
    from forge_ray.store import Store


@click.group(cls=Verbs)
def runs() -> None:
    """Training runs: list, show, export."""


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
    from forge_ray.candidates import export_run

    version = export_run(store, run_id, step)
    if not as_json:
        click.echo(f"serve it: forge serve jobs/deploy.yaml --set model={version.id}")
    return version
