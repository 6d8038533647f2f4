"""`forge feedback …`: rows for the next cycle from ratings and corrections."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import DataError

if TYPE_CHECKING:
    from forge_ray.feedback.importing import Import
    from forge_ray.feedback.rows import Contradictions, Form
    from forge_ray.store.files import Store

LISTED = 20  # entries that are not used are printed


@click.group(cls=Verbs)
def feedback() -> None:
    """Turn what an application collected into rows for the next cycle."""


@verb(feedback, "import", "forge feedback import ratings.jsonl --out rows.jsonl")
@click.argument("files", metavar="FILE…", nargs=-1, required=True)
@click.option("--out", required=True, metavar="ROWS.jsonl", help="File of rows to write.")
@click.option(
    "--form",
    type=click.Choice(["chat", "preference", "feedback"]),
    default="chat",
    show_default=True,
    help="chat: better answers, and answers rated good; preference: pairs of a better answer and the one that was rated;"
    " feedback: answers with their verdict.",
)
@click.option("--good-from", type=float, metavar="N", help="Stars from which an answer counts as good; below it is bad.")
@click.option(
    "--contradictions",
    type=click.Choice(["leave-out", "majority"]),
    default="leave-out",
    show_default=True,
    help="Opposite verdicts on one answer: leave it out, or take the verdict of the majority.",
)
@click.option(
    "--max-invalid",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Maximum share of entries that cannot be read or joined; above it no rows are written (exit code 1).",
)
@click.option("--force", is_flag=True, help="Replace existing files.")
def feedback_import(
    store: Store,
    as_json: bool,
    files: tuple[str, ...],
    out: str,
    form: Form,
    good_from: float | None,
    contradictions: Contradictions,
    max_invalid: float,
    force: bool,
) -> Any:
    """Write rows from ratings and corrections of answers.

    An entry names an answer that the endpoint kept (deploy.keep_answers), or holds the conversation itself. What is not
    used is listed in ROWS.jsonl.unused, with the reason."""
    from dataclasses import asdict

    from forge_ray.cli.new_file import require_new, write_new
    from forge_ray.feedback.importing import import_feedback, lines_of
    from forge_ray.progress import stage
    from forge_ray.store.catalog import Catalog

    target, unused = Path(out), Path(f"{out}.unused")
    require_new(target, force)
    if os.path.lexists(target):  # else it is what an import left that wrote no rows
        require_new(unused, force)
    with Catalog.read_only(store) as catalog, stage("feedback") as it:
        imported = import_feedback(catalog, files, form, good_from, contradictions, it)
        it.done(f"{imported.num_entries} entries, {len(imported.rows)} rows, {len(imported.unused)} not used")
    write_new(unused, lines_of(map(asdict, imported.unused)), force=True)
    share = imported.num_invalid / imported.num_entries if imported.num_entries else 0.0
    if not as_json:
        _print(imported, unused)
    if share > max_invalid:
        raise DataError(
            f"{imported.num_invalid} of {imported.num_entries} entries cannot be read or joined"
            f" ({share:.1%}, --max-invalid is {max_invalid:.1%}): {_first_reason(imported)}",
            hint=f"no rows were written; {unused} lists each entry with its reason."
            + (" --max-invalid 1 writes the others" if imported.rows else " The other entries give no row either"),
        )
    if not imported.rows:
        raise DataError(
            f"none of {imported.num_entries} entries gives a row of form {form}",
            hint=f"{unused} lists each entry with its reason",
        )
    write_new(target, lines_of(imported.rows), force)
    if not as_json:
        echo(f"{out}: {len(imported.rows)} rows of form {form}")
    return {
        "out": out,
        "unused": str(unused),
        "form": form,
        "entries": imported.num_entries,
        "rows": len(imported.rows),
        "invalid": imported.num_invalid,
        "reasons": imported.reasons,
        "columns_not_read": dict(imported.unread),
        "conversations_that_begin_differently": imported.num_divided,
        "not_used": [asdict(one) for one in imported.unused],
    }


def _first_reason(imported: Import) -> str:
    return next((f"{one.place}: {one.reason}" for one in imported.unused if one.is_invalid), "")


def _print(imported: Import, unused: Path) -> None:
    for reason, count in imported.reasons.items():
        echo(f"  {count} × {reason}")
    for one in imported.unused[:LISTED]:
        echo(f"  {one.place}  {one.answer_id or '-'}  {one.reason}")
    if len(imported.unused) > LISTED:
        echo(f"  … {len(imported.unused) - LISTED} more in {unused}")
    for name, count in sorted(imported.unread.items()):
        echo(f"  column not read: {name} ({count} rows)")
    if imported.num_divided:
        echo(
            f"  {imported.num_divided} conversations begin differently in their rows (cut off?): data.splits.by=conversation"
            " may divide them"
        )
