"""`forge runs …`: list, show and compare training runs; export and authenticate checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb

if TYPE_CHECKING:
    from forge_ray.store.files import Store


@click.group(cls=Verbs)
def runs() -> None:
    """List, show, compare, export and authenticate training runs."""


@verb(runs, "list", "forge runs list")
def runs_list(store: Store, as_json: bool) -> Any:
    """List the training runs, and what changed between them.

    Each run is shown with its state, its score and the gain over the run before it."""
    from forge_ray.cli.show import print_table
    from forge_ray.release.compare_runs import attempts, listed
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        entries = listed(attempts(index))
    if not as_json:
        header = ("run", "state", "name", "steps", "score", "change", "verdict", "changed", "since (UTC)")
        rows = []
        for r in entries:
            score = f"{r['metric']} {r['score']:.4g}" if r["score"] is not None else ""
            gain = f"{r['gain']:+.4g}" if r["gain"] is not None else ""
            rows.append(
                (r["id"], r["state"], r["name"], r["steps"], score, gain, r["verdict"], r["changed_in_words"], r["at"][:16])
            )
        print_table("Runs", header, rows)
    return entries


@verb(runs, "show", "forge runs show run_0123456789abcdef")
@click.argument("run_id", metavar="run_…")
def runs_show(store: Store, as_json: bool, run_id: str) -> Any:
    """Show the starts, checkpoints and incidents of a run."""
    from forge_ray.errors import NotFound
    from forge_ray.store import paths
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.removed import why_absent
    from forge_ray.train.diagnosis import facts, overview

    run = facts(store, run_id)
    with Catalog.read_only(store) as catalog:
        below = [path for path in catalog.subjects("removal") if path.startswith(f"{paths.run(run_id)}/")]
        reasons = {path: why_absent(catalog.standing, path) for path in below}
    run["removed"] = {path: reason for path, reason in reasons.items() if reason}
    if not run["starts"]:
        raise NotFound(f"{run_id!r} has never started", hint="`forge runs list` shows the runs of this store")
    if not as_json:
        echo(overview(run))
        for path, reason in run["removed"].items():
            echo(f"{path}: {reason}")
    return run


@verb(runs, "export", "forge runs export run_0123456789abcdef --step best")
@click.argument("run_id", metavar="run_…")
@click.option(
    "--step", default="last", show_default=True, help="Checkpoint step, `best` (lowest validation loss) or `last`."
)
def runs_export(store: Store, as_json: bool, run_id: str, step: str) -> Any:
    """Export a checkpoint as a model version (candidate).

    The run may be unfinished. The version can be served by its id, but never behind an alias."""
    from forge_ray.machine.shipped import here_or_shipped
    from forge_ray.release.candidates import export_run

    version = export_run(store, run_id, step)
    if not as_json:
        echo(f"serve it: forge serve {here_or_shipped('jobs/deploy.yaml')} --set 'models=[{version.id}]'")
    return version


@verb(runs, "authenticate", "forge runs authenticate run_0123456789abcdef")
@click.argument("run_id", metavar="run_…")
def runs_authenticate(store: Store, as_json: bool, run_id: str) -> Any:
    """Authenticate checkpoints that an earlier version wrote.

    Only checkpoints whose manifest was made with the store's key are resumed, validated and exported. Their files are
    verified first; you answer for nobody else having written to the run's folder."""
    from forge_ray.errors import NotFound
    from forge_ray.train.checkpoint import authenticate, steps

    published = steps(store, run_id)
    if not published:
        raise NotFound(f"{run_id!r} has no checkpoint", hint="`forge runs list` shows the runs of this store")
    added = authenticate(store, run_id)
    if not as_json:
        echo(f"{len(added)} of {len(published)} checkpoints had no authentication and have one now")
    return {"run": run_id, "authenticated": added, "checkpoints": sorted(published)}


@verb(runs, "compare", "forge runs compare run_0123456789abcdef run_fedcba9876543210")
@click.argument("run_ids", metavar="run_… run_… …", nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write to FILE.png, or to FILE.html with a table of the differences.",
)
def runs_compare(store: Store, as_json: bool, run_ids: tuple[str, ...], out: Path | None) -> Any:
    """Plot the loss curves of several runs and compare scores.

    Also lists the settings in which the runs differ."""
    from forge_ray.cli.show import print_table
    from forge_ray.release.compare_runs import compare, table
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        comparison, target = compare(index, run_ids, out)
    header, *rows = table(comparison)
    if not as_json:
        print_table("Runs compared", tuple(header), rows)
        echo(f"written: {target}")
    return {"file": str(target), "runs": header[1:], "table": {row[0]: row[1:] for row in rows}}
