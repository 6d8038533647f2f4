"""The training cycles that led to a version, oldest first: what each began with, learned from, scored, and served.

Two cycles are linked where the run of the later one started from the version of the earlier one: from its weights, its
adapter, or the sum of both. Everything is read from records and events of the store; what is not there is said so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forge_ray.data.dataset import compare
from forge_ray.errors import ConfigError
from forge_ray.governance.difference import Side, changes
from forge_ray.governance.impact import StoreUses
from forge_ray.papers.facts import approval_of
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.resolve import resolve
from forge_ray.train.start import chain_of

NOT_COMPARED = ("base_model", "licence", "name", "data.sources", "train.init_from")  # of the settings: shown on their own


@dataclass(frozen=True)
class Cycle:
    """One version that a run made. `how`: `continue`, `merge`, `weights` (it started from full weights), or `first`. `rows`
    counts records against the cycle before (added, removed, changed); None where that is unknown, and `problem` says why.
    `settings`: dotted path → [before, now]. `scores`: report → its split, dataset and metrics."""

    number: int
    version: str
    name: str
    at: str
    how: str
    started_from: str
    run: str
    dataset: str
    num_records: int | None
    rows: dict[str, int] | None
    problem: str
    settings: dict[str, list[Any]]
    scores: dict[str, dict[str, Any]]
    status: str
    reasons: tuple[str, ...]
    approvals: tuple[dict[str, Any], ...]
    aliases: tuple[dict[str, Any], ...]
    deployments: tuple[dict[str, Any], ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cycles(catalog: Catalog, reference: str) -> list[Cycle]:
    """Every cycle up to the version that `reference` (id, alias or digest) names. Raises `ConfigError` where no run made
    it."""
    version = catalog.model(resolve(catalog, reference))
    chain = [one for one in chain_of(catalog, version) if one.run][::-1]
    if not chain:
        raise ConfigError(
            f"{version.id} was made by no run ({version.source}): it has no cycles",
            hint="`forge models list` shows which versions were trained",
        )
    uses, sides = StoreUses.of(catalog), [Side.of(catalog, one.id) for one in chain]
    befores: list[Side | None] = [None, *sides[:-1]]
    return [_cycle(catalog, uses, n, before, side) for n, (before, side) in enumerate(zip(befores, sides, strict=True), 1)]


def _cycle(catalog: Catalog, uses: StoreUses, number: int, before: Side | None, side: Side) -> Cycle:
    version = side.version
    rows, problem = _rows(catalog, before, side)
    aliases = tuple(uses.aliases({version.id}))
    deployments = uses.deployments({version.id}, aliases)
    return Cycle(
        number=number,
        version=version.id,
        name=version.name,
        at=version.created_at,
        how=_how(catalog, before, side),
        started_from=before.version.id if before else version.base_model,
        run=version.run,
        dataset=side.dataset.id if side.dataset else "",
        num_records=sum(split.num_records for split in side.dataset.splits.values()) if side.dataset else None,
        rows=rows,
        problem=problem,
        settings=_settings(before, side),
        scores={
            report.id: {"dataset": report.dataset, "split": report.split, "metrics": report.metrics}
            for report in side.reports
            if "leak" not in report.config
        },
        status=version.status,
        reasons=version.reasons,
        approvals=tuple(asdict(approval_of(catalog, event)) for event in catalog.events("approval", version.id)),
        aliases=tuple({"alias": one.alias, "since": one.since, "until": one.until} for one in aliases),
        deployments=tuple(
            {"deployment": one.deployment, "name": one.name, "state": one.state, "live": one.live} for one in deployments
        ),
    )


def _how(catalog: Catalog, before: Side | None, side: Side) -> str:
    if before is None:
        return "first"
    if side.run and side.run.initial_adapter:
        return "continue"
    return "merge" if before.version.weights == "adapter" else "weights"


def _rows(catalog: Catalog, before: Side | None, side: Side) -> tuple[dict[str, int] | None, str]:
    if side.dataset is None:
        return None, "its dataset is not on record"
    if before is None:
        return None, ""
    if before.dataset is None:
        return None, "the dataset of the cycle before is not on record"
    unpublished = [one.id for one in (before.dataset, side.dataset) if not catalog.store.is_published(paths.dataset(one.id))]
    if unpublished:
        return None, f"{', '.join(unpublished)} is no longer in the store"
    counts: dict[str, int] = compare.diff(catalog.store, before.dataset, side.dataset)["counts"]
    return counts, ""


def _settings(before: Side | None, side: Side) -> dict[str, list[Any]]:
    if before is None or before.run is None or side.run is None:
        return {}
    differences = changes(before.run.config, side.run.config)
    return {path: pair for path, pair in differences.items() if not any(_is_below(path, name) for name in NOT_COMPARED)}


def _is_below(path: str, section: str) -> bool:
    return path == section or path.startswith(f"{section}.")


def plot(chain: list[Cycle], path: Path) -> None:
    """Scores and rows of each cycle, as PNG: a panel for each metric that a cycle has, and one of records."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    latest = [newest_scores(cycle) for cycle in chain]
    names = sorted({name for scores in latest for name in scores} & {"exact_match", "loss", "macro_f1"})
    figure = Figure(figsize=(8, 2.2 * (len(names) + 1)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names) + 1, 1, sharex=True, squeeze=False)[:, 0]
    numbers = [cycle.number for cycle in chain]
    for panel, name in zip(panels, names, strict=False):
        points = [(number, scores[name]) for number, scores in zip(numbers, latest, strict=True) if name in scores]
        panel.plot(*zip(*points, strict=True), "o-", color="#2563eb", linewidth=1.4)
        panel.set_ylabel(name)
    rows = panels[-1]
    for what, sign, colour in (("added", 1, "#16a34a"), ("changed", 1, "#d97706"), ("removed", -1, "#dc2626")):
        heights = [sign * (cycle.rows or {}).get(what, 0) for cycle in chain]
        bottoms = [(cycle.rows or {}).get("added", 0) if what == "changed" else 0 for cycle in chain]
        rows.bar(numbers, heights, bottom=bottoms, color=colour, width=0.5, label=what)
    rows.set_ylabel("records")
    rows.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    rows.set_xticks(numbers, [f"{cycle.number}\n{cycle.at[:10]}\n{cycle.how}" for cycle in chain])
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{chain[-1].name} · {chain[-1].version}")
    figure.savefig(path, format="png")


def newest_scores(cycle: Cycle) -> dict[str, float]:
    """The metrics of the newest report of a cycle's version; empty where there is none."""
    return next((report["metrics"] for report in reversed(cycle.scores.values())), {})
