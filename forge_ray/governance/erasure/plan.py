"""The plan of an erasure: affected datasets, runs and their steps, versions, aliases and deployments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from forge_ray.data.dataset import index
from forge_ray.data.dataset.index import Place
from forge_ray.evaluate.items import splits_of
from forge_ray.governance.erasure import closure
from forge_ray.governance.erasure.search import ReachedRecords
from forge_ray.governance.erasure.variants import Variant
from forge_ray.governance.impact import StoreUses
from forge_ray.governance.uses import Run
from forge_ray.records import DatasetManifest, Deployment, EvalReport, Frozen, ModelVersion, RunRecord
from forge_ray.serve.routing import versions_of
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.disclosures import SentRows, sent
from forge_ray.store.endpoint_state import state_of
from forge_ray.store.exports import ExportedCopy, exported

TRAINED_ON = ("train", "validation")  # splits that can affect weights: validation may select the checkpoint or stop a run


class AffectedDataset(Frozen):
    id: str
    name: str
    held: dict[str, int]  # split, or `dropped` → records
    changed: bool = False  # whether the other training rows differ without these: a near duplicate may take their place

    def decides(self, train: dict[str, Any]) -> bool:
        """Whether the weights of a run with these settings depend on the affected rows."""
        validation = train.get("validation", {})
        chooses = validation.get("early_stopping") or validation.get("keep_best") or train.get("export_step") == "best"
        return self.changed or bool(self.held.get("train")) or bool(chooses and self.held.get("validation"))


class AffectedRun(Frozen):
    """A run on an affected dataset or base model. `used`: whether it was trained on the rows, or on weights that were; if
    not, only its dataset holds them. `steps`: number of its optimizer steps with one of the rows in the batch. `begun`: the
    adapter version that it started from (train.init_from), which is trained anew before it; `frozen`: its teacher or another
    reference."""

    id: str
    name: str
    dataset: str
    base_model: str
    used: bool
    finished: bool
    adapter: bool
    num_steps: int
    steps: int
    first_step: int
    last_step: int
    worker_hours: float
    gpu_hours: float
    begun: str = ""
    frozen: str = ""

    @property
    def origin(self) -> str:
        """The version that a repetition starts from, or the one that replaces it."""
        return self.begun or self.base_model


class AffectedVersion(Frozen):
    id: str
    name: str
    status: str
    weights: str
    run: str


class AffectedDeployment(Frozen):
    """`seen`: when the endpoint was last seen, in words; "" without a lease."""

    id: str
    name: str
    state: str
    versions: tuple[str, ...]
    seen: str = ""


class AffectedEval(Frozen):
    """An evaluation report with items about the rows (`quotes` of them), of an affected run or version, or with labels taken
    from the rows."""

    id: str
    subject: str
    dataset: str
    quotes: int


class ErasurePlan(Frozen):
    """What an erasure changes. `outside`: source files outside the store that hold the rows → line numbers; `exported`:
    copies of the versions that left the store, and `sent`: rows of the same splits that were sent to other systems, which
    an erasure does not reach."""

    num_records: int
    num_near_duplicates: int
    datasets: tuple[AffectedDataset, ...]
    runs: tuple[AffectedRun, ...]
    versions: tuple[AffectedVersion, ...]
    aliases: dict[str, tuple[str, ...]]
    deployments: tuple[AffectedDeployment, ...]
    evals: tuple[AffectedEval, ...]
    outside: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]
    exported: tuple[ExportedCopy, ...] = ()
    sent: tuple[SentRows, ...] = ()
    num_answers: int = 0  # answers that endpoints keep
    variants: tuple[Variant, ...] = ()  # for a decision before the start; not kept, for they name records

    def stored(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"variants"})

    @property
    def worker_hours(self) -> float:
        return sum(run.worker_hours for run in self.runs if run.used and run.finished)

    @property
    def gpu_hours(self) -> float:
        return sum(run.gpu_hours for run in self.runs if run.used and run.finished)


def plan_of(catalog: Catalog, reached: ReachedRecords) -> ErasurePlan:
    """Everything that was derived from the records. Changes nothing."""
    manifests = {manifest.id: manifest for manifest in catalog.all(DatasetManifest)}
    counts: dict[str, dict[str, int]] = {}
    outside: dict[str, set[int]] = {}
    for dataset, places in reached.places.items():
        counts[dataset] = dict(Counter(place.split for place in places))
        for place in places:
            outside.setdefault(place.file, set()).add(place.line)
    datasets = tuple(AffectedDataset(id=key, name=manifests[key].name, held=held) for key, held in sorted(counts.items()))
    runs, versions = _made_of(catalog, datasets, reached.places)
    withdrawn = {version.id for version in versions}
    aliases = standing_for(catalog, withdrawn)
    return ErasurePlan(
        num_records=len(reached.asked),
        num_near_duplicates=len(reached.near),
        datasets=datasets,
        runs=runs,
        versions=versions,
        aliases=aliases,
        deployments=_deployments(catalog, withdrawn, aliases),
        evals=_evals(catalog, datasets, {*withdrawn, *(run.id for run in runs if run.used)}, reached.records.__contains__),
        outside={name: tuple(sorted(lines)) for name, lines in sorted(outside.items())},
        notes=reached.notes,
        exported=exported(catalog, withdrawn),
        sent=sent_of(catalog, datasets),
        num_answers=reached.num_answers,
        variants=reached.variants,
    )


def extended(catalog: Catalog, plan: ErasurePlan, changed: set[str]) -> ErasurePlan:
    """The plan extended by what was derived from the datasets in `changed`, whose training rows differ after the rebuild."""
    if not changed:
        return plan
    datasets = tuple(one.model_copy(update={"changed": one.id in changed}) for one in plan.datasets)
    runs, versions = _made_of(catalog, datasets, {})
    before = {run.id: run for run in plan.runs}
    runs = tuple(before[run.id].model_copy(update={"used": run.used}) if run.id in before else run for run in runs)
    ids = {version.id for version in versions}
    changes = {"datasets": datasets, "runs": runs, "versions": versions, "aliases": standing_for(catalog, ids)}
    return plan.model_copy(update=changes | {"exported": exported(catalog, ids)})


def late_plan(
    catalog: Catalog, plans: Sequence[ErasurePlan], datasets: dict[str, dict[str, int]], is_erased: Callable[[str], bool]
) -> ErasurePlan | None:
    """What was published from erased rows after the plans were made, by a look at the store: dataset versions with the rows
    (`datasets`), and what was derived from these and from those of the plans. None where there is nothing."""
    catalog.sync()
    before = {one.id: one for plan in plans for one in plan.datasets}
    manifests = {manifest.id: manifest for manifest in catalog.all(DatasetManifest)}
    late = tuple(
        AffectedDataset(id=key, name=manifests[key].name, held=held)
        for key, held in sorted(datasets.items())
        if key in manifests
    )
    everything = (*before.values(), *(one for one in late if one.id not in before))
    runs, versions = _made_of(catalog, everything, {})
    all_versions = {version.id for version in versions}
    used = {run.id for run in runs if run.used}
    planned_runs = {run.id for plan in plans for run in plan.runs}
    planned = {version.id for plan in plans for version in plan.versions}
    runs = tuple(run for run in runs if run.id not in planned_runs and (run.used or run.dataset in datasets))
    versions = tuple(version for version in versions if version.id not in planned)
    evals = _evals(catalog, everything, all_versions | used, is_erased)
    if not (late or runs or versions or evals):
        return None
    ids = {version.id for version in versions}
    aliases = standing_for(catalog, ids)
    return ErasurePlan(
        num_records=0,
        num_near_duplicates=0,
        datasets=late,
        runs=runs,
        versions=versions,
        aliases=aliases,
        deployments=_deployments(catalog, ids, aliases),
        evals=evals,
        outside={},
        notes=(),
        exported=exported(catalog, ids),
        sent=sent_of(catalog, late),
    )


def sent_of(catalog: Catalog, datasets: Iterable[AffectedDataset]) -> tuple[SentRows, ...]:
    """What was sent to other systems of the splits that hold the rows."""
    return sent(catalog, {(one.id, split) for one in datasets for split in one.held})


def standing_for(catalog: Catalog, versions: set[str]) -> dict[str, tuple[str, ...]]:
    """Alias → those of `versions` that its route names in any role."""
    routes = sorted(catalog.routes().items())
    return {name: hit for name, route in routes if (hit := tuple(one for one in versions_of(route) if one in versions))}


def _made_of(
    catalog: Catalog, datasets: tuple[AffectedDataset, ...], places: dict[str, list[Place]]
) -> tuple[tuple[AffectedRun, ...], tuple[AffectedVersion, ...]]:
    """Runs on the datasets, versions of those runs, runs that start from those versions, and so on."""
    holding = {dataset.id for dataset in datasets}
    may = {dataset.id for dataset in datasets if dataset.changed or any(map(dataset.held.get, TRAINED_ON))}
    runs, versions = catalog.all(RunRecord), catalog.all(ModelVersion)
    by_id = {dataset.id: dataset for dataset in datasets}
    decided = {run.id for run in runs if run.dataset in holding and by_id[run.dataset].decides(run.config["train"])}
    facts = StoreUses.of(catalog)
    unfinished = [run for run in facts.runs.values() if not catalog.has(run.run)]
    used = {run.run for run in unfinished if run.dataset in may}
    affected: set[str] = set()
    while True:
        more = {run.id for run in runs if run.id in decided} - used
        more |= {run.run for run in facts.runs.values() if not affected.isdisjoint(run.starts_from)} - used
        used |= more
        new = {
            v.id for v in versions if v.run in used or v.base_model in affected or (not v.run and v.dataset in may)
        } - affected
        affected |= new
        if not more and not new:
            break
    records = {run.id: run for run in runs}
    listed = [
        _run(catalog, run, records.get(run.run), run.run in used, places.get(run.dataset, []))
        for run in (*(facts.runs[run.id] for run in runs), *unfinished)
        if run.run in used or run.dataset in holding
    ]
    return tuple(listed), tuple(
        AffectedVersion(id=v.id, name=v.name, status=v.status, weights=v.weights, run=v.run)
        for v in versions
        if v.id in affected
    )


def _run(catalog: Catalog, run: Run, record: RunRecord | None, used: bool, places: list[Place]) -> AffectedRun:
    """`record` is None for a run that has not finished: what it did is not known, and it may go on."""
    steps: list[int] = []
    hours = gpus = 0.0
    if record is not None:
        manifest = catalog.get_as(DatasetManifest, record.dataset)
        inside = index.rows_with(catalog.store, manifest, places) if places else {}
        rows = sorted({row for rows in inside.values() for row in rows})
        steps = sorted({step for use in run.trained_on(manifest, "", rows) for step in use.steps}) if rows else []
        workers = max((attempt["world_size"] for attempt in record.attempts), default=1)
        hours = record.metrics.get("seconds", 0.0) / 3600 * workers
        gpus = record.config["train"].get("scaling", {}).get("gpus_per_worker", 0)
    return AffectedRun(
        id=run.run,
        name=run.name,
        dataset=run.dataset,
        base_model=run.base_model,
        used=used,
        finished=record is not None,
        adapter=record is not None and record.export_kind == "adapter",
        num_steps=record.num_steps if record is not None else 0,
        steps=len(steps),
        first_step=steps[0] if steps else 0,
        last_step=steps[-1] if steps else 0,
        worker_hours=hours,
        gpu_hours=hours * gpus,
        begun=(record.initial_adapter if record is not None else "") or merged_from(catalog, run.base_model),
        frozen=run.frozen_model,
    )


def merged_from(catalog: Catalog, version: str) -> str:
    """The adapter version of which a `merged` version is the sum with its base; "" for other versions."""
    record = catalog.get(version) if catalog.has(version) else None
    return record.base_model if isinstance(record, ModelVersion) and record.status == "merged" else ""


def _deployments(
    catalog: Catalog, withdrawn: set[str], aliases: dict[str, tuple[str, ...]]
) -> tuple[AffectedDeployment, ...]:
    affected = []
    for record in catalog.all(Deployment):
        now = {version for name in record.models for version in aliases.get(name, ())}
        hit = tuple(sorted((now | {record.model_version, *record.models.values()}) & withdrawn))
        if hit:
            endpoint = state_of(catalog, record.id)
            affected.append(
                AffectedDeployment(id=record.id, name=record.name, state=endpoint.state, versions=hit, seen=endpoint.seen)
            )
    return tuple(affected)


def _evals(
    catalog: Catalog, datasets: tuple[AffectedDataset, ...], subjects: set[str], is_erased: Callable[[str], bool]
) -> tuple[AffectedEval, ...]:
    affected = []
    holding = {dataset.id: dataset.held for dataset in datasets}
    for report in catalog.all(EvalReport):
        path = paths.items(report.id)
        if not catalog.store.exists(path):
            continue
        held = holding.get(report.dataset, {})
        scored = any(dataset in holding for dataset, _ in splits_of(report))
        quotes = closure.quoting(catalog.store.read(path), is_erased) if scored else 0
        labelled = report.config.get("labels") == "from_data" and bool(held.get("train"))
        if quotes or labelled or report.subject in subjects:
            affected.append(AffectedEval(id=report.id, subject=report.evaluated, dataset=report.dataset, quotes=quotes))
    return tuple(affected)
