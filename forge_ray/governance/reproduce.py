"""Repeat a run from its records alone, and compare the weights.

The original sources are not read: dataset and base model come from the store, and each file is verified against the sha256
in its record. The second run is written to a scratch store in `work/reproduce/…`, which shares files by hard links.
"""

from __future__ import annotations

import sys
import uuid
from collections import Counter
from typing import Any, Literal, TypeVar

from forge_ray import pipeline
from forge_ray.config.base import parse
from forge_ray.config.data import DataConfig
from forge_ray.config.run import RunConfig
from forge_ray.errors import ConfigError, ForgeError, NotFound, StoreError
from forge_ray.governance import difference
from forge_ray.governance.tensors import WEIGHTS, compare_tensors
from forge_ray.machine import environment
from forge_ray.machine.cluster import connect
from forge_ray.machine.hardware import resolve_precision
from forge_ray.progress import Stage, stage, visible
from forge_ray.records import DatasetManifest, Event, FileEntry, ModelVersion, Record, RunRecord, files_digest
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.erased import withdrawn
from forge_ray.store.files import MANIFEST, Store, verify_files
from forge_ray.store.out_of_use import refuse_withdrawn
from forge_ray.store.removed import why_absent
from forge_ray.store.resolve import resolve
from forge_ray.store.uses import using
from forge_ray.train.frozen import FrozenModel, of_version

ON_A_TERMINAL = 5
R = TypeVar("R", bound=Record)
Differences = dict[str, Any]


def reproduce(store: Store, reference: str, rebuild_data: bool = False, keep: bool = False) -> dict[str, Any]:
    """Repeat the training run that `reference` (run, model version, alias or digest) names, and compare.

    `verdict` is `equal` if every weight file is byte-identical, else `differs`; `differences` lists further differences in
    either case. Raises `ConfigError` for a version that no run produced, `NotFound` or `StoreError` where something that is
    needed is missing or altered."""
    folder = paths.work("reproduce", uuid.uuid4().hex[:12])
    with Catalog.open(store) as catalog:
        record, version = run_of(catalog, reference)
        base = _sealed(catalog.get_as(ModelVersion, record.base_model))
        initial = _sealed(catalog.get_as(ModelVersion, record.initial_adapter)) if record.initial_adapter else None
        frozen = _frozen(catalog, record)
        manifest = _sealed(catalog.get_as(DatasetManifest, record.dataset))
        refuse_withdrawn(catalog, version.id if version else "")
        others = {one.id: one for one in (initial, *(frozen.versions if frozen else ())) if one and one.id != base.id}
        models = tuple(map(paths.model, (base.id, *others)))
        _require_inputs(catalog, record, (*(() if rebuild_data else (paths.dataset(manifest.id),)), *models))
        config, notes = settings(record)
        catalog.check_may("reproduction events")  # before hours are spent on one
        differences = _before(record, base, initial, frozen, version)
        for line in (*difference.lines(differences | _here(store, record)), *notes):
            print(f"  {visible(line)}", file=sys.stderr, flush=True)
        scratch = _below(store, folder)
        in_use = using(store, f"reproduction of {record.id}", folder, paths.dataset(manifest.id), *models)
        try:
            with in_use, Catalog.open(scratch) as there, stage("verify") as it:
                size = _link(store, folder, paths.model(base.id), base.files, "the base model")
                there.put(base)
                for one in others.values():
                    what = "the adapter that was trained on" if one is initial else "the teacher or reference"
                    size += _link(store, folder, paths.model(one.id), one.files, what)
                    there.put(one)
                if rebuild_data:
                    _link_held_out(catalog, folder, there, manifest)
                    rebuilt = _rebuild(config, store, folder, there, base, manifest, it)
                    differences |= {"data": _sources(manifest, rebuilt)} if rebuilt.id != manifest.id else {}
                if not scratch.is_published(paths.dataset(manifest.id)):
                    size += _link(store, folder, paths.dataset(manifest.id), manifest.files, "the dataset")
                there.put(manifest)
                taken = ", ".join([base.id, *others, manifest.id])
                it.done(f"{record.id}  {taken}: {size / 1e6:.1f} MB as recorded")
            with Catalog.open(scratch) as there:
                precision, micro = _precision(config, record, manifest, base, initial, frozen), record.micro_batch_size
                again = pipeline.train_on(config, there, base, manifest, precision, initial, frozen, micro)
            differences |= _after(store, record, scratch, again)
            weights = _weights(store, record, version, scratch, again)
            verdict = "equal" if weights["is_equal"] and "data" not in differences else "differs"
            data = {
                "state": verdict,
                "environment": again.environment_digest,
                "code_digest": again.code_digest,
                "differences": sorted(differences),
            }
            catalog.append(Event(kind="reproduction", subject=record.id, data=data))
        finally:
            if not keep:
                store.delete_dir(folder)
    return {
        "run": record.id,
        "model_version": version.id if version else "",
        "verdict": verdict,
        "weights": weights,
        "differences": differences,
        "notes": notes,
        "folder": folder if keep else "",
    }


def _require_inputs(catalog: Catalog, record: RunRecord, folders: tuple[str, ...]) -> None:
    """Raise `NotFound` that names every input of the run (`folders`) that is not in the store any more, and why."""
    absent = []
    for folder in folders:
        if not catalog.store.exists(folder):
            erasure = withdrawn(catalog.store).datasets.get(folder.rpartition("/")[2], "")
            reason = why_absent(catalog.standing, folder) or (f"erased by {erasure}" if erasure else "nothing says why")
            absent.append((folder, reason))
    if absent:
        raise NotFound(
            f"{record.id} cannot be repeated, because inputs are not in this store: "
            + "; ".join(f"{folder} ({reason})" for folder, reason in absent),
            hint="the records stay. Restore the folders from a backup; a dataset can be built again from its sources:"
            " --rebuild-data",
        )


def run_of(catalog: Catalog, reference: str) -> tuple[RunRecord, ModelVersion | None]:
    """The finished run of a reference, and the version if it names one. Raises `ConfigError` where there is no run."""
    identifier = resolve(catalog, reference) if not reference.startswith("run_") else reference
    if identifier.startswith("run_"):
        if not catalog.has(identifier):
            raise NotFound(f"{identifier} is not finished, or not in this store", hint="`forge runs list` shows the runs")
        return catalog.get_as(RunRecord, identifier), None
    version = catalog.get_as(ModelVersion, identifier)
    if version.status == "merged":
        raise ConfigError(
            f"{version.id} is {version.source}: no run made it",
            hint=f"reproduce the run of its adapter: `forge reproduce {version.base_model}`",
        )
    if not version.run:
        raise ConfigError(
            f"{version.id} was imported ({version.source}): it has no run in this store that could be reproduced",
            hint="`forge models list` shows which versions were trained",
        )
    if version.status == "candidate":
        raise ConfigError(
            f"{version.id} is step {version.step} of {version.run}, not the result of the whole run",
            hint=f"reproduce the run: `forge reproduce {version.run}`",
        )
    return catalog.get_as(RunRecord, version.run), version


def settings(record: RunRecord) -> tuple[RunConfig, list[str]]:
    """The run file of a finished run with the number of workers of its last start, and notes on its starts and incidents."""
    config = parse(RunConfig, record.config, where=record.id)
    sizes, notes = [attempt["world_size"] for attempt in record.attempts], []
    if len(set(sizes)) > 1:
        notes.append(
            f"it had {' then '.join(map(str, sizes))} workers: a different number adds in a different order, so equal"
            f" weights are guaranteed only for runs with one number; using {sizes[-1]}"
        )
    elif len(sizes) > 1:
        notes.append(
            f"it was started {len(sizes)} times, with {sizes[0]} workers each: resuming does not change the weights"
        )
    counts = Counter(incident["kind"] for incident in record.incidents if incident["kind"] != "restart")
    if counts:
        incidents = ", ".join(f"{number} × {kind}" for kind, number in counts.items())
        notes.append(
            f"it had incidents ({incidents}): the steps and rows that they skipped are skipped only if they happen again"
        )
    scaling = config.train.scaling
    if scaling.max_workers and sizes:
        scaling = scaling.model_copy(update={"num_workers": sizes[-1]})
    train = config.train.model_copy(update={"scaling": scaling, "sinks": ()})
    return config.model_copy(update={"train": train}), notes


def _sealed(record: R) -> R:
    """The record itself. Raises `StoreError` if its content does not give its id."""
    if record.sealed().id != record.id:
        raise StoreError(f"the record {record.id} was altered: its content gives {record.sealed().id}", hint="restore it")
    return record


def _frozen(catalog: Catalog, record: RunRecord) -> FrozenModel | None:
    """The teacher or reference of a run, whose numbers are computed again."""
    if not record.frozen_model:
        return None
    frozen = of_version(catalog, catalog.get_as(ModelVersion, record.frozen_model))
    return FrozenModel(_sealed(frozen.version), _sealed(frozen.base) if frozen.base else None)


def _before(
    record: RunRecord,
    base: ModelVersion,
    initial: ModelVersion | None,
    frozen: FrozenModel | None,
    version: ModelVersion | None,
) -> Differences:
    """The differences that are known before the start: what it starts from, export of the version, code."""
    differences: Differences = {}
    if base.files_digest != record.base_digest:
        differences["base_model"] = [record.base_digest, base.files_digest]
    if initial and initial.files_digest != record.initial_digest:
        differences["initial_adapter"] = [record.initial_digest, initial.files_digest]
    if frozen and frozen.version.files_digest != record.frozen_digest:
        differences["frozen_model"] = [record.frozen_digest, frozen.version.files_digest]
    if version and version.files_digest != files_digest(record.export):
        differences["version"] = [version.files_digest, files_digest(record.export)]
    if record.code_digest != environment.code_digest():
        differences["code"] = [_code(record), _code(None)]
    return differences


def _here(store: Store, record: RunRecord) -> Differences:
    """The differences between the run's environment and this machine; those to the new workers are known later."""
    differences = difference.locks(environment.read(store, record.environment_digest), environment.lock())
    kept = {key: pair for key, pair in differences.items() if key.partition(".")[0] not in ("threads", "torch", "switches")}
    return {"this machine": kept} if kept else {}


def _code(record: RunRecord | None) -> str:
    digest = record.code_digest if record else environment.code_digest()
    commit = record.code_commit if record else environment.code_commit()
    return f"{digest[:19]}…" + (f" (commit {commit[:12]}{'-dirty' * commit.endswith('-dirty')})" if commit else "")


def _below(store: Store, folder: str) -> Store:
    if store.is_local:
        return Store(str(store.local(folder)))
    place, mark, query = store.uri.partition("?")
    return Store(f"{place.rstrip('/')}/{folder}{mark}{query}")


def _link(store: Store, folder: str, relative: str, files: tuple[FileEntry, ...], what: str) -> int:
    """Link a published folder into the scratch store and verify it; only files that the record lists are taken. Returns the
    number of bytes."""
    if not store.is_published(relative):
        raise NotFound(
            f"{what} of this run is not in the store: {relative} has no manifest",
            hint="restore it from a backup; a dataset can be rebuilt from its sources: --rebuild-data"
            if relative.startswith("datasets/")
            else "restore it from a backup, or import the same files again",
        )
    for entry in files:
        if not store.exists(f"{relative}/{entry.path}"):
            raise StoreError(f"{relative}/{entry.path} is missing ({entry.size} bytes)", hint="restore it from a backup")
        store.link(f"{relative}/{entry.path}", f"{folder}/{relative}/{entry.path}")
    store.link(f"{relative}/{MANIFEST}", f"{folder}/{relative}/{MANIFEST}")
    scratch = _below(store, folder)
    verify_files(scratch.fetch_dir(relative, verify=False), files)
    return sum(entry.size for entry in files)


def _rebuild(
    config: RunConfig, store: Store, folder: str, there: Catalog, base: ModelVersion, manifest: DatasetManifest, it: Stage
) -> DatasetManifest:
    """Rebuild the dataset from its sources in the scratch store, without rows that were erased since."""
    connect()
    from forge_ray.data.build.build import build, index_sources
    from forge_ray.data.record import subject

    for path in (subject.KEY, *store.list(paths.erasure())):  # tombstones: the build leaves these rows out
        if store.exists(path):
            store.link(path, f"{folder}/{path}")
    # what earlier cycles hold out follows from the base model, not from the run file
    held_out = tuple(rule for rule in parse(DataConfig, manifest.config).curate if rule.rule == "held_out")
    stated = tuple(rule for rule in config.data.curate if rule.rule != "held_out")
    data = config.data.model_copy(update={"curate": (*stated, *held_out)})
    try:
        return build(manifest.name, data, base, there.store, index_sources(data, it.update), it.update)
    finally:
        there.store.delete(subject.KEY)


def _link_held_out(catalog: Catalog, folder: str, there: Catalog, manifest: DatasetManifest) -> None:
    """Link the dataset versions whose test records a dataset keeps out of training, for its rebuild."""
    against = {name for rule in manifest.config.get("curate", ()) if rule["rule"] == "held_out" for name in rule["against"]}
    for name in sorted(against):
        other = there.put(catalog.get_as(DatasetManifest, name))
        if catalog.store.is_published(paths.dataset(name)):
            _link(catalog.store, folder, paths.dataset(name), other.files, "a dataset whose test rows are held out")


def _sources(old: DatasetManifest, new: DatasetManifest) -> Differences:
    """The differences between a dataset and its rebuild."""
    before, after = ({source.path: source.sha256 for source in manifest.sources} for manifest in (old, new))
    changed = difference.changes({"sources": before}, {"sources": after})
    counts = difference.changes(_counts(old), _counts(new))
    return {"id": [old.id, new.id], **changed, **counts}


def _counts(manifest: DatasetManifest) -> dict[str, Any]:
    records = {name: split.num_records for name, split in manifest.splits.items()}
    return {"format": manifest.format, "records": records, "erased": sum(map(len, manifest.erased.values()))}


def _precision(
    config: RunConfig,
    record: RunRecord,
    manifest: DatasetManifest,
    base: ModelVersion,
    initial: ModelVersion | None,
    frozen: FrozenModel | None,
) -> Literal["bf16", "fp32"]:
    """The precision that `auto` meant on the machine that trained: the one that gives the run's id."""
    from forge_ray.train.job import run_id

    precisions: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    for precision in precisions:
        if run_id(config.train, precision, manifest, base, initial, frozen) == record.id:
            return precision
    return resolve_precision(config.train.precision, config.train.scaling.gpus_per_worker > 0)


def _after(store: Store, record: RunRecord, scratch: Store, again: RunRecord) -> Differences:
    """The differences between the two runs other than the weights: settings, environment, steps, workers, loss."""
    differences: Differences = {}
    if again.id != record.id:
        differences["settings"] = [record.id, again.id]
    differences |= difference.environments(store, record, scratch, again)
    for name in ("num_steps", "order_key", "order_digest", "stopped_early", "export_step"):
        if getattr(record, name) != getattr(again, name):
            differences[name] = [getattr(record, name), getattr(again, name)]
    sizes = [run.attempts[-1]["world_size"] if run.attempts else None for run in (record, again)]
    if sizes[0] != sizes[1]:
        differences["workers"] = sizes
    if step := _first_other_step(store, record, scratch, again):
        differences["loss"] = step
    return differences


def _first_other_step(store: Store, record: RunRecord, scratch: Store, again: RunRecord) -> dict[str, Any]:
    """The first step with a different loss, if both runs have metrics."""
    from forge_ray.train import metrics

    sides = []
    for place, run in ((store, record), (scratch, again)):
        path = paths.run(run.id, metrics.METRICS)
        lines = metrics.parse(place.read(path).decode()) if place.exists(path) else []
        sides.append({line["step"]: line.get("loss") for line in lines})
    before, after = sides
    step = next((step for step in sorted(before.keys() & after.keys()) if before[step] != after[step]), None)
    return {} if step is None else {f"step {step}": [before[step], after[step]]}


def _weights(
    store: Store, record: RunRecord, version: ModelVersion | None, scratch: Store, again: RunRecord
) -> dict[str, Any]:
    """Compare the weight files by sha256 and, where they differ, tensor by tensor. Other files that differ are listed."""
    before, after = ({entry.path: entry.sha256 for entry in run.export} for run in (record, again))
    other = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    weights = [path for path in other if path.endswith(WEIGHTS)]
    digests = {path: sha for path, sha in before.items() if path.endswith(WEIGHTS)}
    comparison: dict[str, Any] = {
        "is_equal": not weights,
        "sha256": digests,
        "differ": {path: [before.get(path, ""), after.get(path, "")] for path in weights},
        "other_files": [path for path in other if path not in weights],
    }
    if not weights:
        return comparison
    places = [paths.export(record.id), *([paths.model(version.id)] if version else [])]
    kept = next((place for place in places if store.is_published(place)), None)
    try:
        original = store.fetch_dir(kept) if kept else None
    except ForgeError as error:
        return comparison | {"problem": f"the first run's weights were altered: {error.message}"}
    if original is None:
        return comparison | {"problem": "the first run's weights are no longer in the store: compared by their sha256 alone"}
    return comparison | compare_tensors(original, scratch.fetch_dir(paths.export(again.id)))


def describe(report: dict[str, Any]) -> list[str]:
    """The result as lines of text: the verdict first, then the differences."""
    weights = report["weights"]
    if report["verdict"] == "equal":
        lines = [f"equal: {report['run']} gives the same weights again"]
        lines += [f"  {path}  sha256 {sha}" for path, sha in weights["sha256"].items()]
    else:
        lines = [f"differs: {report['run']} gives different weights"]
        if weights["is_equal"]:
            lines = [f"differs: {report['run']} gives the same weights, but its sources now give a different dataset"]
        for path, (before, after) in weights["differ"].items():
            lines.append(f"  {path}  sha256 {before[:16] or 'absent'}… → {after[:16] or 'absent'}…")
        if "tensors" in weights:
            lines.append(
                f"  {weights['num_differ']} of {weights['num_tensors']} tensors differ, by {weights['largest']:.3g} at most"
            )
            for item in weights["tensors"][:ON_A_TERMINAL]:
                kinds = f"  {item['was']} → {item['is']}" if "was" in item else ""
                largest = f"  {item['largest']:.3g} at most, in {item['share']:.1%} of it" if "largest" in item else ""
                lines.append(f"    {item['name']}{largest}{kinds}")
        lines += [f"  {weights['problem']}"] if "problem" in weights else []
    if weights["other_files"]:
        lines.append(f"  other files that differ: {', '.join(weights['other_files'])}")
    if report["differences"]:
        lines.append("other differences:")
        lines += [f"  {line}" for line in difference.lines(report["differences"])]
    return lines + [f"note: {note}" for note in report["notes"]]
