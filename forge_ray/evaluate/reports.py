"""Reports of the store: the one that is there, else a task that makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from forge_ray.config.release import EvalConfig
from forge_ray.machine.cluster import connect
from forge_ray.progress import stage
from forge_ray.records import DatasetManifest, EvalReport, ModelVersion, RunRecord, files_digest
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog

if TYPE_CHECKING:
    from forge_ray.evaluate.score import EvaluatedModel


def evaluate_both(
    catalog: Catalog, record: RunRecord, config: EvalConfig, quiet: bool = False
) -> tuple[EvalReport, EvalReport]:
    """(base, tuned) of a run, on the rows that its dataset holds out."""
    manifest = catalog.get_as(DatasetManifest, record.dataset)
    base = model_subject(catalog.get_as(ModelVersion, record.base_model))
    return (
        evaluate(catalog, base, manifest, config, "base", quiet),
        evaluate(catalog, run_subject(record), manifest, config, "tuned", quiet),
    )


def model_subject(version: ModelVersion) -> EvaluatedModel:
    from forge_ray.evaluate.score import EvaluatedModel

    if version.weights == "adapter":
        return EvaluatedModel(version.id, version.files_digest, paths.model(version.base_model), paths.model(version.id))
    return EvaluatedModel(version.id, version.files_digest, paths.model(version.id))


def run_subject(record: RunRecord) -> EvaluatedModel:
    from forge_ray.evaluate.score import EvaluatedModel

    export = paths.export(record.id)
    if record.export_kind == "adapter":
        return EvaluatedModel(record.id, files_digest(record.export), paths.model(record.base_model), export)
    return EvaluatedModel(record.id, files_digest(record.export), export)


def evaluate(
    catalog: Catalog, subject: EvaluatedModel, manifest: DatasetManifest, config: EvalConfig, what: str, quiet: bool = False
) -> EvalReport:
    from forge_ray.evaluate.safety import read_prompts
    from forge_ray.evaluate.score import evaluate as run_evaluation

    """Scores of `subject` on `manifest`; found again by the settings that decide them, the safety files' bytes included."""
    prompts, digests = read_prompts(config.safety)
    settings = config.scoring() | ({"safety": digests} if digests else {})
    arguments = (subject, manifest, config, prompts, settings)
    return _report(catalog, (subject.id, manifest.id, settings), config, run_evaluation, arguments, what, quiet)


def _report(
    catalog: Catalog,
    wanted: tuple[str, str, dict[str, Any]],
    config: EvalConfig,
    make: Callable[..., Any],
    arguments: tuple[Any, ...],
    what: str,
    quiet: bool,
) -> EvalReport:
    """The report of (subject, dataset, settings): the one that is there, else what `make` yields in a task."""
    known = next((r for r in catalog.all(EvalReport) if (r.subject, r.dataset, r.config) == wanted), None)
    if known and quiet:
        return known
    with stage("evaluate") as it:
        if known:
            it.done(f"{known.id}  {what}: already evaluated")
            return known
        catalog.check_may("evals")
        connect()
        import ray

        task = ray.remote(num_cpus=config.cpus, num_gpus=config.gpus, max_retries=1)(make)
        report: EvalReport | None = None
        updates: Any = task.options(num_returns="streaming").remote(catalog.store, *arguments)
        for reference in updates:
            update = ray.get(reference)
            if "report" in update:
                report = EvalReport.model_validate(update["report"])
            else:
                it.update(update["done"], update["total"], f"{what}: {update['done']}/{update['total']} examples")
        assert report is not None
        scores = ", ".join(f"{name} {value:.3f}" for name, value in report.metrics.items())
        it.done(f"{report.id}  {what}: {scores}")
        return catalog.put(report)


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
    subject = subject or run_subject(record)
    base = model_subject(catalog.get_as(ModelVersion, record.base_model))
    manifest, facts = catalog.get_as(DatasetManifest, record.dataset), facts_of(catalog.store, record.id)
    training = TrainedOrder(facts.rows, facts.order, num_steps or record.export_step or record.num_steps)
    leak = config.leak.model_dump(mode="json")
    settings = {"leak": leak, "engine": config.engine.model_dump(mode="json"), "num_steps": training.num_steps}
    arguments = (subject, base, manifest, training, config, settings)
    return _report(catalog, (subject.id, manifest.id, settings), config, audit, arguments, "leak", quiet)


def incumbent(
    catalog: Catalog, name: str, record: RunRecord, manifest: DatasetManifest, config: EvalConfig
) -> EvalReport | None:
    """The rival's report; None where the alias points nowhere yet, or at this very run."""
    if name not in catalog.aliases() and not catalog.has(name):
        return None
    version = catalog.model(name)
    if version.run == record.id or version.id in catalog.withdrawn():
        return None  # a version that learned from erased rows is no rival: it must go in any case
    return evaluate(catalog, model_subject(version), manifest, config, name)
