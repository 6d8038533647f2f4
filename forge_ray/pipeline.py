"""The whole product on one page: prepare → train → evaluate → release → deploy.

Every step looks first whether its result is already in the store (ids are hashes of what decides the result), so a second
call builds nothing again and a call after a crash goes on where the first one stopped.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from forge_ray.config.base import config_digest, parse, resolved
from forge_ray.config.release import DeployConfig, EvalConfig, LeakConfig
from forge_ray.config.run import RunConfig
from forge_ray.errors import ConfigError, NotFound, TrainingError
from forge_ray.evaluate import reports
from forge_ray.machine.cluster import connect, open_store, room_of_a_worker
from forge_ray.machine.hardware import resolve_precision
from forge_ray.progress import Stage, stage
from forge_ray.records import (
    DatasetManifest,
    Deployment,
    EvalReport,
    Event,
    ModelVersion,
    RunRecord,
    files_digest,
)
from forge_ray.release import gate
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

if TYPE_CHECKING:
    from forge_ray.data.read.ingest import IndexedFile

__all__ = ["Outcome", "deploy", "evaluate", "open_store", "prepare", "release", "run", "train"]


@dataclass(frozen=True)
class Outcome:
    """Everything that one run of the pipeline made or found."""

    dataset: DatasetManifest
    run: RunRecord
    base_report: EvalReport
    report: EvalReport
    version: ModelVersion
    deployment: Deployment | None


def run(config: RunConfig, store: Store) -> Outcome:
    """All steps of a run file; a version that its gate rejects is registered and not deployed."""
    dataset = prepare(config, store)
    record = train(config, store)
    base_report, report = evaluate(config, store)
    version = release(config, store)
    deployment = deploy(config.deploy, store) if config.deploy and version.status == "accepted" else None
    return Outcome(dataset, record, base_report, report, version, deployment)


def import_base(config: RunConfig, catalog: Catalog) -> ModelVersion:
    """The base model of a run file: a version or alias of the store, else a path that is imported now."""
    try:
        return catalog.model(config.base_model)
    except NotFound:
        if not Path(config.base_model).expanduser().exists():
            raise
    from forge_ray.models.import_model import import_model

    with stage("import") as it:
        version = import_model(catalog, config.base_model, Path(config.base_model).stem.lower(), config.licence)
        it.done(f"{version.id}  {version.name}")
        return version


def prepare(config: RunConfig, store: Store) -> DatasetManifest:
    """Raw rows → packed dataset version."""
    with Catalog(store) as catalog:
        return _prepare(config, catalog)


def _prepare(config: RunConfig, catalog: Catalog, quiet: bool = False) -> DatasetManifest:
    base = import_base(config, catalog)
    connect()
    from forge_ray.data.build import tombstones as erased
    from forge_ray.data.build import work
    from forge_ray.data.build.build import index_sources, input_digest
    from forge_ray.data.dataset import index
    from forge_ray.data.dataset.version import require_tokenizer, tokenizer_digest

    require_tokenizer(catalog.store, base)

    def known_version(sources: list[IndexedFile]) -> DatasetManifest | None:
        wanted = input_digest(config.data, sources, tokenizer_digest(base), erased.tombstones(catalog.store))
        found = next((found for found in catalog.all(DatasetManifest) if found.input_digest == wanted), None)
        if found or not (noted := work.finished(catalog.store, work.inputs(wanted))):
            return found
        return catalog.get_as(DatasetManifest, noted["dataset"])

    if quiet and (known := known_version(index_sources(config.data))):
        return known
    with stage("prepare") as it:
        sources = index_sources(config.data, it.update)
        known = known_version(sources)
        found = known or _built(config, catalog, base, sources, it)
        if known is None:
            index.build(catalog.store, found)
        counts = ", ".join(f"{name} {stats.num_records}" for name, stats in found.splits.items())
        counts += f", {sum(found.rejects.values())} quarantined" if found.rejects else ""
        dropped = sum(step.before - step.after for step in found.curation)
        counts += f", {dropped} dropped by rules" if dropped else ""
        left_out = sum(map(len, found.erased.values()))
        counts += f", {left_out} erased" if left_out else ""
        it.done(f"{found.id}  {'already built' if known else counts}")
    return found


def _built(
    config: RunConfig, catalog: Catalog, base: ModelVersion, sources: list[IndexedFile], it: Stage
) -> DatasetManifest:
    from forge_ray.data.build import tombstones as erased
    from forge_ray.data.build import work
    from forge_ray.data.build.build import build

    catalog.check_may("datasets")  # who may not is told now, not when the rows are packed
    while True:
        known, mark = erased.tombstones(catalog.store), work.mark(catalog.store)
        try:
            made = build(config.name, config.data, base, catalog.store, sources, it.update)
        except Exception:
            if catalog.store.exists(mark):
                raise
            it.update(0, 1, "once more: the work area was emptied meanwhile")
            continue
        finally:
            catalog.store.delete(mark)
        if erased.tombstones(catalog.store) == known:
            break
        if not catalog.has(made.id):  # rows were erased meanwhile, and this may hold some: nobody has seen it yet
            catalog.store.delete_dir(paths.dataset(made.id))
    found = catalog.put(made)
    if found.input_digest != made.input_digest:  # erasures that touch none of its rows: found by these inputs as well
        work.finish(catalog.store, work.inputs(made.input_digest), {"dataset": found.id})
    return found


def train(config: RunConfig, store: Store) -> RunRecord:
    """Dataset + base model → run record; an unfinished run of the same settings is resumed."""
    precision = resolve_precision(config.train.precision, config.train.scaling.gpus_per_worker > 0)
    with Catalog(store) as catalog:
        base = import_base(config, catalog)
        catalog.refuse_withdrawn(base.id)
        manifest = _prepare(config, catalog, quiet=True)
        if not manifest.splits["train"].num_rows:
            kinds = ", ".join(f"{count} {kind}" for kind, count in manifest.kinds.items())
            raise TrainingError(
                f"{manifest.id} has no packed rows: it holds {kinds}; {config.train.method} takes chats and texts",
                hint="give the run file sources of chat or text rows",
            )
        validation = config.train.validation
        if (validation.early_stopping or validation.keep_best or config.train.export_step == "best") and not (
            "validation" in manifest.splits and manifest.splits["validation"].num_rows
        ):
            raise ConfigError(
                f"{manifest.id} has no validation rows: nothing says which checkpoint is the best, or when to stop",
                hint="set data.splits.validation, or leave out keep_best, early_stopping and export_step=best",
            )
        return train_on(config, catalog, base, manifest, precision)


def train_on(
    config: RunConfig, catalog: Catalog, base: ModelVersion, manifest: DatasetManifest, precision: Literal["bf16", "fp32"]
) -> RunRecord:
    """Train on what the store holds; the sources of the rows are not looked at."""
    from forge_ray.release.candidates import export_best
    from forge_ray.train import attempts, follow, launch
    from forge_ray.train.job import TrainJob, run_id
    from forge_ray.train.loop import train_loop
    from forge_ray.train.preflight import refuse_impossible, report_reach
    from forge_ray.train.record import run_record
    from forge_ray.train.sinks import open_sinks
    from forge_ray.train.validating import validate_checkpoint

    store, identifier = catalog.store, run_id(config.train, precision, manifest, base)
    with stage("train") as it:
        if catalog.has(identifier):
            made = [version.id for version in catalog.all(ModelVersion) if version.run == identifier]
            it.done(f"{identifier}  already trained" + (f": {', '.join(made)}" if made else ", no version made of it yet"))
            return catalog.get_as(RunRecord, identifier)
        if config.train.scaling.max_workers:
            connect()
        if not store.exists(paths.result(identifier)):
            refuse_impossible(config, store, precision, base, manifest, identifier)
        store.fetch_dir(paths.dataset(manifest.id))  # every byte is checked before a GPU hour is spent on it
        job = TrainJob(identifier, config.name, config.train, store, manifest, base, precision, under_ray=False)
        store.write_once(paths.run(identifier, f"config-{_config_key(config)}.json"), _pretty(config))
        report_reach(store, identifier, base, config.train.adapter)
        tags = {"forge.dataset": manifest.id, "forge.base_model": base.id}
        sinks = open_sinks(store, identifier, config.name, config.train, tags)
        if not store.exists(paths.result(identifier)):
            catalog.append(Event(kind="run", subject=identifier, data={"state": "running", "pid": os.getpid()}))
            try:
                with attempts.driving(store, identifier), follow.followed(it, store, identifier, sinks):
                    launch.fit(train_loop, job, validate_checkpoint)
            except TrainingError as error:
                catalog.append(Event(kind="run", subject=identifier, data={"state": "failed", "why": error.message}))
                sinks.close(failed=True)
                raise
        sinks.close(failed=False)
        export_best(job)
        record = catalog.put(run_record(job, config))
        catalog.append(Event(kind="run", subject=identifier, data={"state": "succeeded"}))
        speed = f"{record.metrics['tokens_per_s']:.0f} tokens/s"
        told = f"{record.num_steps} steps{follow.early(record)}, loss {record.metrics['loss']:.3f}, {speed}"
        it.done(f"{record.id}  {told}{follow.trouble(record)}")
        return record


def plan(
    config: RunConfig,
    store: Store,
    workers: int,
    memory_gb: float,
    tokens_per_s: float,
    cost_per_hour: float,
    rows: int = 0,
) -> dict[str, Any]:
    """What a run will take. The dataset is prepared first if it is not: all else follows from its numbers. With `rows`, so
    many full rows are taken instead, and `base_model` may be a folder that holds `config.json` alone."""
    from forge_ray.train.plan import Model, Stated
    from forge_ray.train.preflight import configuration, disk_bytes, judge

    train, precision = config.train, resolve_precision(config.train.precision, config.train.scaling.gpus_per_worker > 0)
    number = workers or max(train.scaling.max_workers, 1)
    manifest: DatasetManifest | Stated
    if rows and (Path(config.base_model) / "config.json").is_file():
        base_model, dataset = config.base_model, f"{rows} rows, as stated"
        model, manifest = Model.of(Path(config.base_model)), Stated.of(rows, config.data.sequence_length)
    else:
        with Catalog(store) as catalog:
            base = import_base(config, catalog)
            manifest = Stated.of(rows, config.data.sequence_length) if rows else _prepare(config, catalog, quiet=True)
        base_model, dataset = base.id, manifest.id if isinstance(manifest, DatasetManifest) else f"{rows} rows, as stated"
        model = Model.of(configuration(store, base))
    if memory_gb:
        room: int | None = int(memory_gb * 1e9)
    else:
        of = train.scaling.model_copy(update={"num_workers": workers}) if workers else train.scaling
        if of.max_workers:
            connect()
        room = room_of_a_worker(of)
    found, problem, remedy = judge(train, store, precision, model, manifest, number, room)
    seconds = found.num_tokens / (tokens_per_s * number) if tokens_per_s else None
    return {
        **vars(found),
        "disk_bytes": disk_bytes(train, found),
        "memory": vars(found.memory) | {"total": found.memory.total},
        "room": room,
        "base_model": base_model,
        "dataset": dataset,
        "adapter": model.coverage(train.adapter).to_json() if train.adapter else None,
        "reaches": model.coverage(train.adapter).lines() if train.adapter else [],
        "precision": precision,
        "num_workers": number,
        "seconds": seconds,
        "cost": seconds / 3600 * number * cost_per_hour if seconds is not None and cost_per_hour else None,
        "problem": problem,
        "remedy": remedy,
    }


def _config_key(config: RunConfig) -> str:
    return config_digest(config)[len("sha256:") :][:16]


def _pretty(config: RunConfig) -> bytes:
    return (json.dumps(resolved(config), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def evaluate(config: RunConfig, store: Store) -> tuple[EvalReport, EvalReport]:
    """(base, tuned) on the same held-out rows, under the same scoring; and the leak audit, where eval.leak asks for it."""
    record = train_record(config, store)
    with Catalog(store) as catalog:
        found = reports.evaluate_both(catalog, record, config.eval)
        if config.eval.leak:
            reports.audit_leak(catalog, record, config.eval)
        return found


def train_record(config: RunConfig, store: Store) -> RunRecord:
    """The finished run of this run file, without starting one."""
    from forge_ray.train.job import run_id

    with Catalog(store) as catalog:
        base = import_base(config, catalog)
        manifest = _prepare(config, catalog, quiet=True)
        precision = resolve_precision(config.train.precision, config.train.scaling.gpus_per_worker > 0)
        identifier = run_id(config.train, precision, manifest, base)
        if not catalog.has(identifier):
            raise NotFound(f"{identifier} of this run file is not finished", hint="run `forge train` on it first")
        return catalog.get_as(RunRecord, identifier)


def audit_leak(reference: str, store: Store, settings: dict[str, Any]) -> EvalReport:
    """What a finished run, or a version made of one, gives away of its training rows; `settings` (of eval.leak) go before
    those of its run file."""
    from forge_ray.store.resolve import resolve

    with Catalog(store) as catalog:
        found = catalog.get(resolve(catalog, reference))
        run = found.run if isinstance(found, ModelVersion) else found.id
        if not run or not catalog.has(run):
            raise NotFound(
                f"{reference} has no finished run here, so its training rows are not known",
                hint="give a run (`forge runs list`), or a version that was released from one",
            )
        record = catalog.get_as(RunRecord, run)
        config = parse(EvalConfig, record.config["eval"])
        leak = parse(LeakConfig, resolved(config.leak or LeakConfig()) | settings, where="eval.leak")
        config = config.model_copy(update={"leak": leak})
        if isinstance(found, ModelVersion) and found.files_digest != files_digest(record.export):
            return reports.audit_leak(catalog, record, config, subject=reports.model_subject(found), num_steps=found.step)
        return reports.audit_leak(catalog, record, config)


def release(config: RunConfig, store: Store, promote: bool = True) -> ModelVersion:
    """Gate the run's export and register it: accepted and (with `promote`) the alias moved, or rejected with the reasons."""
    record = train_record(config, store)
    with Catalog(store) as catalog:
        base_report, report = reports.evaluate_both(catalog, record, config.eval, quiet=True)
        leak = reports.audit_leak(catalog, record, config.eval, quiet=True) if config.eval.leak else None
        manifest = catalog.get_as(DatasetManifest, record.dataset)
        incumbents: dict[str, EvalReport | None] = {"base": base_report}
        for name in gate.incumbents_of(config.release.gate):
            if name not in incumbents:
                incumbents[name] = reports.incumbent(catalog, name, record, manifest, config.eval)
        with stage("release") as it:
            checks = gate.checks(config.release.gate, report, incumbents, leak)
            reasons = gate.reasons(checks)
            version = ModelVersion(
                name=config.name,
                status="rejected" if reasons else "accepted",
                reasons=reasons,
                weights=record.export_kind,
                files=record.export,
                files_digest=files_digest(record.export),
                base_model=record.base_model,
                run=record.id,
                evals=_ids(report, base_report, leak, *incumbents.values()),
                checks=checks,
                licence=catalog.get_as(ModelVersion, record.base_model).licence,
            ).sealed()
            store.copy_dir(paths.export(record.id), paths.model(version.id))
            known = catalog.has(version.id)
            version = catalog.put(version)
            if reasons:
                it.done(f"{version.id}  rejected: {'; '.join(reasons)}")
            else:
                if promote:
                    catalog.promote(version.id, config.release.alias)
                where = f" → {config.release.alias}" if promote else ""
                it.done(f"{version.id}  {'already ' if known else ''}accepted{where}")
            return version


def _ids(*found: EvalReport | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(report.id for report in found if report))


def deploy(config: DeployConfig, store: Store) -> Deployment:
    """A released model → an endpoint on the cluster that this process belongs to."""
    connect()
    from forge_ray.serve.deploy import deploy as start

    with stage("deploy") as it, Catalog(store) as catalog:
        deployment = start(config, catalog)
        names = ", ".join(config.models)
        it.done(f"{deployment.id}  http://{config.host}:{config.port}/v1  serves {names}")
        return deployment
