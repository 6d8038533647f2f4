"""Erase rows and all that learned from them: tombstones → withdraw → build and train again → purge → certificate.

Every stage leaves an event of the erasure when it is done, and does what is done already once more without harm: a process
that was killed is continued by giving the same command. The tombstones come first, so nothing new is made of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from forge_ray import pipeline
from forge_ray.config.base import parse
from forge_ray.config.release import AliasRoute
from forge_ray.config.run import RunConfig
from forge_ray.data.build import tombstones as erased
from forge_ray.errors import ConfigError, NotFound, NothingLeft, PolicyError
from forge_ray.governance.erasure.certificate import certify, path_of, statement_of
from forge_ray.governance.erasure.plan import (
    TRAINED_ON,
    AffectedRun,
    ErasurePlan,
    ErasureRequest,
    extended,
    plan_of,
    search,
    standing_for,
)
from forge_ray.governance.erasure.purge import check_gone, listed, purge
from forge_ray.progress import stage
from forge_ray.records import (
    DatasetManifest,
    Erasure,
    Event,
    FileEntry,
    ModelVersion,
    RunRecord,
    canonical_json,
    files_digest,
)
from forge_ray.serve.routing import versions_of
from forge_ray.store import paths, signing
from forge_ray.store.catalog import WITHDRAWN, Catalog
from forge_ray.store.files import Store

Facts = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """`deployments`: `retire` takes aliases away from what learned from the rows at once, `mark` lets them answer until a
    replacement is released. `retrain`: again all runs, those that an alias stands for, or none. `remove_adapters`: runs that
    trained an adapter on an untouched base are not repeated, for without the adapter nothing of them is left."""

    deployments: Literal["retire", "mark"] = "retire"
    retrain: Literal["all", "used", "none"] = "all"
    remove_adapters: bool = False
    keep_weights: bool = False


def erase(store: Store, request: ErasureRequest, options: Options, why: str = "") -> Facts:
    """The whole of it; returns the certificate's statement. Raises `NotFound` where no dataset version holds such a row."""
    record = _begun(store, request, options, why)
    plan = ErasurePlan.model_validate(record.plan)
    withdrawn = _once(store, record, "withdrawn", lambda: _withdraw(store, record, plan, options))
    if withdrawn["policy"] != options.deployments:
        raise ConfigError(
            f"{record.id} was begun with --deployments {withdrawn['policy']}, and that is done",
            hint=f"give --deployments {withdrawn['policy']}; `forge alias archive` retires what was marked",
        )
    rebuilt = _once(store, record, "rebuilt", lambda: _rebuild(store, plan, options))
    if rebuilt["changed"]:
        with Catalog(store) as catalog:
            plan = extended(catalog, plan, set(rebuilt["changed"]))
        more = _once(store, record, "withdrawn more", lambda: _withdraw(store, record, plan, options))
        withdrawn = withdrawn | {"routes": {**more["routes"], **withdrawn["routes"]}}
    retrained = _once(store, record, "retrained", lambda: _retrain(store, plan, rebuilt["datasets"], options))
    moved = _once(store, record, "moved", lambda: _move(store, record, withdrawn["routes"], retrained["versions"]))
    purged = _once(store, record, "purged", lambda: _purge(store, record, plan, options))
    with Catalog(store) as catalog:
        check_gone(catalog, record.id)
    facts = {"rebuilt": rebuilt, "retrained": retrained, "withdrawn": withdrawn, "moved": moved, "purged": purged}
    _once(store, record, "finished", lambda: certify(store, record, plan, facts, asdict(options)))
    return statement_of(store.read_json(path_of(record.id)))


def _once(store: Store, record: Erasure, state: str, work: Callable[[], Facts]) -> Facts:
    """The facts of a stage: those of its event, or what `work` does now."""
    with Catalog(store) as catalog:
        for event in catalog.events("erasure", record.id):
            if event.data["state"] == state:
                return event.data
    found = work()
    with Catalog(store) as catalog:
        catalog.append(Event(kind="erasure", subject=record.id, data={"state": state, "why": record.why, **found}))
    return found


def begun(catalog: Catalog, request: ErasureRequest) -> ErasurePlan | None:
    """The plan of this very request where it was applied before, finished or not."""
    made = _record(catalog.store, request, Options(), "")
    return ErasurePlan.model_validate(catalog.get_as(Erasure, made.id).plan) if catalog.has(made.id) else None


def _record(store: Store, request: ErasureRequest, options: Options, why: str) -> Erasure:
    return Erasure(
        asked_by=request.by,
        asked=request.fingerprint(store),
        near_duplicates=request.near_duplicates,
        num_records=0,
        why=why,
        by=signing.who(),
        options=asdict(options),
        plan={},
    ).sealed()


def _begun(store: Store, request: ErasureRequest, options: Options, why: str) -> Erasure:
    """The erasure of this request. Its tombstones are written before the plan is made, so that none is missing in it; and
    before those it is seen that whoever asks may do all that follows."""
    with Catalog(store) as catalog:
        made = _record(store, request, options, why)
        if catalog.has(made.id):
            made = catalog.get_as(Erasure, made.id)
            catalog.check_may(*rights(ErasurePlan.model_validate(made.plan), options))
            return made
        with stage("tombstones") as it:
            found = search(catalog, request)
            if not found.places:
                raise NotFound(
                    "no dataset version of this store holds such a row",
                    hint="`forge data find` looks for a record or a subject",
                )
            catalog.check_may(*rights(plan_of(catalog, found), options))
            erased.write_tombstones(store, made.id, found.tombstones)
            plan = plan_of(catalog, search(catalog, request))
            made = made.model_copy(update={"num_records": plan.num_records, "plan": plan.model_dump(mode="json")})
            it.done(f"{made.id}  {plan.num_records} records, {plan.num_near_duplicates} near duplicates")
        return catalog.put(made)


def rights(plan: ErasurePlan, options: Options) -> list[str]:
    """What is written until the end (`authority.MAY`): who may not write all of it would stop half-way."""
    again = options.retrain != "none"
    trains = again and any(run.used and run.finished for run in plan.runs)
    return [
        *("erasures", "erasure events"),
        *(("model events",) if plan.versions else ()),
        *(("alias events",) if plan.aliases else ()),
        *(("deployment events",) if plan.deployments else ()),
        *(("datasets",) if again else ()),
        *(("runs", "run events", "evals", "models") if trains else ()),
    ]


def _withdraw(store: Store, record: Erasure, plan: ErasurePlan, options: Options) -> Facts:
    """From here on no alias can be pointed at what learned from the rows; `retire`: and nobody is answered by it."""
    gone = {version.id for version in plan.versions}
    retire = options.deployments == "retire"
    with stage("withdraw") as it, Catalog(store) as catalog:
        known, archived = catalog.withdrawn(), catalog.archived()
        for version in sorted(gone - set(known)):
            state = WITHDRAWN[retire or version in archived]
            data: Facts = {"state": state, "erasure": record.id, "why": record.why or "rows were erased"}
            catalog.append(Event(kind="model", subject=version, data=data))
        routes = {}
        for alias, hit in plan.aliases.items():
            now = catalog.routes().get(alias)
            if now is None or not set(versions_of(now)) & gone:
                continue  # done before this process was killed
            routes[alias] = now.model_dump(mode="json") | {"versions": list(now.versions.items())}
            catalog.append(
                Event(kind="erasure", subject=record.id, data={"state": "alias", "alias": alias, "was": routes[alias]})
            )
            if retire:
                reason = f"{record.id}: {', '.join(hit)} withdrawn"
                try:
                    catalog.set_route(alias, _without(catalog, now, gone), reason)
                except PolicyError:  # nobody has approved of what it would fall back to
                    catalog.set_route(alias, None, reason)
        routes |= {
            event.data["alias"]: event.data["was"]
            for event in catalog.events("erasure", record.id)
            if event.data["state"] == "alias"
        }
        last = catalog.last("deployment")
        for deployment in plan.deployments:
            before = last[deployment.id].data if deployment.id in last else {"state": ""}
            data = {**before, "erasure": record.id, "withdrawn": list(deployment.versions)}
            if before.get("erasure") != record.id:
                catalog.append(Event(kind="deployment", subject=deployment.id, data=data))
        what = "answered by nobody" if retire else "still answering"
        it.done(f"{len(gone)} versions blocked, {what}; {len(routes)} aliases, {len(plan.deployments)} deployments")
    return {"policy": options.deployments, "versions": sorted(gone), "routes": routes}


def _without(catalog: Catalog, route: AliasRoute, gone: set[str]) -> AliasRoute | None:
    """What is left of a route: the other versions, else its base where it falls back to it, else nothing."""
    versions = {version: weight for version, weight in route.versions.items() if version not in gone and weight}
    if not versions and route.fallback == "base":
        base = catalog.get_as(ModelVersion, route.stable).base_model
        versions = {base: 1.0} if base and base not in gone else {}
    if not versions:
        return None
    rules = tuple(rule for rule in route.rules if rule.to not in gone and rule.classifier not in gone)
    shadow = tuple(version for version in route.shadow if version not in gone)
    return route.model_copy(update={"versions": versions, "rules": rules, "shadow": shadow})


def _rebuild(store: Store, plan: ErasurePlan, options: Options) -> Facts:
    """The datasets without the rows: old → new, "" where nothing is left or nothing is asked for. `changed`: those whose
    training rows are others though none of the rows was trained on."""
    made: dict[str, str] = {}
    changed = []
    for affected in plan.datasets if options.retrain != "none" else ():
        with Catalog(store) as catalog:
            old = catalog.get_as(DatasetManifest, affected.id)
        values: Facts = {"name": old.name, "base_model": old.base_model, "release": {"alias": "none"}}
        config = parse(RunConfig, values | {"data": _without_datasets(old.config, made)})
        try:
            new = pipeline.prepare(config, store)
        except NothingLeft:
            made[old.id] = ""
            continue
        made[old.id] = new.id
        for split in TRAINED_ON:
            if not affected.held.get(split) and old.splits[split].rows_digest != new.splits[split].rows_digest:
                changed.append(old.id)
    return {"datasets": made, "changed": sorted(set(changed))}


def _without_datasets(data: Facts, made: dict[str, str]) -> Facts:
    """Settings of a dataset in which rules that look into other datasets look into those that replace them."""
    rules = []
    for rule in data.get("curate", ()):
        against = [made.get(place, place) for place in rule.get("against", ())]
        if "against" in rule and not any(against):
            continue
        rules.append(rule | {"against": [place for place in against if place]} if against else rule)
    return data | {"curate": rules}


def _retrain(store: Store, plan: ErasurePlan, datasets: dict[str, str], options: Options) -> Facts:
    """Every run once more without the rows, bases before what was trained on them."""
    runs: list[Facts] = []
    versions: dict[str, str] = {}
    with Catalog(store) as catalog:
        of_run = {run.id: [v for v in catalog.all(ModelVersion) if v.run == run.id] for run in plan.runs}
        records = {run.id: catalog.get_as(RunRecord, run.id) for run in plan.runs if run.finished}
    gone = {version.id for version in plan.versions}
    wanted = _wanted(plan, of_run)
    for run in plan.runs:
        fate = _fate(run, datasets, options, gone, versions, run.id in wanted)
        if fate != "retrained":
            runs.append({"run": run.id, "fate": fate})
            continue
        record = records[run.id]
        values = {**record.config, "base_model": versions.get(run.base_model, run.base_model), "deploy": None}
        config = parse(RunConfig, values | {"data": _without_datasets(record.config["data"], datasets)})
        new = pipeline.train(config, store)
        facts: Facts = {"run": run.id, "fate": fate, "new_run": new.id, "weights": files_digest(new.export)}
        judged = [version for version in of_run[run.id] if version.status in ("accepted", "rejected")]
        if judged:
            pipeline.evaluate(config, store)
            version = pipeline.release(config, store, promote=False)
            facts |= {"version": version.id, "status": version.status, "weights": version.files_digest}
            versions |= {old.id: version.id for old in judged if version.status == "accepted"}
        runs.append(facts)
    return {"runs": runs, "versions": versions}


def _wanted(plan: ErasurePlan, of_run: dict[str, list[ModelVersion]]) -> set[str]:
    """Runs whose versions an alias stood for, and those of the versions under them."""
    named = {version for hit in plan.aliases.values() for version in hit}
    wanted: set[str] = set()
    for run in reversed(plan.runs):
        if any(version.id in named for version in of_run[run.id]):
            wanted.add(run.id)
            named.add(run.base_model)
    return wanted


def _fate(
    run: AffectedRun, datasets: dict[str, str], options: Options, gone: set[str], versions: dict[str, str], wanted: bool
) -> str:
    """What becomes of a run, in words; `retrained` where it is to be repeated."""
    if not run.used:
        return "kept: it was not trained on the rows"
    if not run.finished:
        return "removed: it was not finished"
    if options.retrain == "none" or (options.retrain == "used" and not wanted):
        return "removed: no replacement was asked for"
    if options.remove_adapters and run.adapter and run.base_model not in gone:
        return "removed: the adapter was all that it made"
    if not datasets.get(run.dataset, run.dataset):
        return "removed: no row is left"
    if run.base_model in gone and run.base_model not in versions:
        return "removed: its base has no replacement"
    return "retrained"


def _move(store: Store, record: Erasure, routes: dict[str, Facts], versions: dict[str, str]) -> Facts:
    """Aliases back to what they stood for, with replacements in the place of what was withdrawn. A protected alias waits for
    the approvals of its replacement, as ever; the erasure does not."""
    moved: dict[str, list[str]] = {}
    waiting: dict[str, str] = {}
    with stage("move") as it, Catalog(store) as catalog:
        for alias, was in routes.items():
            before = parse(AliasRoute, was | {"versions": dict(was["versions"])})
            new = _replaced(before, versions, set(catalog.withdrawn()))
            if new is None:
                continue
            if catalog.routes().get(alias) != new:
                try:
                    catalog.set_route(alias, new, f"{record.id}: trained again without the rows")
                except PolicyError as error:
                    waiting[alias] = f"{new.stable}: {error.message}"
                    continue
            moved[alias] = list(new.versions)
        said = [f"{alias} → {new[0]}" for alias, new in moved.items()]
        said += [f"{alias} waits for {why}" for alias, why in waiting.items()]
        it.done(", ".join(said) or "no alias")
    return {"aliases": moved, "waiting": waiting}


def _replaced(route: AliasRoute, versions: dict[str, str], gone: set[str]) -> AliasRoute | None:
    """None where the stable version has no replacement."""
    weights: dict[str, float] = {}
    for version, weight in route.versions.items():
        if (new := versions.get(version, version)) not in gone:
            weights[new] = weights.get(new, 0) + weight
    if (first := versions.get(route.stable, route.stable)) in gone or not any(weights.values()):
        return None
    rules = []
    for rule in route.rules:
        rule = rule.model_copy(
            update={"to": versions.get(rule.to, rule.to), "classifier": versions.get(rule.classifier, rule.classifier)}
        )
        if rule.to not in gone and rule.classifier not in gone:
            rules.append(rule)
    shadow = tuple(new for one in route.shadow if (new := versions.get(one, one)) not in gone)
    order = {first: weights.pop(first), **weights}
    return route.model_copy(update={"versions": order, "rules": tuple(rules), "shadow": shadow})


def _purge(store: Store, record: Erasure, plan: ErasurePlan, options: Options) -> Facts:
    """Everything that is to go is listed with its digest first, so that a process killed here leaves the list."""
    path = paths.erasure(record.id, "purged.json")
    with stage("purge") as it, Catalog(store) as catalog:
        if not store.exists(path):
            standing = standing_for(catalog, {version.id for version in plan.versions}).values()
            left = {version for hit in standing for version in hit}
            weights = [one.id for one in plan.versions if one.id not in left and not options.keep_weights]
            going = [entry.model_dump() for entry in listed(catalog, plan, weights)]
            store.write(path, canonical_json({"weights": weights, "files": going}))
        value = store.read_json(path)
        files = tuple(FileEntry.model_validate(entry) for entry in value["files"])
        for version in value["weights"]:
            if catalog.last("model")[version].data["state"] != WITHDRAWN[1]:
                catalog.append(Event(kind="model", subject=version, data={"state": WITHDRAWN[1], "erasure": record.id}))
        found = purge(store, plan, value["weights"], files)
        size = sum(entry.size for entry in files)
        it.done(f"{len(files)} files, {size / 1e6:,.1f} MB")
    kept = sorted({version.id for version in plan.versions} - set(value["weights"]))
    return {"files": len(files), "bytes": size, "digest": found, "list": path, "weights_left": kept}
