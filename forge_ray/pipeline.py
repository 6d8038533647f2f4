"""The whole product on one page: prepare → train → evaluate → release → deploy.

Every step looks first whether its result is already in the store (ids are hashes of what decides the result), so a second
call builds nothing again and a call after a crash goes on where the first one stopped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from forge_ray.config.release import DeployConfig, EvalConfig
from forge_ray.config.run import RunConfig
from forge_ray.data.read.sources import expand
from forge_ray.errors import NotFound, TrainingError
from forge_ray.evaluate import general, reports
from forge_ray.evaluate.items import items_of
from forge_ray.machine import sessions
from forge_ray.machine.capacity import refuse_oversized
from forge_ray.machine.cluster import connect, open_store
from forge_ray.machine.hardware import resolve_precision
from forge_ray.progress import stage
from forge_ray.records import DatasetManifest, Deployment, EvalReport, Event, ModelVersion, RunRecord, files_digest
from forge_ray.release import gate, promotion
from forge_ray.serve.front import proxy_address, refuse_public
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.erased import refuse_erased
from forge_ray.store.files import Store
from forge_ray.store.home import expanded
from forge_ray.store.out_of_use import refuse_archived, refuse_withdrawn
from forge_ray.store.removed import require
from forge_ray.train.labels import report_labels

if TYPE_CHECKING:
    from forge_ray.evaluate.standalone import Compared
    from forge_ray.serve.gateway_config import GatewayConfig
    from forge_ray.train.frozen import FrozenModel
    from forge_ray.train.preflight import Assumptions, Estimate

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
    if config.deploy:
        refuse_public(config.deploy)
    reports.refuse_unusable(config.eval)
    with Catalog.open(store) as catalog:
        import_base(config, catalog)
    _refuse_absent(config)
    if config.eval.general:
        general.require_rows(config.eval.general)
    _refuse_unplaceable(config)
    dataset = prepare(config, store)
    reports.refuse_empty_split(dataset, config.eval)
    record = train(config, store)
    with Catalog.open(store) as catalog:
        base_report, report = _evaluate_run(config, catalog, record)
        version = _release_run(config, catalog, record)
    deployment = deploy(config.deploy, store) if config.deploy and version.status == "accepted" else None
    return Outcome(dataset, record, base_report, report, version, deployment)


def _refuse_absent(config: RunConfig) -> None:
    """An error where files of rows are not there, before Ray starts, which takes seconds; later the build lists them."""
    import ray

    if not ray.is_initialized():
        expand(config.data)


def _refuse_unplaceable(config: RunConfig) -> None:
    """`ConfigError` where a later stage asks for more than there is: hours of training would come before it."""
    from forge_ray.serve.deploy import replicas_demand
    from forge_ray.train.preflight import refuse_unplaceable

    connect()
    refuse_unplaceable(config.train)
    refuse_oversized(reports.task_demand(config.eval))
    if config.deploy:
        refuse_oversized(replicas_demand(config.deploy))


def import_base(config: RunConfig, catalog: Catalog) -> ModelVersion:
    """The base model of a run file: a version or alias of the store, else a path that is imported now."""
    try:
        return catalog.model(config.base_model)
    except NotFound:
        if not expanded(config.base_model).exists():
            raise
    from forge_ray.models.import_model import import_model

    with stage("import") as it:
        version = import_model(catalog, config.base_model, Path(config.base_model).stem.lower(), config.licence)
        it.done(f"{version.id}  {version.name}")
        return version


def prepare(config: RunConfig, store: Store) -> DatasetManifest:
    """Raw rows → packed dataset version; general rows → one of their own, for not all who evaluate may write one."""
    with Catalog.open(store) as catalog:
        manifest = _prepare(config, catalog, import_base(config, catalog))
        general.general_rows(catalog, manifest, config.eval)
        report_labels(store, config.train, manifest)
        return manifest


def _prepare(config: RunConfig, catalog: Catalog, named: ModelVersion, quiet: bool = False) -> DatasetManifest:
    """`named`: the base model of the run file. `quiet`: it may be there already, and whoever calls looks at the teacher."""
    from forge_ray.train import frozen, start

    _refuse_absent(config)
    base, data = start.full_base(catalog, named, config.train), start.with_held_out(catalog, named, config.data)
    if not quiet:
        frozen.frozen_of(catalog, config.train, base)
    connect()
    sessions.note(catalog.store)
    from forge_ray.data.build.prepare import existing_version, prepare_version
    from forge_ray.data.dataset.version import require_tokenizer

    require_tokenizer(catalog.store, base)
    if quiet and (manifest := existing_version(data, base, catalog)):
        return manifest
    with stage("prepare") as it:
        prepared = prepare_version(config.name, data, base, catalog, it.update)
        it.done(f"{prepared.manifest.id}  {prepared.summary}")
    return prepared.manifest


def train(config: RunConfig, store: Store, allow_archived: bool = False) -> RunRecord:
    """Dataset + base model → run record; an unfinished run of the same settings is resumed. `allow_archived`: a repetition
    may start from a version that was taken out of use since."""
    from forge_ray.train import start
    from forge_ray.train.preflight import refuse_without_rows

    precision = resolve_precision(config.train.precision, config.train.scaling.gpus_per_worker > 0)
    with Catalog.open(store) as catalog:
        named = import_base(config, catalog)
        for version in (named, start.full_base(catalog, named, config.train)):
            refuse_withdrawn(catalog, version.id)
            if not allow_archived:
                refuse_archived(catalog, version.id)
        manifest = _prepare(config, catalog, named, quiet=True)
        refuse_without_rows(config.train, store, manifest)
        report_labels(store, config.train, manifest)
        if rows := general.general_rows(catalog, manifest, config.eval):  # refused now, not after hours of training
            general.refuse_trained(store, rows, manifest)
        begun = start.start_of(catalog, named, config.train, "archived" if allow_archived else "active")
        return train_on(config, catalog, begun.base, manifest, precision, begun.initial, begun.frozen)


def train_on(
    config: RunConfig,
    catalog: Catalog,
    base: ModelVersion,
    manifest: DatasetManifest,
    precision: Literal["bf16", "fp32"],
    initial: ModelVersion | None = None,
    frozen: FrozenModel | None = None,
    micro_batch: int = 0,
) -> RunRecord:
    """Train on what the store holds; the sources of the rows are not looked at. `initial`: the version whose adapter is
    trained on, where it is not a new one; `frozen`: a teacher, or another reference; `micro_batch`: of a repeated run."""
    from forge_ray.models.architecture import Head
    from forge_ray.release.candidates import export_best
    from forge_ray.train import attempts, checkpoint, follow, launch, run_folder
    from forge_ray.train.job import TrainJob, run_id
    from forge_ray.train.loop import train_loop
    from forge_ray.train.preflight import micro_batch_of, refuse_impossible, report_reach
    from forge_ray.train.record import run_record
    from forge_ray.train.sinks import open_sinks
    from forge_ray.train.start import Start, refuse_other_adapter
    from forge_ray.train.validating import validate_checkpoint

    store, identifier = catalog.store, run_id(config.train, precision, manifest, base, initial, frozen)
    started = {"dataset": manifest.id, "base_model": base.id} | ({"initial_adapter": initial.id} if initial else {})
    started |= {"frozen_model": frozen.version.id} if frozen else {}
    with stage("train") as it:
        if catalog.has(identifier):
            versions = [version.id for version in catalog.all(ModelVersion) if version.run == identifier]
            listed = f": {', '.join(versions)}" if versions else ", no version made of it yet"
            it.done(f"{identifier}  already trained{listed}")
            return catalog.get_as(RunRecord, identifier)
        if config.train.scaling.max_workers:
            connect()
            sessions.note(store)
        if not store.exists(paths.result(identifier)):
            refuse_impossible(config, store, precision, base, manifest, identifier, frozen)
        size = micro_batch or micro_batch_of(config.train, store, precision, base, manifest, identifier, frozen)
        job = TrainJob(identifier, config.name, config.train, store, manifest, base, precision, False, initial, frozen, size)
        job.check_may_publish()
        refuse_other_adapter(catalog, Start(base, initial), config.train.adapter, config.train.targets)
        # every byte is checked before a GPU hour is spent on it
        store.fetch_dir(paths.dataset(manifest.id), files=manifest.files)
        run_folder.write_config(store, identifier, config)
        report_reach(store, identifier, base, config.train.adapter, Head(config.train.targets))
        tags = {f"forge.{name}": value for name, value in started.items()}
        sinks = open_sinks(store, identifier, config.name, config.train, tags)
        try:
            with attempts.driving(store, identifier):
                if not store.exists(paths.result(identifier)):
                    running = {"state": "running", "pid": os.getpid(), **started}
                    catalog.append(Event(kind="run", subject=identifier, data=running))
                    with follow.followed(it, store, identifier, sinks):
                        launch.fit(train_loop, job, validate_checkpoint)
                sinks.close(failed=False)
                export_best(job)
                checkpoint.tidy(store, identifier, config.train)
                job.check_may_publish()
                record = catalog.put(run_record(job, config))
        except TrainingError as error:
            catalog.append(Event(kind="run", subject=identifier, data={"state": "failed", "why": error.message}))
            sinks.close(failed=True)
            raise
        catalog.append(Event(kind="run", subject=identifier, data={"state": "succeeded"}))
        it.done(f"{record.id}  {follow.closing_line(record)}")
        return record


def plan(config: RunConfig, store: Store, assumptions: Assumptions) -> Estimate:
    """What a run will take. The dataset is prepared first if it is not: all else follows from its numbers. Of a `base_model`
    that is a folder with `config.json` alone, and where a number of rows is stated, no row is read."""
    from forge_ray.models.architecture import Head
    from forge_ray.train import preflight, start
    from forge_ray.train.frozen import frozen_of
    from forge_ray.train.plan import Model
    from forge_ray.train.stated import stated

    rows, folder = stated(config, assumptions.num_rows), Path(config.base_model)
    if rows and (folder / "config.json").is_file():
        asked, model = preflight.stated_frozen(config.train, store), Model.of(folder, Head(config.train.targets))
        planned = preflight.Planned(model, rows, config.base_model, rows.id, asked)
    else:
        with Catalog.open(store) as catalog:
            named = import_base(config, catalog)
            base = start.full_base(catalog, named, config.train)
            asked = preflight.shapes_of_frozen(store, frozen_of(catalog, config.train, base))
            dataset = rows or _prepare(config, catalog, named, quiet=True)
            if isinstance(dataset, DatasetManifest):
                preflight.refuse_without_rows(config.train, store, dataset)
                report_labels(store, config.train, dataset)
        model = Model.of(preflight.configuration(store, base), Head(config.train.targets))
        planned = preflight.Planned(model, dataset, base.id, dataset.id, asked)
    precision = resolve_precision(config.train.precision, config.train.scaling.gpus_per_worker > 0)
    return preflight.estimate(config.train, store, precision, planned, assumptions)


def evaluate(config: RunConfig, store: Store) -> tuple[EvalReport, EvalReport]:
    """(base, tuned) on the same held-out rows, under the same scoring; and the leak audit, where eval.leak asks for it."""
    with Catalog.open(store) as catalog:
        return _evaluate_run(config, catalog, train_record(config, catalog))


def _evaluate_run(config: RunConfig, catalog: Catalog, record: RunRecord) -> tuple[EvalReport, EvalReport]:
    both = reports.evaluate_both(catalog, record, config.scoring)
    if config.eval.leak:
        reports.audit_leak(catalog, record, config.eval)
    return both


def evaluate_file(config: RunConfig, store: Store) -> tuple[EvalReport, EvalReport | None]:
    """(base, tuned) as `evaluate`; without a finished run of this file, the base model alone on the rows that a run would be
    judged on."""
    with Catalog.open(store) as catalog:
        lookup = _lookup(config, catalog)
        if lookup.record:
            return _evaluate_run(config, catalog, lookup.record)
        refuse_withdrawn(catalog, lookup.named.id)
        subject = reports.model_subject(catalog, lookup.named)
        return reports.evaluate(catalog, subject, lookup.manifest, config.scoring, "base"), None


def evaluate_models(
    compared: Compared, data: RunConfig | str, config: EvalConfig, store: Store, settings: dict[str, Any]
) -> list[EvalReport]:
    """Models of the store, runs and endpoints side by side; `data`: a run file's dataset, a dataset version, or a file of
    rows, for which `settings` are those of `data.…`."""
    from forge_ray.evaluate import standalone

    with Catalog.open(store) as catalog:
        rows = _prepare(data, catalog, import_base(data, catalog), quiet=True) if isinstance(data, RunConfig) else data
        return standalone.evaluate_models(catalog, compared, rows, config, settings)


@dataclass(frozen=True)
class _Lookup:
    """What a run file's settings come to now: its base model, its dataset, the id of its run ("" where that cannot have
    started), and the run's record where it is finished."""

    named: ModelVersion
    manifest: DatasetManifest
    identifier: str
    record: RunRecord | None


def _lookup(config: RunConfig, catalog: Catalog) -> _Lookup:
    """Without starting a run. The sources' bytes are digested once."""
    from forge_ray.train import start
    from forge_ray.train.job import run_id

    named = import_base(config, catalog)
    manifest = _prepare(config, catalog, named, quiet=True)
    precision = resolve_precision(config.train.precision, config.train.scaling.gpus_per_worker > 0)
    if config.train.init_from == "merge" and start.merged_version(catalog, named) is None:
        return _Lookup(named, manifest, "", None)
    begun = start.start_of(catalog, named, config.train, "any")
    identifier = run_id(config.train, precision, manifest, begun.base, begun.initial, begun.frozen)
    record = catalog.get_as(RunRecord, identifier) if catalog.has(identifier) else None
    return _Lookup(named, manifest, identifier, record)


def train_record(config: RunConfig, catalog: Catalog) -> RunRecord:
    """The finished run of this run file, without starting one; `NotFound` where there is none."""
    lookup = _lookup(config, catalog)
    if lookup.record is None:
        name = f"{lookup.identifier} of this run file" if lookup.identifier else f"the run of this file on {lookup.named.id}"
        raise NotFound(f"{name} is not finished", hint="run `forge train` on it first")
    return lookup.record


def release(config: RunConfig, store: Store, promote: bool = True) -> ModelVersion:
    """Gate the run's export and register it: accepted and (with `promote`) the alias moved, or rejected with the reasons."""
    with Catalog.open(store) as catalog:
        return _release_run(config, catalog, train_record(config, catalog), promote)


def _release_run(config: RunConfig, catalog: Catalog, record: RunRecord, promote: bool = True) -> ModelVersion:
    from forge_ray.train import start

    store = catalog.store
    base_report, report = reports.evaluate_both(catalog, record, config.scoring, quiet=True)
    leak = reports.audit_leak(catalog, record, config.eval, quiet=True) if config.eval.leak else None
    manifest = catalog.get_as(DatasetManifest, record.dataset)
    incumbents: dict[str, EvalReport | None] = {"base": base_report}
    for name in gate.incumbents_of(config.release.gate):
        if name not in incumbents:
            incumbents[name] = reports.incumbent(catalog, name, record, manifest, config.scoring)
    with stage("release") as it:
        checks = gate.checks(config.release.gate, report, incumbents, leak, partial(items_of, store))
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
            evals=tuple(dict.fromkeys(one.id for one in (report, base_report, leak, *incumbents.values()) if one)),
            checks=checks,
            licence=start.licence_of(catalog, record),
            flags=config.flags,
        ).sealed()
        is_known = catalog.has(version.id)
        if not store.is_published(paths.model(version.id)):
            require(catalog, paths.export(record.id))
        store.copy_dir(paths.export(record.id), paths.model(version.id))
        for origin in (record.base_model, record.initial_adapter, record.frozen_model):
            refuse_erased(store, version.id, manifest.id, origin, "" if is_known else paths.model(version.id))
        version = catalog.put(version)
        if reasons:
            it.done(f"{version.id}  rejected: {'; '.join(reasons)}")
        else:
            if promote:
                promotion.promote(catalog, version.id, config.release.alias)
            where = f" → {config.release.alias}" if promote else ""
            it.done(f"{version.id}  {'already ' if is_known else ''}accepted{where}")
        return version


def deploy(config: DeployConfig, store: Store, gateway: GatewayConfig | None = None) -> Deployment:
    """A released model → an endpoint on the cluster that this process belongs to. `gateway`: what the caller starts in front
    of it, where others than this machine reach it."""
    proxy_address(config, gateway)
    connect()
    from forge_ray.serve.deploy import deploy as start

    with stage("deploy") as it, Catalog.open(store) as catalog:
        deployment = start(config, catalog, gateway=gateway)
        names = ", ".join(config.models)
        scheme = "https" if gateway and gateway.tls_cert else "http"
        it.done(f"{deployment.id}  {scheme}://{config.host}:{config.port}/v1  serves {names}")
        return deployment
