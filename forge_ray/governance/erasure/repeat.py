"""Datasets and runs of an erasure, once more without the rows."""

from __future__ import annotations

from forge_ray import pipeline
from forge_ray.config.base import parse
from forge_ray.config.run import RunConfig
from forge_ray.errors import NothingLeft
from forge_ray.governance.erasure.options import Facts, Options
from forge_ray.governance.erasure.plan import TRAINED_ON, AffectedRun, ErasurePlan
from forge_ray.records import DatasetManifest, ModelVersion, RunRecord, files_digest
from forge_ray.store.catalog import Catalog
from forge_ray.train.frozen import of_version, refused_licence


def rebuild(catalog: Catalog, plan: ErasurePlan, options: Options, before: dict[str, str]) -> Facts:
    """Rebuild the affected datasets without the rows. `datasets`: old → new id, "" where no row is left, with those of
    `before`. `changed`: datasets whose training rows differ although none of the erased rows was among them."""
    replacements = dict(before)
    changed = []
    # oldest first: the rules of a later one may compare with the replacement of an earlier one
    age = {manifest.id: number for number, manifest in enumerate(catalog.all(DatasetManifest))}
    oldest_first = sorted(plan.datasets, key=lambda affected: age[affected.id])
    for affected in oldest_first if options.retrain != "none" else ():
        old = catalog.get_as(DatasetManifest, affected.id)
        values: Facts = {"name": old.name, "base_model": old.base_model, "release": {"alias": "none"}}
        config = parse(RunConfig, values | {"data": without_datasets(old.config, replacements)})
        try:
            new = pipeline.prepare(config, catalog.store)
        except NothingLeft:
            replacements[old.id] = ""
            continue
        replacements[old.id] = new.id
        for split in TRAINED_ON:
            if not affected.held.get(split) and old.splits[split].rows_digest != new.splits[split].rows_digest:
                changed.append(old.id)
    return {"datasets": replacements, "changed": sorted(set(changed))}


def without_datasets(data: Facts, replacements: dict[str, str]) -> Facts:
    """Settings of a dataset whose rules compare with the replacements of affected datasets."""
    rules = []
    for rule in data.get("curate", ()):
        against = [replacements.get(place, place) for place in rule.get("against", ())]
        if "against" in rule and not any(against):
            continue
        rules.append(rule | {"against": [place for place in against if place]} if against else rule)
    return data | {"curate": rules}


def retrain(
    catalog: Catalog, plan: ErasurePlan, datasets: dict[str, str], options: Options, before: dict[str, str]
) -> Facts:
    """Repeat the affected runs without the rows, each base model before the runs that start from it. `before`: versions
    that an earlier round has replaced."""
    runs: list[Facts] = []
    versions = dict(before)
    store = catalog.store
    of_run = {run.id: [v for v in catalog.all(ModelVersion) if v.run == run.id] for run in plan.runs}
    records = {run.id: catalog.get_as(RunRecord, run.id) for run in plan.runs if run.finished}
    withdrawn = {version.id for version in plan.versions}
    in_use = _runs_in_use(plan, of_run)
    for run in plan.runs:
        fate = fate_of(run, datasets, options, withdrawn, versions, run.id in in_use)
        if fate == "retrained" and (refused := refused_teacher(catalog, records[run.id])):
            fate = refused
        if fate != "retrained":
            runs.append({"run": run.id, "fate": fate})
            continue
        record = records[run.id]
        values = {**record.config, "base_model": versions.get(run.origin, run.origin), "deploy": None}
        if run.origin != run.base_model and not record.initial_adapter:  # its run file may name the merged version itself
            values["train"] = record.config["train"] | {"init_from": "merge"}
        if run.frozen:
            values["train"] = with_frozen(values["train"], versions.get(run.frozen, run.frozen))
        config = parse(RunConfig, values | {"data": without_datasets(record.config["data"], datasets)})
        new = pipeline.train(config, store, allow_archived=True)
        if run.base_model in withdrawn and run.base_model != run.origin:  # a merged version, made anew for this run
            versions[run.base_model] = new.base_model
        facts: Facts = {"run": run.id, "fate": fate, "new_run": new.id, "weights": files_digest(new.export)}
        judged = [version for version in of_run[run.id] if version.status in ("accepted", "rejected")]
        if judged:
            pipeline.evaluate(config, store)
            version = pipeline.release(config, store, promote=False)
            facts |= {"version": version.id, "status": version.status, "weights": version.files_digest}
            versions |= {old.id: version.id for old in judged if version.status == "accepted"}
        runs.append(facts)
    return {"runs": runs, "versions": versions}


def refused_teacher(catalog: Catalog, record: RunRecord) -> str:
    """The fate of a distillate whose teacher the policy lets no run learn from since; "" of all others. The erasure of the
    rows does not wait for a change of the policy."""
    if record.method != "distil" or not record.frozen_model:
        return ""
    for version in of_version(catalog, catalog.get_as(ModelVersion, record.frozen_model)).versions:
        if licence := refused_licence(catalog, version):
            return f"removed: the policy lets no run learn from a teacher with the licence {licence}"
    return ""


def with_frozen(train: Facts, version: str) -> Facts:
    """Settings of a training with another teacher or reference."""
    key = "teacher" if train["method"]["kind"] == "distil" else "reference"
    return train | {"method": train["method"] | {key: version}}


def _runs_in_use(plan: ErasurePlan, of_run: dict[str, list[ModelVersion]]) -> set[str]:
    """Runs whose versions an alias routes to, and the runs of the versions that these started from or learned from."""
    named = {version for hit in plan.aliases.values() for version in hit}
    in_use: set[str] = set()
    for run in reversed(plan.runs):
        if any(version.id in named for version in of_run[run.id]):
            in_use.add(run.id)
            named |= {run.origin, run.frozen}
    return in_use


def fate_of(
    run: AffectedRun, datasets: dict[str, str], options: Options, withdrawn: set[str], versions: dict[str, str], in_use: bool
) -> str:
    """What happens to a run: `retrained`, or why it is kept or removed."""
    if not run.used:
        return "kept: it was not trained on the rows"
    if not run.finished:
        return "removed: it was not finished"
    if options.retrain == "none" or (options.retrain == "used" and not in_use):
        return "removed: no replacement was asked for"
    if options.remove_adapters and run.adapter and run.base_model not in withdrawn:
        return "removed: the adapter was all that it made"
    if not datasets.get(run.dataset, run.dataset):
        return "removed: no row is left"
    if run.origin in withdrawn and run.origin not in versions:
        return "removed: its base has no replacement"
    if run.frozen in withdrawn and run.frozen not in versions:
        return "removed: its teacher or reference has no replacement"
    return "retrained"
