"""How a run used packed rows, from its record or, while it is unfinished, from its folder (no torch)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.data.dataset.order import order_of
from forge_ray.errors import ForgeError
from forge_ray.records import DatasetManifest, ModelVersion, RunRecord
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train import incidents, metrics, run_folder
from forge_ray.train.frozen import FrozenModel
from forge_ray.train.job import frozen_with, run_id


@dataclass(frozen=True)
class Use:
    """How one run used one record. `how`: `trained` at `steps` (counted from 1; a step occurs as often as the record was in
    it), or `validated`. `exact` is False where the run may not have used it: a sample was drawn, or its settings are
    missing."""

    record: str
    run: str
    dataset: str
    how: str
    steps: tuple[int, ...] = ()
    left_out: tuple[tuple[int, str], ...] = ()  # steps of its order that an incident removed, and when
    exact: bool = True
    decided: bool = False  # whether the validation selected the exported weights or the end of the run


@dataclass(frozen=True)
class Run:
    """A run, finished or not. `settings` is None where they are missing. `computed`: step → whether the metrics say that
    it was computed, not left out."""

    run: str
    name: str
    dataset: str
    base_model: str
    state: str
    settings: TrainConfig | None
    num_steps: int
    export_step: int
    incidents: tuple[dict[str, Any], ...]
    computed: dict[int, bool]
    order_key: str = ""  # "" for old runs, whose order follows from the dataset's id
    initial_adapter: str = ""  # the version whose adapter it trains on
    frozen_model: str = ""  # the version, besides these, whose numbers its loss reads: a teacher, or another reference

    @property
    def starts_from(self) -> tuple[str, ...]:
        """The versions that its weights depend on."""
        return tuple(version for version in (self.base_model, self.initial_adapter, self.frozen_model) if version)

    def trained_on(self, manifest: DatasetManifest, record: str, rows: Sequence[int]) -> Iterator[Use]:
        """The steps at which the rows were used, if any."""
        if self.settings is None:
            yield Use(record, self.run, manifest.id, "trained", exact=False)
            return
        order = order_of(manifest, "train", self.settings.seed, self.settings.global_batch, self.order_key or manifest.id)
        seen = self.num_steps * order.global_batch
        indices = sorted(order.index_of(row, epoch) for row in rows for epoch in range(-(-seen // order.num_rows)))
        used, left_out = [], []
        for index in indices:
            if index < seen:
                step = index // order.global_batch + 1
                since = self._left_out(step, order.row(index))
                if since:
                    left_out.append((step, since))
                else:
                    used.append(step)
        if used or left_out:
            yield Use(record, self.run, manifest.id, "trained", tuple(used), tuple(left_out))

    def _left_out(self, step: int, row: int) -> str:
        """When an incident removed the row from the step; "" if none did."""
        for one in self.incidents:
            out = incidents.left_out([one])
            not_finite = one["kind"] == "not_finite" and one["step"] == step and not self.computed.get(step, False)
            if not_finite or step in out.steps or out.rows.get(row, step + 1) <= step:
                return str(one.get("at", "?"))
        return ""

    def validated_on(self, manifest: DatasetManifest, record: str) -> Iterator[Use]:
        """A validation pass reads a sample of the split, so the record may have been in it."""
        validation = self.settings.validation if self.settings else None
        if validation is None or validation.max_rows:
            decided = bool(validation and (validation.early_stopping or validation.keep_best))
            decided |= bool(self.settings is None or self.settings.export_step == "best")
            yield Use(record, self.run, manifest.id, "validated", exact=False, decided=decided)


def finished(store: Store, record: RunRecord) -> Run:
    return Run(
        record.id,
        record.name,
        record.dataset,
        record.base_model,
        "succeeded",
        _settings(record.config),
        record.num_steps,
        record.export_step or record.num_steps,
        record.incidents,
        _computed_steps(store, record.id),
        record.order_key,
        record.initial_adapter,
        record.frozen_model,
    )


def unfinished(catalog: Catalog, run: str, candidates: Sequence[ModelVersion]) -> Run:
    """A run without a record, from its folder: up to its newest checkpoint, the last line of its metrics or its newest
    candidate."""
    store = catalog.store
    config = run_folder.config_of(store, run)
    positions = list(run_folder.positions(store, run))[::-1]  # oldest first
    computed = _computed_steps(store, run)
    settings = _settings(config)
    events = catalog.events("run", run)
    started = next((event.data for event in reversed(events) if "dataset" in event.data), {"dataset": "", "base_model": ""})
    dataset = next((p["dataset"] for p in positions), "") or next((v.dataset for v in candidates if v.dataset), "")
    dataset = dataset or started["dataset"]
    base = next((version.base_model for version in candidates), "") or started["base_model"]
    models = {model.files_digest: model.id for model in catalog.all(ModelVersion)}
    base = base or next((models.get(p["base_digest"], "") for p in positions), "")
    initial = started.get("initial_adapter", "")
    initial = initial or next((models.get(p.get("initial_digest", ""), "") for p in positions), "")
    frozen = started.get("frozen_model", "")
    frozen = frozen or next((models.get(p.get("frozen_digest", ""), "") for p in positions), "")
    if settings and not (dataset and base):
        dataset, base, initial, frozen = _by_id(catalog, run, settings) or (dataset, base, initial, frozen)
    return Run(
        run,
        config.get("name", ""),
        dataset,
        base,
        events[-1].data["state"] if events else "unknown",
        settings if dataset else None,
        max([0, *(p["step"] for p in positions), *computed, *(version.step for version in candidates)]),
        0,
        tuple(incidents.read(store, run)),
        computed,
        _order_key(catalog, dataset, positions),
        initial,
        frozen,
    )


def _order_key(catalog: Catalog, dataset: str, positions: Sequence[dict[str, Any]]) -> str:
    """The order key of an unfinished run, from its checkpoints; before the first, the one that a new run would have."""
    if positions:
        return str(positions[0].get("order_key", ""))
    return catalog.get_as(DatasetManifest, dataset).splits["train"].rows_digest if catalog.has(dataset) else ""


def _by_id(catalog: Catalog, run: str, settings: TrainConfig) -> tuple[str, str, str, str] | None:
    """(dataset, base, initial adapter or "", frozen model or "") of a run before its first checkpoint: those that give its
    id."""
    starts: list[tuple[ModelVersion, ModelVersion | None]] = [(version, None) for version in catalog.all(ModelVersion)]
    if settings.init_from == "continue":
        adapters = [version for version, _ in starts if version.weights == "adapter" and catalog.has(version.base_model)]
        starts = [(catalog.get_as(ModelVersion, version.base_model), version) for version in adapters]
    asked: list[FrozenModel | None] = [*frozen_with(catalog)] if settings.frozen_model else [None]
    for dataset, (base, initial), frozen in product(catalog.all(DatasetManifest), starts, asked):
        if run in (run_id(settings, precision, dataset, base, initial, frozen) for precision in ("bf16", "fp32")):
            return dataset.id, base.id, initial.id if initial else "", frozen.version.id if frozen else ""
    return None


def _settings(config: dict[str, Any]) -> TrainConfig | None:
    try:
        return parse(TrainConfig, config["train"])
    except (ForgeError, KeyError):
        return None


def _computed_steps(store: Store, run: str) -> dict[int, bool]:
    path = paths.run(run, metrics.METRICS)
    lines = metrics.parse(store.read(path).decode()) if store.exists(path) else []
    return {line["step"]: "left_out" not in line for line in lines}


def ranges(steps: Sequence[int]) -> str:
    """Steps as text: `3, 7–9 (5 times in 4 steps)`."""
    times = Counter(steps)
    runs: list[list[int]] = []
    for step in sorted(times):
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    parts = [str(a) if a == b else f"{a}–{b}" for a, b in runs[:8]] + (["…"] if len(runs) > 8 else [])
    more = "" if len(steps) == len(times) else f" in {len(times)} steps"
    return f"{', '.join(parts)} ({len(steps)} time{'s' if len(steps) > 1 else ''}{more})"
