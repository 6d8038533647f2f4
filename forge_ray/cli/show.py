"""Print what a person asks to see: token by token rows, tables, the end of the quick start."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_ray.machine.shipped import here_or_shipped
from forge_ray.records import DatasetManifest, EvalReport, ModelVersion
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

if TYPE_CHECKING:
    from forge_ray.cli.quickstart import Shown


def packed_rows(catalog: Catalog, reference: str, split: str, count: int) -> list[dict[str, Any]]:
    """The first packed rows: per document its record, its text, and the tokens with whether each is trained."""
    from forge_ray.data.dataset.stream import Rows
    from forge_ray.data.dataset.version import load_tokenizer

    manifest = catalog.get_as(DatasetManifest, reference)
    rows = Rows.of(catalog.store, manifest, split)
    numbers = list(range(min(count, rows.num_rows)))
    tokenizer = load_tokenizer(catalog.store, manifest.base_model)
    taken = rows.take(numbers)
    shown = []
    for number, records in zip(numbers, rows.records(numbers), strict=True):
        documents = []
        for segment, record in enumerate(records, start=1):
            where = taken["segment_ids"][number] == segment
            ids, mask = taken["input_ids"][number][where].tolist(), taken["loss_mask"][number][where].tolist()
            pieces = [tokenizer.decode([token]) for token in ids]
            documents.append({"record": record, "tokens": pieces, "ids": ids, "trained": [bool(bit) for bit in mask]})
        used = int((taken["segment_ids"][number] > 0).sum())
        shown.append({"row": number, "num_tokens": used, "padding": manifest.sequence_length - used, "documents": documents})
    return shown


def print_packed_rows(rows: list[dict[str, Any]]) -> None:
    """Trained tokens on green, everything else dim; without colour, trained tokens stand in ⟦ ⟧."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for row in rows:
        console.print(f"[bold]row {row['row']}[/bold]  {row['num_tokens']} tokens, {row['padding']} padding")
        for document in row["documents"]:
            console.print(f"  [cyan]{document['record']}[/cyan]")
            text = Text("    ")
            for token, trained in zip(document["tokens"], document["trained"], strict=True):
                shown = token.replace("\n", "⏎\n    ")
                if not trained:
                    text.append(shown, style="dim")
                else:
                    text.append(shown if console.is_terminal else f"⟦{shown}⟧", style="bold black on green")
            console.print(text, soft_wrap=True)


def comparison(base: EvalReport, tuned: EvalReport) -> list[tuple[str, str, str, str]]:
    """(metric, base, tuned, change), shares in percent."""
    rows = []
    for name in base.metrics:
        if name in tuned.metrics:
            before, after = base.metrics[name], tuned.metrics[name]
            if name in ("loss", "perplexity"):
                rows.append((name, f"{before:.3g}", f"{after:.3g}", f"{after - before:+.3g}"))
            else:
                rows.append((name, f"{before:.1%}", f"{after:.1%}", f"{(after - before) * 100:+.1f} points"))
    return rows


def print_table(title: str, header: tuple[str, ...], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their content; a pipe gets whole lines too."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def models(catalog: Catalog) -> list[dict[str, Any]]:
    """Model versions, oldest first, with the aliases that point at them and the score they were judged by."""
    aliases: dict[str, list[str]] = {}
    for alias, target in catalog.aliases().items():
        aliases.setdefault(target, []).append(alias)
    found = []
    for version in catalog.all(ModelVersion):
        report = catalog.get_as(EvalReport, version.evals[0]) if version.evals and catalog.has(version.evals[0]) else None
        found.append(
            version.model_dump(mode="json", exclude={"files"})
            | {
                "aliases": sorted(aliases.get(version.id, [])),
                "size": sum(entry.size for entry in version.files),
                "metrics": report.metrics if report else {},
            }
        )
    return found


def size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def print_plan(found: dict[str, Any]) -> None:
    """The plan of a run, as a table."""
    memory = found["memory"]
    parts = ("weights", "gradients", "optimizer", "working")
    rows = [
        ("model", f"{found['num_parameters']:,} weights, {found['num_trained']:,} trained ({found['base_model']})"),
        *([("active", f"{found['num_active']:,}")] if found["num_active"] < found["num_parameters"] else []),
        *(("adapter" if not number else "", line) for number, line in enumerate(found["reaches"])),
        ("data", f"{found['num_rows']:,} packed rows × {found['epochs']:.2f} epochs ({found['dataset']})"),
        ("tokens", f"{found['num_tokens']:,}, of which {found['num_trained_tokens']:,} are trained"),
        ("steps", f"{found['steps']:,}"),
        ("workers", f"{found['num_workers']}, {found['precision']}"),
        (
            "memory of one",
            f"{size(memory['total'])} and what the libraries take"
            + (f", of {size(found['room'])}" if found["room"] else ", room not known"),
        ),
        *((f"  {part}", size(memory[part])) for part in parts),
        ("a checkpoint", size(found["checkpoint_bytes"])),
        ("disk", size(found["disk_bytes"])),
    ]
    if found["seconds"] is not None:
        rows.append(
            ("time", f"{found['seconds'] / 3600:.2f} h, {found['seconds'] / 3600 * found['num_workers']:.2f} worker hours")
        )
    if found["cost"] is not None:
        rows.append(("cost", f"{found['cost']:.2f}"))
    print_table("Plan", ("", ""), rows)


def print_quickstart(shown: Shown, store: Store) -> None:
    """The end of the quick start: table, answer, lineage, places, what to try next."""
    from rich.console import Console
    from rich.markup import escape

    from forge_ray.governance.lineage import draw, lineage

    console = Console(highlight=False)
    outcome = shown.outcome
    console.print()
    title = f"base vs tuned: {outcome.report.num_examples} held-out rows"
    print_table(title, ("", "base", "tuned", "change"), comparison(outcome.base_report, outcome.report))
    if outcome.version.status == "rejected":
        console.print(f"[red]rejected[/red]: {'; '.join(outcome.version.reasons)}")
    if shown.answer and outcome.deployment:
        console.print(f"\n[bold]asked[/bold]     {shown.question}", soft_wrap=True)
        console.print(f"[bold]answered[/bold]  {shown.answer.text}   (expected: {shown.expected})", soft_wrap=True)
        console.print("\n[bold]where that answer comes from[/bold]")
        with Catalog(store) as catalog:
            for line in draw(lineage(catalog, outcome.deployment.id, 3)):
                console.print(line, soft_wrap=True, markup=False)
    run = outcome.run.id
    console.print("\n[bold]written[/bold]")
    console.print(f"  dataset     {store.place}/{paths.dataset(outcome.dataset.id)}", soft_wrap=True)
    console.print(
        f"  run         {store.place}/{paths.run(run)}  (metrics.jsonl, loss.png, checkpoints, export)", soft_wrap=True
    )
    console.print(
        f"  evaluation  {store.place}/{paths.report(outcome.report.id)}  (items.jsonl, confusion.png)", soft_wrap=True
    )
    console.print(f"  model       {store.place}/{paths.model(outcome.version.id)}", soft_wrap=True)
    console.print(f"\n[bold]try next[/bold]{escape(activation())}")
    for line in next_steps(outcome.dataset.id, outcome.version.id):
        console.print(f"  {line}", soft_wrap=True, markup=False)


def activation() -> str:
    """What must be typed before `forge` is the command of this installation; "" if it is."""
    script, command = Path(sys.prefix, "bin", "activate"), shutil.which("forge")
    if not script.is_file() or (command and Path(command).parent.resolve() == script.parent.resolve()):
        return ""
    name = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return f"  (after `source {shlex.quote(str(name))}`)"


def next_steps(dataset: str, version: str) -> list[str]:
    """Commands that work in the current folder, whether it is a checkout or not."""
    file = here_or_shipped("jobs/deploy.yaml")
    lines = [f"forge data show {dataset} --rows 3", f"forge serve {shlex.quote(file)}", f"forge lineage {version}"]
    if Path(file).is_absolute() and not Path("jobs").exists():
        lines.append(
            f"cp -r {shlex.quote(str(Path(file).parent))} .  # run files to start from; jobs/sft.yaml has every setting"
        )
    return lines
