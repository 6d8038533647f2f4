"""Erase rows and everything derived from them: tombstones → withdraw → rebuild and retrain → purge → certificate.

Every stage appends an event when it is complete and can be repeated safely, so a process that was killed is resumed by the
same command. The tombstones are written first, so that no new dataset contains the rows.
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
from forge_ray.release import promotion
from forge_ray.serve.routing import versions_of
from forge_ray.store import paths, signing
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.placed import WITHDRAWN

Facts = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How an erasure is carried out.

    `deployments`: `retire` removes affected versions from every alias at once; `mark` lets them serve until a replacement is
    released. `retrain`: repeat all affected runs, only those that an alias routes to, or none. `remove_adapters`: delete an
    adapter whose base is not affected instead of training it again. `keep_weights`: keep the weights of affected versions,
    blocked from use."""

    deployments: Literal["retire", "mark"] = "retire"
    retrain: Literal["all", "used", "none"] = "all"
    remove_adapters: bool = False
    keep_weights: bool = False


def erase(store: Store, request: ErasureRequest, options: Options, why: str = "") -> Facts:
    """Run every stage of an erasure and return the statement of its certificate. Raises `NotFound` where no dataset version
    holds such a row."""
    with Catalog.open(store) as catalog:
        return _erase(catalog, request, options, why)


def _erase(catalog: Catalog, request: ErasureRequest, options: Options, why: str) -> Facts:
    record = _begun(catalog, request, options, why)
    plan = ErasurePlan.model_validate(record.plan)
    withdrawn = _once(catalog, record, "withdrawn", lambda: _withdraw(catalog, record, plan, options))
    if withdrawn["policy"] != options.deployments:
        raise ConfigError(
            f"{record.id} was started with --deployments {withdrawn['policy']}, and that stage is complete",
            hint=f"give --deployments {withdrawn['policy']}; `forge alias archive` archives an alias of a marked version",
        )
    rebuilt = _once(catalog, record, "rebuilt", lambda: _rebuild(catalog, plan, options))
    if rebuilt["changed"]:
        plan = extended(catalog, plan, set(rebuilt["changed"]))
        more = _once(catalog, record, "withdrawn more", lambda: _withdraw(catalog, record, plan, options))
        withdrawn = withdrawn | {"routes": {**more["routes"], **withdrawn["routes"]}}
    retrained = _once(catalog, record, "retrained", lambda: _retrain(catalog, plan, rebuilt["datasets"], options))
    moved = _once(catalog, record, "moved", lambda: _move(catalog, record, withdrawn["routes"], retrained["versions"]))
    purged = _once(catalog, record, "purged", lambda: _purge(catalog, record, plan, options))
    check_gone(catalog, record.id)
    facts = {"rebuilt": rebuilt, "retrained": retrained, "withdrawn": withdrawn, "moved": moved, "purged": purged}
    _once(catalog, record, "finished", lambda: certify(catalog, record, plan, facts, asdict(options)))
    return statement_of(catalog.store.read_json(path_of(record.id)))


def _once(catalog: Catalog, record: Erasure, state: str, work: Callable[[], Facts]) -> Facts:
    """The facts of a stage: from its event if it is complete, else from running `work` now. A stage can take hours, so the
    catalogue is brought up to date before and after it."""
    catalog.sync()
    for event in catalog.events("erasure", record.id):
        if event.data["state"] == state:
            return event.data
    facts = work()
    catalog.sync()
    catalog.append(Event(kind="erasure", subject=record.id, data={"state": state, "why": record.why, **facts}))
    return facts


def begun(catalog: Catalog, request: ErasureRequest) -> ErasurePlan | None:
    """The plan of an erasure that was started with the same request, finished or not; None where there is none."""
    erasure = _record(catalog.store, request, Options(), "")
    return ErasurePlan.model_validate(catalog.get_as(Erasure, erasure.id).plan) if catalog.has(erasure.id) else None


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


def _begun(catalog: Catalog, request: ErasureRequest, options: Options, why: str) -> Erasure:
    """The record of this request's erasure, written now unless it exists. The rights for every stage are checked first.
    The tombstones are written before the final plan, so that no dataset built in between is missing from it."""
    erasure = _record(catalog.store, request, options, why)
    if catalog.has(erasure.id):
        erasure = catalog.get_as(Erasure, erasure.id)
        catalog.check_may(*rights(ErasurePlan.model_validate(erasure.plan), options))
        return erasure
    with stage("tombstones") as it:
        reached = search(catalog, request)
        if not reached.places:
            raise NotFound(
                "no dataset version of this store holds such a row",
                hint="`forge data find` looks for a record or a subject",
            )
        catalog.check_may(*rights(plan_of(catalog, reached), options))
        erased.write_tombstones(catalog.store, erasure.id, reached.tombstones)
        plan = plan_of(catalog, search(catalog, request))
        erasure = erasure.model_copy(update={"num_records": plan.num_records, "plan": plan.model_dump(mode="json")})
        it.done(f"{erasure.id}  {plan.num_records} records, {plan.num_near_duplicates} near duplicates")
    return catalog.put(erasure)


def rights(plan: ErasurePlan, options: Options) -> list[str]:
    """Everything that the erasure will write, as keys of `authority.MAY`. Checked before the start: an erasure whose signer
    may not write all of it would stop half-way."""
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


def _withdraw(catalog: Catalog, record: Erasure, plan: ErasurePlan, options: Options) -> Facts:
    """Withdraw the affected versions: no alias can be moved to them any more, and with `retire` they stop serving."""
    affected = {version.id for version in plan.versions}
    retire = options.deployments == "retire"
    with stage("withdraw") as it:
        withdrawn, archived = catalog.withdrawn(), catalog.archived()
        for version in sorted(affected - set(withdrawn)):
            state = WITHDRAWN[retire or version in archived]
            data: Facts = {"state": state, "erasure": record.id, "why": record.why or "rows were erased"}
            catalog.append(Event(kind="model", subject=version, data=data))
        routes = {}
        for alias, hit in plan.aliases.items():
            now = catalog.routes().get(alias)
            if now is None or not set(versions_of(now)) & affected:
                continue  # done before an interruption
            routes[alias] = now.model_dump(mode="json") | {"versions": list(now.versions.items())}
            catalog.append(
                Event(kind="erasure", subject=record.id, data={"state": "alias", "alias": alias, "was": routes[alias]})
            )
            if retire:
                reason = f"{record.id}: {', '.join(hit)} withdrawn"
                try:
                    promotion.set_route(catalog, alias, _without(catalog, now, affected), reason)
                except PolicyError:  # the version that it would fall back to has no approval
                    promotion.set_route(catalog, alias, None, reason)
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
        what = "no longer serving" if retire else "still serving"
        it.done(f"{len(affected)} versions blocked, {what}; {len(routes)} aliases, {len(plan.deployments)} deployments")
    return {"policy": options.deployments, "versions": sorted(affected), "routes": routes}


def _without(catalog: Catalog, route: AliasRoute, withdrawn: set[str]) -> AliasRoute | None:
    """The route without the withdrawn versions; its base alone where none is left and it falls back to the base; else
    None."""
    versions = {version: weight for version, weight in route.versions.items() if version not in withdrawn and weight}
    if not versions and route.fallback == "base":
        base = catalog.get_as(ModelVersion, route.stable).base_model
        versions = {base: 1.0} if base and base not in withdrawn else {}
    if not versions:
        return None
    rules = tuple(rule for rule in route.rules if rule.to not in withdrawn and rule.classifier not in withdrawn)
    shadow = tuple(version for version in route.shadow if version not in withdrawn)
    return route.model_copy(update={"versions": versions, "rules": rules, "shadow": shadow})


def _rebuild(catalog: Catalog, plan: ErasurePlan, options: Options) -> Facts:
    """Rebuild the affected datasets without the rows. `datasets`: old → new id, "" where no row is left. `changed`: datasets
    whose training rows differ although none of the erased rows was among them."""
    replacements: dict[str, str] = {}
    changed = []
    for affected in plan.datasets if options.retrain != "none" else ():
        old = catalog.get_as(DatasetManifest, affected.id)
        values: Facts = {"name": old.name, "base_model": old.base_model, "release": {"alias": "none"}}
        config = parse(RunConfig, values | {"data": _without_datasets(old.config, replacements)})
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


def _without_datasets(data: Facts, replacements: dict[str, str]) -> Facts:
    """Settings of a dataset whose rules compare with the replacements of affected datasets."""
    rules = []
    for rule in data.get("curate", ()):
        against = [replacements.get(place, place) for place in rule.get("against", ())]
        if "against" in rule and not any(against):
            continue
        rules.append(rule | {"against": [place for place in against if place]} if against else rule)
    return data | {"curate": rules}


def _retrain(catalog: Catalog, plan: ErasurePlan, datasets: dict[str, str], options: Options) -> Facts:
    """Repeat the affected runs without the rows, each base model before the runs that start from it."""
    runs: list[Facts] = []
    versions: dict[str, str] = {}
    store = catalog.store
    of_run = {run.id: [v for v in catalog.all(ModelVersion) if v.run == run.id] for run in plan.runs}
    records = {run.id: catalog.get_as(RunRecord, run.id) for run in plan.runs if run.finished}
    withdrawn = {version.id for version in plan.versions}
    in_use = _runs_in_use(plan, of_run)
    for run in plan.runs:
        fate = _fate(run, datasets, options, withdrawn, versions, run.id in in_use)
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


def _runs_in_use(plan: ErasurePlan, of_run: dict[str, list[ModelVersion]]) -> set[str]:
    """Runs whose versions an alias routes to, and the runs of their base models."""
    named = {version for hit in plan.aliases.values() for version in hit}
    in_use: set[str] = set()
    for run in reversed(plan.runs):
        if any(version.id in named for version in of_run[run.id]):
            in_use.add(run.id)
            named.add(run.base_model)
    return in_use


def _fate(
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
    if run.base_model in withdrawn and run.base_model not in versions:
        return "removed: its base has no replacement"
    return "retrained"


def _move(catalog: Catalog, record: Erasure, routes: dict[str, Facts], versions: dict[str, str]) -> Facts:
    """Restore the routes of the aliases with the replacements of the withdrawn versions. A protected alias waits for the
    approvals of its replacement; the erasure does not wait for it."""
    moved: dict[str, list[str]] = {}
    waiting: dict[str, str] = {}
    with stage("move") as it:
        for alias, was in routes.items():
            before = parse(AliasRoute, was | {"versions": dict(was["versions"])})
            new = _replaced(before, versions, set(catalog.withdrawn()))
            if new is None:
                continue
            if catalog.routes().get(alias) != new:
                try:
                    promotion.set_route(catalog, alias, new, f"{record.id}: trained again without the rows")
                except PolicyError as error:
                    waiting[alias] = f"{new.stable}: {error.message}"
                    continue
            moved[alias] = list(new.versions)
        summary = [f"{alias} → {new[0]}" for alias, new in moved.items()]
        summary += [f"{alias} waits for {why}" for alias, why in waiting.items()]
        it.done(", ".join(summary) or "no alias")
    return {"aliases": moved, "waiting": waiting}


def _replaced(route: AliasRoute, versions: dict[str, str], withdrawn: set[str]) -> AliasRoute | None:
    """The route with each withdrawn version replaced; None where the stable version has no replacement."""
    weights: dict[str, float] = {}
    for version, weight in route.versions.items():
        if (new := versions.get(version, version)) not in withdrawn:
            weights[new] = weights.get(new, 0) + weight
    if (first := versions.get(route.stable, route.stable)) in withdrawn or not any(weights.values()):
        return None
    rules = []
    for rule in route.rules:
        rule = rule.model_copy(
            update={"to": versions.get(rule.to, rule.to), "classifier": versions.get(rule.classifier, rule.classifier)}
        )
        if rule.to not in withdrawn and rule.classifier not in withdrawn:
            rules.append(rule)
    shadow = tuple(new for one in route.shadow if (new := versions.get(one, one)) not in withdrawn)
    order = {first: weights.pop(first), **weights}
    return route.model_copy(update={"versions": order, "rules": tuple(rules), "shadow": shadow})


def _purge(catalog: Catalog, record: Erasure, plan: ErasurePlan, options: Options) -> Facts:
    """Delete files. All of them are listed with their digests first, so that the list survives an interruption."""
    store, path = catalog.store, paths.erasure(record.id, "purged.json")
    with stage("purge") as it:
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
        digest = purge(store, plan, value["weights"], files)
        size = sum(entry.size for entry in files)
        it.done(f"{len(files)} files, {size / 1e6:,.1f} MB")
    kept = sorted({version.id for version in plan.versions} - set(value["weights"]))
    return {"files": len(files), "bytes": size, "digest": digest, "list": path, "weights_left": kept}
