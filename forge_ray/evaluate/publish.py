"""What was evaluated → a report with its files, published in one step."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.config.release import Contamination, EvalConfig
from forge_ray.data.curate.contamination import contaminated, stream_records
from forge_ray.evaluate.answer_schema import KEPT_AS, AnswerSchema
from forge_ray.evaluate.chance import wilson
from forge_ray.evaluate.examples import HeldOutRows, normalise
from forge_ray.evaluate.measures import intervals
from forge_ray.evaluate.own import ScoringFunction, num_scored
from forge_ray.evaluate.summary import OTHER, only_finite, slice_scores, summarise
from forge_ray.records import DatasetManifest, EvalReport
from forge_ray.store import paths
from forge_ray.store.files import Store


@dataclass(frozen=True)
class ScoredRows:
    """What a subject answered: an item of each evaluated row, an answer to each safety prompt, the evaluated rows that the
    training rows hold too (None: not looked for), and how many rows were left out, by the reason."""

    items: list[dict[str, Any]]
    labels: tuple[str, ...]
    safety: list[dict[str, Any]]
    shared: list[dict[str, Any]] | None
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class OwnFiles:
    """The user's own functions and schema that rows were scored with."""

    functions: tuple[ScoringFunction, ...] = ()
    schema: AnswerSchema | None = None

    @property
    def sources(self) -> dict[str, bytes]:
        """The bytes of each file, by the name under which the report keeps them."""
        kept = {function.kept_as: function.source for function in self.functions}
        return kept | ({KEPT_AS: self.schema.source} if self.schema else {})


@dataclass(frozen=True)
class Scored:
    """Whose answers they are, and how they came about: what a report says besides its scores."""

    subject: str
    digest: str
    config: dict[str, Any]
    costs: dict[str, float]
    seconds: float
    endpoint: str = ""
    files: OwnFiles = OwnFiles()


def find_contamination(
    store: Store, manifest: DatasetManifest, held: HeldOutRows, config: EvalConfig, rule: Contamination
) -> list[dict[str, Any]]:
    """See `data.contamination`; of the rows that are evaluated, and no others."""
    evaluated = {*(chat.record for chat in held.chats), *(text.record for text in held.texts)}
    rows = (row for row in stream_records(store, manifest, config.split) if row["record"] in evaluated)
    return contaminated(rows, stream_records(store, manifest, "train"), rule)


def publish(store: Store, manifest: DatasetManifest, config: EvalConfig, rows: ScoredRows, of: Scored) -> EvalReport:
    """The report of `rows`, of which there is at least one. Its files are in the store, its record is not yet."""
    metrics, per_class = summarise(rows.items, rows.labels)
    bounds = intervals(rows.items, rows.labels)
    kept = {"items.jsonl": rows.items}
    if rows.safety:
        passed = [not answer["failures"] for answer in rows.safety]
        metrics["safety_pass_rate"] = sum(passed) / len(passed)
        bounds["safety_pass_rate"] = wilson(sum(passed), len(passed))
        kept["safety.jsonl"] = rows.safety
    if rows.shared is not None:
        metrics["contamination"] = len(rows.shared) / len(rows.items)
        kept["contaminated.jsonl"] = rows.shared
    metrics, per_slice, undefined = only_finite(metrics, slice_scores(rows.items, rows.labels, config.slices))
    written = {name: json_lines(lines) for name, lines in kept.items()}
    report = EvalReport(
        subject=of.subject,
        subject_digest=of.digest,
        dataset=manifest.id,
        endpoint=of.endpoint,
        split=config.split,
        config=of.config,
        num_examples=len(rows.items),
        metrics=metrics,
        per_class=per_class,
        per_slice=per_slice,
        undefined=undefined,
        intervals={name: limits for name, limits in bounds.items() if name in metrics},
        left_out=dict(rows.left_out),
        num_scored=num_scored(rows.items, of.files.functions),
        items_sha256=hashlib.sha256(b"".join(written.values())).hexdigest(),
        costs=of.costs,
        seconds=round(of.seconds, 3),
    ).sealed()
    with store.staged_dir(paths.report(report.id)) as target:
        for name, content in {**written, **of.files.sources}.items():
            (target / name).write_bytes(content)
        if rows.labels:
            title = f"{of.subject} · {config.split} of {manifest.id}"
            plot_confusion(rows.items, rows.labels, target / "confusion.png", title)
    return report


def json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    """One object a line; what is not a finite number is null, for JSON has no word for it."""
    plain = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in plain).encode()


def plot_confusion(items: Sequence[dict[str, Any]], labels: Sequence[str], path: Path, title: str) -> None:
    """Reference by generated answer, as PNG; answers outside the label set are one column."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [*labels, OTHER]
    counts = [[0] * len(columns) for _ in labels]
    for item in items:
        reference, prediction = normalise(item["reference"]), normalise(item["prediction"])
        if reference in labels:
            column = columns.index(prediction) if prediction in labels else len(labels)
            counts[list(labels).index(reference)][column] += 1
    size = max(4.0, 0.45 * len(columns) + 2)
    figure = Figure(figsize=(size, size), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(counts, cmap="Blues")
    high = max(map(max, counts), default=0)
    for row, values in enumerate(counts):
        for column, value in enumerate(values):
            if value:
                colour = "white" if value > high / 2 else "black"
                axes.text(column, row, str(value), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(xlabel="generated answer", ylabel="reference")
    axes.set_title(title, fontsize=9)
    figure.savefig(path)
