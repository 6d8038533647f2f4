"""Printed output: tables, packed rows token by token, the summary of the quick start."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_ray.cli.terminal import one_line
from forge_ray.machine.shipped import here_or_shipped
from forge_ray.progress import visible
from forge_ray.records import DatasetManifest, EvalReport, ModelVersion
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

if TYPE_CHECKING:
    from forge_ray.cli.quickstart import QuickstartResult
    from forge_ray.evaluate.chance import Difference
    from forge_ray.train.preflight import Estimate


def packed_rows(catalog: Catalog, reference: str, split: str, count: int) -> list[dict[str, Any]]:
    """The first packed rows: for each document its record, its label where it has one, and its tokens, with whether
    each is trained."""
    from forge_ray.data.dataset.stream import Rows
    from forge_ray.data.dataset.version import load_tokenizer

    manifest = catalog.get_as(DatasetManifest, reference)
    rows = Rows.of(catalog.store, manifest, split)
    numbers = list(range(min(count, rows.num_rows)))
    tokenizer = load_tokenizer(catalog.store, manifest.base_model)
    columns = rows.take(numbers)
    packed = []
    labels = rows.labels(numbers) if manifest.config.get("form") == "labels" else []
    for number, records in zip(numbers, rows.records(numbers), strict=True):
        documents: list[dict[str, Any]] = []
        for segment, record in enumerate(records, start=1):
            where = columns["segment_ids"][number] == segment
            ids, mask = columns["input_ids"][number][where].tolist(), columns["loss_mask"][number][where].tolist()
            pieces = [tokenizer.decode([token]) for token in ids]
            label = {"label": labels[number][segment - 1]} if labels else {}
            tokens = {"tokens": pieces, "ids": ids, "trained": [bool(bit) for bit in mask]}
            documents.append({"record": record, **label, **tokens})
        used = int((columns["segment_ids"][number] > 0).sum())
        packed.append(
            {"row": number, "num_tokens": used, "padding": manifest.sequence_length - used, "documents": documents}
        )
    return packed


def print_packed_rows(rows: list[dict[str, Any]]) -> None:
    """Print trained tokens on green and all others dim; without colour, trained tokens are enclosed in ⟦ ⟧."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for row in rows:
        console.print(f"[bold]row {row['row']}[/bold]  {row['num_tokens']} tokens, {row['padding']} padding")
        for document in row["documents"]:
            console.print(f"  [cyan]{document['record']}[/cyan]", end="" if "label" in document else "\n")
            if "label" in document:
                console.print(Text(f"  {visible(document['label'])}"), soft_wrap=True)
            text = Text("    ")
            for token, trained in zip(document["tokens"], document["trained"], strict=True):
                piece = visible(token).replace("\n", "⏎\n    ")
                if not trained:
                    text.append(piece, style="dim")
                else:
                    text.append(piece if console.is_terminal else f"⟦{piece}⟧", style="bold black on green")
            console.print(text, soft_wrap=True)


def scores(store: Store, names: Sequence[str], reports: Sequence[EvalReport]) -> tuple[tuple[str, ...], list[list[str]]]:
    """(header, rows) of a table: a column of each report, with its interval of 95 %, and behind each but the first the
    change from the first on the rows that both have, with its interval, or that it is within chance."""
    from forge_ray.evaluate.items import compared
    from forge_ray.evaluate.measures import is_share

    first, *others = reports
    changes = [compared(store, other, first, 0.95) for other in others]
    header = ["", names[0]]
    for name in names[1:]:
        header += [name, "change"]
    rows = []
    for metric in dict.fromkeys(metric for report in reports for metric in report.metrics):
        number = _share if all(is_share(report, metric) for report in reports) else _number
        row = [metric, _with_interval(first, metric, number)]
        for other, by_metric in zip(others, changes, strict=True):
            row += [_with_interval(other, metric, number), _change(metric, first, other, by_metric.get(metric))]
        rows.append(row)
    return tuple(header), rows


def _with_interval(report: EvalReport, metric: str, number: Callable[[float], str]) -> str:
    if metric not in report.metrics:
        unknown = "not from an endpoint" if report.endpoint else ""
        return "not a finite number" if metric in report.undefined else unknown
    bounds = report.intervals.get(metric)
    cell = number(report.metrics[metric])
    return f"{cell}  [{number(bounds[0])}, {number(bounds[1])}]" if bounds else cell


def _change(metric: str, before: EvalReport, after: EvalReport, change: Difference | None) -> str:
    from forge_ray.evaluate.measures import is_share

    if metric not in before.metrics or metric not in after.metrics:
        return ""
    scale, form, unit = (100, "+.1f", " points") if is_share(after, metric) else (1, "+.3g", "")
    cell = f"{(after.metrics[metric] - before.metrics[metric]) * scale:{form}}{unit}"
    if change is None:
        return cell
    return f"{cell}  [{change.low * scale:{form}}, {change.high * scale:{form}}]" + (
        "  within chance" if change.is_chance else ""
    )


def _share(value: float) -> str:
    return f"{value:.1%}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def print_table(title: str, header: tuple[str, ...], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with columns as wide as their content; lines are not cut when the output is a pipe."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table(title=Text(one_line(title)), title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    table.title_style = "bold"
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    console.print(table)


def models(catalog: Catalog) -> list[dict[str, Any]]:
    """Model versions, oldest first, with their aliases and scores."""
    aliases: dict[str, list[str]] = {}
    for alias, target in catalog.aliases().items():
        aliases.setdefault(target, []).append(alias)
    versions = []
    for version in catalog.all(ModelVersion):
        report = catalog.get_as(EvalReport, version.evals[0]) if version.evals and catalog.has(version.evals[0]) else None
        versions.append(
            version.model_dump(mode="json", exclude={"files"})
            | {
                "aliases": sorted(aliases.get(version.id, [])),
                "size": sum(entry.size for entry in version.files),
                "metrics": report.metrics if report else {},
            }
        )
    return versions


def size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def print_plan(estimate: Estimate) -> None:
    """Print the estimate of a run as a table."""
    plan, memory = estimate.plan, estimate.plan.memory
    limit = f", of {size(estimate.memory_limit)}" if estimate.memory_limit else ", memory limit unknown"
    rows = [
        ("model", f"{plan.num_parameters:,} weights, {plan.num_trained:,} trained ({estimate.base_model})"),
        *([("active", f"{plan.num_active:,}")] if plan.num_active < plan.num_parameters else []),
        *(("adapter" if not number else "", line) for number, line in enumerate(estimate.reaches)),
        ("data", f"{plan.num_rows:,} packed rows × {plan.epochs:.2f} epochs ({estimate.dataset})"),
        ("tokens", f"{plan.num_tokens:,}, of which {plan.num_trained_tokens:,} are trained"),
        *([("reference pass", _reference_pass(estimate))] if plan.reference_tokens else []),
        ("steps", f"{plan.steps:,}"),
        ("rows a pass", f"{estimate.micro_batch_size}"),
        ("workers", f"{estimate.num_workers}, {estimate.precision}"),
        ("worker memory", f"{size(memory.total)} plus libraries{limit}"),
        *((f"  {part}", size(getattr(memory, part))) for part in ("weights", "gradients", "optimizer", "working")),
        *(("  not counted", line) for line in estimate.not_counted),
        ("a checkpoint", size(plan.checkpoint_bytes)),
        ("disk", f"{size(estimate.disk_bytes)}, of which {size(estimate.left_bytes)} stay after the run"),
    ]
    if estimate.seconds is not None:
        hours = estimate.seconds / 3600
        rows.append(("time", f"{hours:.2f} h, {hours * estimate.num_workers:.2f} worker hours"))
    if estimate.cost is not None:
        rows.append(("cost", f"{estimate.cost:.2f}"))
    print_table("Plan", ("", ""), rows)


def _reference_pass(estimate: Estimate) -> str:
    """What asking a frozen model about the rows takes."""
    plan = estimate.plan
    loaded = f", {size(plan.reference_memory)} in each worker meanwhile" if plan.reference_memory else ""
    return f"{plan.reference_tokens:,} tokens forward, once; {size(plan.reference_bytes)} kept with the dataset{loaded}"


def print_quickstart(result: QuickstartResult, store: Store) -> None:
    """Print the summary of the quick start: scores, answer, lineage, files, next commands."""
    from rich.console import Console
    from rich.markup import escape

    from forge_ray.governance.lineage import draw, lineage

    console = Console(highlight=False)
    outcome = result.outcome
    console.print()
    title = f"base vs tuned: {outcome.report.num_examples} held-out rows"
    print_table(title, *scores(store, ("base", "tuned"), (outcome.base_report, outcome.report)))
    if outcome.version.status == "rejected":
        console.print(f"[red]rejected[/red]: {escape(visible('; '.join(outcome.version.reasons)))}")
    if result.answer and outcome.deployment:
        console.print(f"\n[bold]asked[/bold]     {escape(visible(result.question))}", soft_wrap=True)
        answered = escape(visible(f"{result.answer.text}   (expected: {result.expected})"))
        console.print(f"[bold]answered[/bold]  {answered}", soft_wrap=True)
        console.print("\n[bold]where that answer comes from[/bold]")
        with Catalog.read_only(store) as catalog:
            for line in draw(lineage(catalog, outcome.deployment.id, 3)):
                console.print(one_line(line), soft_wrap=True, markup=False)
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
    """The command that activates this installation's environment; "" if `forge` is already its command."""
    script, command = Path(sys.prefix, "bin", "activate"), shutil.which("forge")
    if not script.is_file() or (command and Path(command).parent.resolve() == script.parent.resolve()):
        return ""
    name = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return f"  (after `source {shlex.quote(str(name))}`)"


def next_steps(dataset: str, version: str) -> list[str]:
    """Next commands, which work in the current folder whether it is a checkout or not."""
    file = here_or_shipped("jobs/deploy.yaml")
    lines = [f"forge data show {dataset} --rows 3", f"forge serve {shlex.quote(file)}", f"forge lineage {version}"]
    if Path(file).is_absolute() and not Path("jobs").exists():
        lines.append(
            f"cp -r {shlex.quote(str(Path(file).parent))} .  # run files to start from; jobs/sft.yaml has every setting"
        )
    return lines
