"""Attempts beside each other: what changed from one to the next, and what it brought (no torch)."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.config.base import parse
from forge_ray.config.gate import Gate
from forge_ray.config.method import loss_name
from forge_ray.errors import ConfigError, NotFound
from forge_ray.evaluate.measures import is_share
from forge_ray.records import EvalReport, ModelVersion, RunRecord
from forge_ray.release.gate import is_lower_better
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train import metrics, run_folder, validation

IN_WORDS = 4  # changes that a line of the list names; the rest is counted
SHORT = ("train.", "eval.", "base.")
COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#d97706", "#7c3aed", "#0891b2", "#db2777", "#4b5563")


@dataclass(frozen=True)
class Attempt:
    """One run, finished or not: `config` as resolved, `report` and `version` where there are any. `metric` is the one that
    its gate looks at first."""

    run: str
    name: str
    at: str
    state: str
    why: str
    config: dict[str, Any]
    record: RunRecord | None
    report: EvalReport | None
    version: ModelVersion | None
    metric: str

    @property
    def score(self) -> float | None:
        return self.report.metrics.get(self.metric) if self.report else None

    @property
    def method(self) -> str:
        """`sft`, or the kind of another method; a run that was not recorded is named by its settings."""
        method = self.config.get("train", {}).get("method", "sft")
        return str(method if isinstance(method, str) else method["kind"])

    @property
    def dataset(self) -> str:
        return self.record.dataset if self.record else ""


def attempts(catalog: Catalog) -> list[Attempt]:
    """Every run that has started, oldest first."""
    reports: dict[str, EvalReport] = {}
    for report in catalog.all(EvalReport):
        if "leak" not in report.config and not report.step:
            reports[report.subject] = report  # the newest
    versions = {version.run: version for version in catalog.all(ModelVersion) if version.run}
    versions |= {v.run: v for v in catalog.all(ModelVersion) if v.run and v.status in ("accepted", "rejected")}
    entries = []
    for run in catalog.subjects("run"):
        last = catalog.events("run", run)[-1]
        record = catalog.get_as(RunRecord, run) if catalog.has(run) else None
        config = record.config if record else run_folder.config_of(catalog.store, run)
        version = versions.get(run)
        judged = version.evals[0] if version and version.evals and catalog.has(version.evals[0]) else ""
        entries.append(
            Attempt(
                run,
                str(config.get("name", "")),
                last.at,
                last.data["state"],
                str(last.data.get("why", "")),
                config,
                record,
                catalog.get_as(EvalReport, judged) if judged else reports.get(run),
                version,
                _metric(config),
            )
        )
    return entries


def _metric(config: dict[str, Any]) -> str:
    stated = config.get("release", {}).get("gate", {})
    gate = parse(Gate, {key: stated[key] for key in ("thresholds", "better_than", "no_worse_than") if key in stated})
    named = [*(rule.metric for rule in gate.better_than), *gate.thresholds, *(rule.metric for rule in gate.no_worse_than)]
    return named[0] if named else "exact_match"


def differences(before: Attempt, after: Attempt) -> dict[str, tuple[Any, Any]]:
    """setting → (before, after) of what decides weights or scores; the dataset by its id, where both are known."""
    old, new = _settings(before), _settings(after)
    if not (before.dataset and after.dataset):
        old, new = ({key: item for key, item in tree.items() if key != "dataset"} for tree in (old, new))
    return dict(_pairs(old, new, ""))


def _settings(attempt: Attempt) -> dict[str, Any]:
    tree: dict[str, Any] = {
        key: attempt.config[key] for key in ("base_model", "data", "train", "eval") if key in attempt.config
    }
    return {"dataset": attempt.dataset, **tree}


def _pairs(old: Any, new: Any, prefix: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if not (isinstance(old, dict) and isinstance(new, dict)):  # a section that is not there is one change, not many
        if old != new:
            yield prefix, (old, new)
        return
    for key in [*old, *(key for key in new if key not in old)]:
        yield from _pairs(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def in_words(changes: dict[str, tuple[Any, Any]], most: int = IN_WORDS) -> str:
    """`optimizer.lr 0.001→0.0005, dataset ds_a→ds_b, and 2 more`."""
    parts = [f"{_short(key)} {_value(old)}→{_value(new)}" for key, (old, new) in changes.items()]
    more = [f"and {len(parts) - most} more"] if len(parts) > most else []
    return ", ".join([*parts[:most], *more])


def _short(key: str) -> str:
    return next((key.removeprefix(prefix) for prefix in SHORT if key.startswith(prefix)), key)


def _value(value: Any) -> str:
    if isinstance(value, list):
        text = f"[{', '.join(map(_value, value))}]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    else:
        text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 32 else text[:31] + "…"


def listed(tried: Sequence[Attempt]) -> list[dict[str, Any]]:
    """One JSON-ready entry per attempt: its state, what changed against the attempt of its name before it, and its score."""
    rows, last = [], dict[str, Attempt]()
    for attempt in tried:
        before = last.get(attempt.name) if attempt.name else None
        changes = differences(before, attempt) if before else {}
        row: dict[str, Any] = {"id": attempt.run, "state": attempt.state, "at": attempt.at, "name": attempt.name}
        record = attempt.record
        row |= {"steps": str(record.num_steps) if record else "", "loss": f"{record.metrics['loss']:.4f}" if record else ""}
        row |= {"dataset": attempt.dataset, "why": attempt.why, "before": before.run if before else ""}
        row |= {"changed": {key: list(pair) for key, pair in changes.items()}, "changed_in_words": in_words(changes)}
        row |= {"metric": attempt.metric, "score": attempt.score, "gain": _gain(before, attempt)}
        row |= {
            "version": attempt.version.id if attempt.version else "",
            "verdict": attempt.version.status if attempt.version else "",
        }
        rows.append(row)
        last[attempt.name] = attempt
    return rows


def _gain(before: Attempt | None, after: Attempt) -> float | None:
    """The change of the later attempt's metric, as it is: below 0 is better where lower is better."""
    if before is None or after.score is None or before.report is None or after.metric not in before.report.metrics:
        return None
    return after.score - before.report.metrics[after.metric]


# ---------------------------------------------------------------- one picture


@dataclass(frozen=True)
class Curve:
    """Loss per trained token (nats) at steps: of training, and of validations."""

    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]


def chosen(catalog: Catalog, runs: Sequence[str]) -> list[Attempt]:
    """The attempts of these ids, in this order."""
    if len(set(runs)) < 2:
        raise ConfigError(f"forge runs compare needs two runs or more, not {len(set(runs))}", hint="`forge runs list`")
    by_run = {attempt.run: attempt for attempt in attempts(catalog)}
    for run in runs:
        if run not in by_run:
            raise NotFound(f"{run!r} has never started", hint="`forge runs list` shows the runs of this store")
    return [by_run[run] for run in dict.fromkeys(runs)]


def curve(store: Store, run: str) -> Curve:
    path = paths.run(run, metrics.METRICS)
    lines = metrics.parse(store.read(path).decode()) if store.exists(path) else []
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    losses |= {result.step: result.loss for result in validation.read(store, run) if result.loss is not None}
    return Curve(
        [(line["step"], line["loss"]) for line in lines if "loss" in line],
        sorted((step, loss) for step, loss in losses.items() if math.isfinite(loss)),
    )


def picture(runs: Sequence[Attempt], curves: Sequence[Curve]) -> bytes:
    """PNG: the curves left (thin: training, marks: validation), those of each method's loss in a panel, the scores right, in
    one colour per run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = _shared_scores(runs)
    losses_of = dict.fromkeys(loss_name(attempt.method) for attempt in runs)  # a panel each: their units differ
    widths = [3.0] * len(losses_of) + [2.0] * bool(names)
    figure = Figure(figsize=(2.5 * sum(widths) + 0.5 * (not names), 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    left_of, right = dict(zip(losses_of, panels, strict=False)), panels[-1] if names else None
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(runs))]
    for attempt, drawn, colour in zip(runs, curves, colours, strict=True):
        left = left_of[loss_name(attempt.method)]
        if drawn.train:
            left.plot(*zip(*drawn.train, strict=True), color=colour, linewidth=1.1, alpha=0.6, label=_label(attempt))
        if drawn.validation:
            steps, losses = zip(*drawn.validation, strict=True)
            named = None if drawn.train else _label(attempt)
            left.plot(steps, losses, "o-", color=colour, markersize=6, markeredgecolor="white", linewidth=1.8, label=named)
    for loss, left in left_of.items():
        left.set(xlabel="step", ylabel=loss, title="loss: training (thin), validation (marks)")
        if left.get_legend_handles_labels()[1]:
            left.legend(frameon=False, fontsize=9)
    if right is not None:
        height = 0.8 / len(runs)
        for number, (attempt, colour) in enumerate(zip(runs, colours, strict=True)):
            for place, name in enumerate(names):
                value = attempt.report.metrics.get(name) if attempt.report else None
                if value is None:
                    continue
                y = place + (number - (len(runs) - 1) / 2) * height
                right.barh(y, value, height * 0.9, color=colour)
                right.text(value + 0.01, y, f"{value:.1%}", va="center", fontsize=8)
        right.set_yticks(range(len(names)), names, fontsize=9)
        right.invert_yaxis()
        right.set(xlim=(0, 1.14), xlabel="share", title="scores")
        right.set_xticks([0, 0.25, 0.5, 0.75, 1])
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return sink.getvalue()


def _label(attempt: Attempt) -> str:
    return f"{attempt.name}  {attempt.run}" + (f"  ({attempt.version.status})" if attempt.version else "")


def _shared_scores(runs: Sequence[Attempt]) -> list[str]:
    """The metrics that are shares, of any of the runs; losses and the user's own scores are in the table."""
    reports = [attempt.report for attempt in runs if attempt.report]
    return list(dict.fromkeys(name for report in reports for name in report.metrics if is_share(report, name)))


def table(runs: Sequence[Attempt]) -> list[list[str]]:
    """Header and rows, one column per run: verdict and scores, then each setting that is not the same in all."""
    rows = [["", *(attempt.run for attempt in runs)], ["name", *(attempt.name for attempt in runs)]]
    rows.append(["state", *(attempt.state for attempt in runs)])
    rows.append(["version", *(a.version.id if a.version else "-" for a in runs)])
    rows.append(["verdict", *(a.version.status if a.version else "-" for a in runs)])
    rows.append(["steps", *(str(a.record.num_steps) if a.record else "-" for a in runs)])
    for name in dict.fromkeys(name for a in runs if a.report for name in a.report.metrics):
        better = "↓" if any(a.report and is_lower_better(a.report, name) for a in runs) else "↑"
        scores = [a.report.metrics.get(name) if a.report else None for a in runs]
        rows.append([f"{name} {better}", *("-" if score is None else f"{score:.4g}" for score in scores)])
    settings = [_settings(attempt) for attempt in runs]
    for key in dict.fromkeys(key for tree in settings for key, _ in _pairs(settings[0], tree, "")):
        rows.append([key, *(_value(_at(tree, key)) for tree in settings)])
    return rows


def page(runs: Sequence[Attempt], png: bytes) -> str:
    """One HTML file that needs nothing else: the picture inside, the table under it."""
    head, *rows = table(runs)
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>\n" for row in rows)
    title = html.escape("runs " + ", ".join(attempt.run for attempt in runs))
    style = (
        "body{font:15px/1.4 system-ui,sans-serif;margin:2rem auto;max-width:1250px;padding:0 1rem;color:#111}"
        "img{max-width:100%}table{border-collapse:collapse;margin-top:1rem}"
        "th,td{text-align:left;padding:.3rem .9rem;border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>\n'
        f'<body><h1>Runs compared</h1>\n<img alt="loss curves and scores" src="data:image/png;base64,'
        f'{base64.b64encode(png).decode()}">\n<table><thead><tr>{cells}</tr></thead>\n<tbody>\n{body}</tbody></table></body></html>\n'
    )


def compare(catalog: Catalog, runs: Sequence[str], out: Path | None) -> tuple[list[Attempt], Path]:
    """Draw them into `out` (.png or .html); default: a PNG in the current folder that is named by the runs."""
    tried = chosen(catalog, runs)
    target = out or Path("compare-" + "-".join(attempt.run.removeprefix("run_")[:8] for attempt in tried) + ".png")
    if target.suffix not in (".png", ".html"):
        raise ConfigError(f"--out {target} is neither .png nor .html", hint="name the file by one of these endings")
    png = picture(tried, [curve(catalog.store, attempt.run) for attempt in tried])
    try:
        target.write_bytes(png if target.suffix == ".png" else page(tried, png).encode())
    except OSError as error:
        raise ConfigError(f"--out {target} cannot be written: {error}", hint="name a file in a folder that exists") from None
    return tried, target
