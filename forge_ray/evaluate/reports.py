"""Reports of the store: the one that is there, else a task that makes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from forge_ray.config.base import parse, resolved
from forge_ray.config.measurements import LeakConfig
from forge_ray.config.release import EvalConfig
from forge_ray.errors import DataError, NotFound
from forge_ray.machine.capacity import Demand, wait_for
from forge_ray.machine.cluster import connect
from forge_ray.progress import stage, visible
from forge_ray.records import DatasetManifest, EvalReport, FileEntry, ModelVersion, RunRecord, files_digest
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.erased import refuse_erased
from forge_ray.store.removed import require
from forge_ray.store.resolve import resolve
from forge_ray.store.uses import using

if TYPE_CHECKING:
    from forge_ray.evaluate.sample_size import Spread
    from forge_ray.evaluate.score import EvaluatedModel
    from forge_ray.train.checkpoint_export import CheckpointExport
    from forge_ray.train.job import TrainJob


def evaluate_both(
    catalog: Catalog, record: RunRecord, config: EvalConfig, quiet: bool = False
) -> tuple[EvalReport, EvalReport]:
    """(base, tuned) of a run, on the rows that its dataset holds out."""
    manifest = catalog.get_as(DatasetManifest, record.dataset)
    base = model_subject(catalog, catalog.get_as(ModelVersion, record.base_model))
    return (
        evaluate(catalog, base, manifest, config, "base", quiet),
        evaluate(catalog, run_subject(catalog, record), manifest, config, "tuned", quiet),
    )


def model_subject(catalog: Catalog, version: ModelVersion) -> EvaluatedModel:
    base = version.base_model if version.weights == "adapter" else ""
    subject = _subject(catalog, version.id, paths.model(version.id), version.files, base)
    is_of_run = version.run and catalog.has(version.run)
    return replace(subject, start=_start_of(catalog, catalog.get_as(RunRecord, version.run))) if is_of_run else subject


def checkpoint_subject(catalog: Catalog, job: TrainJob, step: int, export: CheckpointExport) -> EvaluatedModel:
    """A checkpoint of a run, finished or not, from its export."""
    base = job.base.id if export.kind == "adapter" else ""
    subject = _subject(catalog, job.run, export.folder, catalog.store.files(export.folder), base)
    return replace(subject, step=step, start=_start_weights(job.base, job.initial))


def run_subject(catalog: Catalog, record: RunRecord) -> EvaluatedModel:
    base = record.base_model if record.export_kind == "adapter" else ""
    subject = _subject(catalog, record.id, paths.export(record.id), record.export, base)
    return replace(subject, start=_start_of(catalog, record))


def _start_of(catalog: Catalog, record: RunRecord) -> EvaluatedModel:
    initial = catalog.get_as(ModelVersion, record.initial_adapter) if record.initial_adapter else None
    return _start_weights(catalog.get_as(ModelVersion, record.base_model), initial)


def _start_weights(base: ModelVersion, initial: ModelVersion | None) -> EvaluatedModel:
    from forge_ray.evaluate.score import EvaluatedModel

    more = (paths.model(initial.id), initial.files) if initial else ()
    return EvaluatedModel((initial or base).id, (initial or base).files_digest, paths.model(base.id), base.files, *more)


def _subject(catalog: Catalog, identifier: str, folder: str, files: tuple[FileEntry, ...], base: str) -> EvaluatedModel:
    """`base`: the model under an adapter; "" for full weights."""
    from forge_ray.evaluate.score import EvaluatedModel

    if not base:
        return EvaluatedModel(identifier, files_digest(files), folder, files)
    base_files = catalog.get_as(ModelVersion, base).files
    return EvaluatedModel(identifier, files_digest(files), paths.model(base), base_files, folder, files)


def evaluate(
    catalog: Catalog, subject: EvaluatedModel, manifest: DatasetManifest, config: EvalConfig, what: str, quiet: bool = False
) -> EvalReport:
    """Scores of `subject` on `manifest`, and on the general rows of eval.general; found again by the settings that decide
    them, the bytes of their files and the general rows' dataset version included."""
    from forge_ray.evaluate.general import general_rows, refuse_trained
    from forge_ray.evaluate.score import evaluate as run_evaluation
    from forge_ray.evaluate.scoring_files import files_of

    files, digests = files_of(config)
    settings = config.scoring() | digests
    if (general := general_rows(catalog, manifest, config)) and config.general:
        settings |= {"general": {"dataset": general.id, "max_examples": config.general.max_examples}}
    arguments = (subject, manifest, config, files, settings, general)
    key = (subject.id, manifest.id, settings)
    same = (r for r in reports_of(catalog, key) if r.step == subject.step)
    if subject.step:  # a run that went back behind a step writes another checkpoint of it
        same = (r for r in same if r.subject_digest == subject.digest)
    existing = next((r for r in same if is_whole(catalog, r, manifest, config)), None)
    if general and not existing:
        refuse_trained(catalog.store, general, manifest)
    return _report(catalog, key, config, run_evaluation, arguments, what, quiet, existing, general)


def refuse_unusable(config: EvalConfig) -> None:
    """Raises where a file that the evaluation needs cannot be used: hours of training would come before it."""
    from forge_ray.evaluate.own import check_loads
    from forge_ray.evaluate.scoring_files import files_of

    files, _ = files_of(config)
    check_loads(files.functions)


def refuse_empty_split(manifest: DatasetManifest, config: EvalConfig) -> None:
    """Raises `DataError` where a run on this dataset could be trained, and then not be evaluated."""
    stats = manifest.splits.get(config.split)
    if not (stats and stats.num_records):
        raise DataError(
            f"{manifest.id} has no records in its {config.split} split: a run on it could not be evaluated or released",
            hint=f"raise data.splits.{config.split}, add rows, or evaluate the other split with eval.split",
        )


def reports_of(catalog: Catalog, key: tuple[str, str, dict[str, Any]]) -> Iterator[EvalReport]:
    return (r for r in catalog.all(EvalReport) if (r.subject, r.dataset, r.config) == key)


def is_whole(catalog: Catalog, report: EvalReport, manifest: DatasetManifest, config: EvalConfig) -> bool:
    """Whether a report is of every held-out row. Those of earlier versions, which have no intervals, left texts and calls
    out without a word."""
    from forge_ray.evaluate.examples import held_out

    if report.intervals or report.left_out:
        return True
    rows = held_out(catalog.store, manifest, config)
    return report.num_examples == len(rows.chats) + len(rows.texts)


def _report(
    catalog: Catalog,
    key: tuple[str, str, dict[str, Any]],
    config: EvalConfig,
    make: Callable[..., Any],
    arguments: tuple[Any, ...],
    what: str,
    quiet: bool,
    existing: EvalReport | None,
    general: DatasetManifest | None = None,
) -> EvalReport:
    """The report of (subject, dataset, settings): the one that is there, else what `make` yields in a task."""
    if existing and quiet:
        return existing
    with stage("evaluate") as it:
        if existing:
            it.done(f"{existing.id}  {what}: already evaluated")
            return existing
        catalog.check_may("evals")
        subject, dataset, _ = key
        datasets = dict.fromkeys([dataset, *([general.id] if general else [])])
        for read in datasets:
            refuse_erased(catalog.store, f"the evaluation of {subject}", read, subject)
        model: EvaluatedModel = arguments[0]
        start = (model.start.folder, model.start.adapter) if config.kl and model.start else ()
        folders = [folder for folder in (model.folder, model.adapter, *start, *map(paths.dataset, datasets)) if folder]
        require(catalog, *folders)
        connect()
        import ray

        wait_for(task_demand(config))
        task = ray.remote(num_cpus=config.cpus, num_gpus=config.gpus, max_retries=1)(make)
        report: EvalReport | None = None
        with using(catalog.store, f"evaluation of {subject}", *folders):
            updates: Any = task.options(num_returns="streaming").remote(catalog.store, *arguments)
            for reference in updates:
                update = ray.get(reference)
                if "report" in update:
                    report = EvalReport.model_validate(update["report"])
                else:
                    it.update(update["done"], update["total"], f"{what}: {update['done']}/{update['total']} examples")
        assert report is not None
        for read in datasets:
            refuse_erased(catalog.store, report.id, read, subject, paths.report(report.id))
        scores = ", ".join(f"{name} {value:.3f}" for name, value in report.metrics.items())
        it.done(f"{report.id}  {what}: {scores}")
        for name, why in report.unreached.items():
            line = f"  threshold {visible(name)} has none, and holds from one half: {why}"
            print(line, file=sys.stderr, flush=True)
        if config.kl and "kl" not in report.metrics:
            why = "no held-out answer can be put to it" if model.start else "no run of this store made it"
            print(f"  kl is not measured of {visible(what)}: {why}", file=sys.stderr, flush=True)
        return catalog.put(report)


def task_demand(config: EvalConfig) -> Demand:
    """What an evaluation asks of Ray."""
    return Demand("evaluation", 1, config.cpus, config.gpus, "eval.cpus and eval.gpus")


def audit_leak(
    catalog: Catalog,
    record: RunRecord,
    config: EvalConfig,
    quiet: bool = False,
    subject: EvaluatedModel | None = None,
    num_steps: int = 0,
) -> EvalReport:
    """What a run's export gives away of its training rows; or `subject`, a checkpoint of it after `num_steps`."""
    from forge_ray.evaluate.leak import TrainedOrder, audit
    from forge_ray.train.audit import facts_of

    assert config.leak is not None
    subject = subject or run_subject(catalog, record)
    base = model_subject(catalog, catalog.get_as(ModelVersion, record.base_model))
    manifest, facts = catalog.get_as(DatasetManifest, record.dataset), facts_of(catalog.store, record.id)
    training = TrainedOrder(facts.rows, facts.order, num_steps or record.export_step or record.num_steps)
    leak = config.leak.model_dump(mode="json")
    settings = {"leak": leak, "engine": config.engine.model_dump(mode="json"), "num_steps": training.num_steps}
    arguments = (subject, base, manifest, training, config, settings)
    key = (subject.id, manifest.id, settings)
    existing = next(reports_of(catalog, key), None)
    return _report(catalog, key, config, audit, arguments, "leak", quiet, existing)


def audit_leak_of(catalog: Catalog, reference: str, settings: dict[str, Any]) -> EvalReport:
    """What a finished run, or a version made of one, gives away of its training rows; `settings` (of eval.leak) go before
    those of its run file."""
    record = catalog.get(resolve(catalog, reference))
    run_id = record.run if isinstance(record, ModelVersion) else record.id
    if not run_id or not catalog.has(run_id):
        raise NotFound(
            f"{reference} has no finished run here, so its training rows are not known",
            hint="give a run (`forge runs list`), or a version that was released from one",
        )
    run = catalog.get_as(RunRecord, run_id)
    config = parse(EvalConfig, run.config["eval"])
    leak = parse(LeakConfig, resolved(config.leak or LeakConfig()) | settings, where="eval.leak")
    config = config.model_copy(update={"leak": leak})
    if isinstance(record, ModelVersion) and record.files_digest != files_digest(run.export):
        return audit_leak(catalog, run, config, subject=model_subject(catalog, record), num_steps=record.step)
    return audit_leak(catalog, run, config)


def measured_spreads(catalog: Catalog, name: str) -> dict[str, Spread]:
    """Metric → how its difference from the base model varied over the rows of the newest version of this name that has both
    reports; {} without one."""
    from forge_ray.evaluate.items import items_of, labels_of
    from forge_ray.evaluate.measures import paired
    from forge_ray.evaluate.sample_size import spread_of

    for version in reversed(list(catalog.all(ModelVersion))):
        ids = version.evals[:2] if version.name == name else ()
        if len(ids) < 2 or not all(catalog.has(one) and catalog.store.exists(paths.items(one)) for one in ids):
            continue
        tuned, base = (catalog.get_as(EvalReport, one) for one in ids)
        pairs = paired(items_of(catalog.store, tuned), items_of(catalog.store, base), labels_of(tuned))
        spreads = {metric: spread_of(*both) for metric, both in pairs.items()}
        return {metric: spread for metric, spread in spreads.items() if spread is not None}
    return {}


def incumbent(
    catalog: Catalog, name: str, record: RunRecord, manifest: DatasetManifest, config: EvalConfig
) -> EvalReport | None:
    """The rival's report; None where the alias points nowhere yet, or at this very run."""
    if name not in catalog.aliases() and not catalog.has(name):
        return None
    version = catalog.model(name)
    if version.run == record.id or version.id in catalog.withdrawn():
        return None  # a version that learned from erased rows is no rival: it must go in any case
    return evaluate(catalog, model_subject(catalog, version), manifest, config, name)
