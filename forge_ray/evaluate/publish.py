"""What was evaluated → a report with its files, published in one step."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forge_ray.config.measurements import GENERAL, Contamination
from forge_ray.config.release import EvalConfig
from forge_ray.data.curate.contamination import contaminated, stream_records
from forge_ray.errors import DataError
from forge_ray.evaluate.chance import wilson
from forge_ray.evaluate.class_thresholds import Thresholds
from forge_ray.evaluate.examples import GENERAL_SPLIT, HeldOutRows
from forge_ray.evaluate.measures import intervals, is_general
from forge_ray.evaluate.own import num_scored
from forge_ray.evaluate.plots import plot_confusion, plot_reliability
from forge_ray.evaluate.scoring_files import ScoringFiles
from forge_ray.evaluate.summary import only_finite, slice_scores, summarise
from forge_ray.records import DatasetManifest, EvalReport
from forge_ray.store import paths
from forge_ray.store.files import Store


@dataclass(frozen=True)
class SharedRows:
    """Evaluated rows that share words with training rows: of the task, and of the general rows."""

    own: list[dict[str, Any]]
    general: list[dict[str, Any]]


@dataclass(frozen=True)
class ScoredRows:
    """What a subject answered: an item of each evaluated row, an answer to each safety prompt, the evaluated rows that the
    training rows hold too (None: not looked for), and how many rows were left out, by the reason."""

    items: list[dict[str, Any]]
    labels: tuple[str, ...]
    safety: list[dict[str, Any]]
    shared: SharedRows | None
    left_out: Mapping[str, int]
    general: DatasetManifest | None = None  # whose rows are among the items
    temperatures: Mapping[str, float] = field(default_factory=dict)  # of a classifier, by target
    thresholds: Thresholds = field(default_factory=Thresholds)
    at_thresholds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # of these rows, by label


@dataclass(frozen=True)
class Scored:
    """Whose answers they are, and how they came about: what a report says besides its scores."""

    subject: str
    digest: str
    config: dict[str, Any]
    costs: dict[str, float]
    seconds: float
    files: ScoringFiles
    endpoint: str = ""
    step: int = 0  # of a run's checkpoint


def shared_rows(
    store: Store,
    config: EvalConfig,
    manifest: DatasetManifest,
    held: HeldOutRows,
    general: DatasetManifest | None = None,
    general_held: HeldOutRows | None = None,
) -> SharedRows | None:
    """See `data.contamination`; None where the settings do not ask for it."""
    if config.contamination is None:
        return None
    own = _shared(store, manifest, config.split, held, manifest, config.contamination)
    if general is None or general_held is None:
        return SharedRows(own, [])
    return SharedRows(own, _shared(store, general, GENERAL_SPLIT, general_held, manifest, config.contamination))


def _shared(
    store: Store, manifest: DatasetManifest, split: str, held: HeldOutRows, training: DatasetManifest, rule: Contamination
) -> list[dict[str, Any]]:
    """Of the rows of a split that are evaluated, and no others, by the rows of `training`."""
    evaluated = {*(chat.record for chat in held.chats), *(text.record for text in held.texts)}
    rows = (row for row in stream_records(store, manifest, split) if row["record"] in evaluated)
    return contaminated(rows, stream_records(store, training, "train"), rule)


def publish(store: Store, manifest: DatasetManifest, config: EvalConfig, rows: ScoredRows, of: Scored) -> EvalReport:
    """The report of `rows`. Its files are in the store, its record is not yet. Raises `DataError` without any row of the
    task, or of the general ones where they were asked for."""
    own, num_general = [item for item in rows.items if not is_general(item)], sum(map(is_general, rows.items))
    for dataset, is_missing in ((manifest, not own), (rows.general, not num_general)):
        if dataset and is_missing:
            reason = max(rows.left_out, key=lambda why: rows.left_out[why], default="there is none")
            raise DataError(
                f"none of the rows of {dataset.id} can be put to {of.subject}: {reason}",
                hint="`forge models check` says what the model's chat template has a place for; one without a template takes"
                " texts",
            )
    metrics, per_class = summarise(rows.items, rows.labels)
    bounds = intervals(rows.items, rows.labels)
    of_several = any(len(item.get("targets", ())) > 1 for item in rows.items)
    for name, value in rows.temperatures.items():
        metrics[f"{name}_temperature" if of_several else "temperature"] = value
    for name, measured in rows.at_thresholds.items():
        per_class[name] = {**per_class.get(name, {}), **measured}
    kept = {"items.jsonl": rows.items}
    if rows.safety:
        passed = [not answer["failures"] for answer in rows.safety]
        metrics["safety_pass_rate"] = sum(passed) / len(passed)
        bounds["safety_pass_rate"] = wilson(sum(passed), len(passed))
        kept["safety.jsonl"] = rows.safety
    if rows.shared is not None:
        metrics["contamination"] = len(rows.shared.own) / len(own)
        if rows.general:
            metrics[f"{GENERAL}contamination"] = len(rows.shared.general) / num_general
        kept["contaminated.jsonl"] = [*rows.shared.own, *rows.shared.general]
    metrics, per_slice, undefined = only_finite(metrics, slice_scores(rows.items, rows.labels, config.slices))
    written = {name: json_lines(lines) for name, lines in kept.items()}
    report = EvalReport(
        subject=of.subject,
        subject_digest=of.digest,
        step=of.step,
        dataset=manifest.id,
        endpoint=of.endpoint,
        split=config.split,
        config=of.config,
        num_examples=len(own),
        metrics=metrics,
        per_class=per_class,
        per_slice=per_slice,
        undefined=undefined,
        intervals={name: limits for name, limits in bounds.items() if name in metrics},
        left_out=dict(rows.left_out),
        general=rows.general.id if rows.general else "",
        num_general=num_general,
        thresholds=dict(rows.thresholds.values),
        unreached=dict(rows.thresholds.unreached),
        num_scored=num_scored(rows.items, of.files.functions),
        items_sha256=hashlib.sha256(b"".join(written.values())).hexdigest(),
        costs=of.costs,
        seconds=round(of.seconds, 3),
    ).sealed()
    with store.staged_dir(paths.report(report.id)) as target:
        for name, content in {**written, **of.files.sources}.items():
            (target / name).write_bytes(content)
        if rows.labels:
            title = f"{report.evaluated} · {config.split} of {manifest.id}"
            answered = [item for item in own if "kind" not in item]  # with a text, which may be a label
            plot_confusion(answered, rows.labels, target / "confusion.png", title)
        if classified := [item for item in own if "targets" in item]:
            plot_reliability(classified, target / "reliability.png", f"{of.subject} · {config.split} of {manifest.id}")
    return report


def json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    """One object a line; what is not a finite number is null, for JSON has no word for it."""
    plain = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in plain).encode()
