"""Erase rows and everything derived from them: tombstones → withdraw → rebuild and retrain → purge → certificate.

Every stage appends an event when it is complete and can be repeated safely, so a process that was killed is resumed by the
same command. The tombstones are written first, so that no new dataset contains the rows; then the record, after which
nothing derived from the old datasets is published any more. What was published in between is found by a look at the store
itself, and goes through the same stages in another round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from forge_ray.data.build import tombstones as erased
from forge_ray.data.build.prepare import restore_tombstones
from forge_ray.errors import ConfigError, EngineError, NotFound, StoreError
from forge_ray.governance.erasure import outside
from forge_ray.governance.erasure.answers import remove_covered
from forge_ray.governance.erasure.certificate import ANSWERS_REMOVED, certify, path_of, statement_of
from forge_ray.governance.erasure.endpoints import wait_until_released
from forge_ray.governance.erasure.options import Done, Facts, Options
from forge_ray.governance.erasure.plan import ErasurePlan, extended, late_plan, plan_of, standing_for
from forge_ray.governance.erasure.purging import StoreCheck, check, purge_listed, wait_for_trainings
from forge_ray.governance.erasure.repeat import rebuild, retrain
from forge_ray.governance.erasure.routes import move, withdraw
from forge_ray.governance.erasure.search import ErasureRequest, search
from forge_ray.progress import stage
from forge_ray.records import Deployment, Erasure, Event
from forge_ray.store import signing
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

ROUNDS = 5  # a round finds what was published between the plan of the one before and its purge


def erase(store: Store, request: ErasureRequest, options: Options, why: str = "") -> Facts:
    """Run every stage of an erasure and return the statement of its certificate. Raises `NotFound` where no dataset version
    holds such a row, and `EngineError`, after it has written the certificate, where an endpoint or another process may
    still hold something."""
    with Catalog.open(store) as catalog:
        for deployment in options.stopped:
            catalog.get_as(Deployment, deployment)
        restore_tombstones(store)
        record = _begun(catalog, request, options, why)
        done = Done()
        # at each call: a person may have asked again since
        if num_answers := remove_covered(catalog, erased.of_erasure(store, record.id)):
            catalog.append(Event(kind="erasure", subject=record.id, data={"state": ANSWERS_REMOVED, "count": num_answers}))
        checked = _rounds(catalog, record, options, done)
        places = outside.clear(store, () if store.is_local else outside.purged_files(store))
        with stage("endpoints") as it:
            routed = standing_for(catalog, done.versions).values()
            blocked = done.versions - {version for hit in routed for version in hit}
            named = {deployment.id for plan in done.plans for deployment in plan.deployments}
            endpoints = wait_until_released(catalog, blocked, named, options.wait_s, options.stopped)
            it.done(f"{len(endpoints)} not confirmed" if endpoints else "none holds a withdrawn version")
        unconfirmed = checked.unconfirmed | endpoints
        if unconfirmed:
            certify(catalog, record, done, checked, places, unconfirmed, asdict(options))
            raise EngineError(
                f"{record.id}: the rows are erased, but this is not confirmed: "
                + "; ".join(f"{what}: {reason}" for what, reason in sorted(unconfirmed.items())),
                hint="end what is named there (`forge undeploy NAME`), or run the same command where RAY_ADDRESS names its"
                " cluster; --stopped dep_… for an endpoint that no longer exists. The certificate names them",
            )
        suffix = _suffix(len(done.plans))
        _once(
            catalog,
            record,
            f"finished{suffix}",
            lambda: certify(catalog, record, done, checked, places, {}, asdict(options)),
        )
        return statement_of(catalog.store.read_json(path_of(record.id)))


def _rounds(catalog: Catalog, record: Erasure, options: Options, done: Done) -> StoreCheck:
    """Every round; the last one leaves a store in which nothing is found any more."""
    plan = ErasurePlan.model_validate(record.plan)
    for number in range(1, ROUNDS + 1):
        wait_for_trainings(catalog, options.wait_s)
        _round(catalog, record, plan, options, _suffix(number), done)
        state = f"late{_suffix(number + 1)}"
        late = next(
            (event.data["plan"] for event in catalog.events("erasure", record.id) if event.data["state"] == state), None
        )
        if late is None:
            running = wait_for_trainings(catalog, options.wait_s)
            checked = check(catalog, record.id, done.plans, options.wait_s, running)
            late_found = late_plan(catalog, done.plans, checked.datasets, erased.of_erasure(catalog.store, record.id).has)
            if late_found is None:
                return checked
            late = late_found.stored()
            catalog.append(Event(kind="erasure", subject=record.id, data={"state": state, "plan": late}))
        plan = ErasurePlan.model_validate(late)
    raise StoreError(
        f"{record.id}: after {ROUNDS} rounds something is still being published that is derived from the rows",
        hint="stop what writes to the store (`forge runs list`), then run the same command again",
    )


def _suffix(number: int) -> str:
    return "" if number == 1 else f" {number}"


def _round(catalog: Catalog, record: Erasure, plan: ErasurePlan, options: Options, suffix: str, done: Done) -> None:
    """All stages for what one plan names, from withdrawal to purge."""
    withdrawn = _once(catalog, record, f"withdrawn{suffix}", lambda: withdraw(catalog, record, plan, options))
    if withdrawn["policy"] != options.deployments:
        raise ConfigError(
            f"{record.id} was started with --deployments {withdrawn['policy']}, and that stage is complete",
            hint=f"give --deployments {withdrawn['policy']}; `forge alias archive` archives an alias of a marked version",
        )
    done.routes = {**withdrawn["routes"], **done.routes}
    rebuilt = _once(catalog, record, f"rebuilt{suffix}", lambda: rebuild(catalog, plan, options, done.datasets))
    done.datasets |= rebuilt["datasets"]
    if rebuilt["changed"]:
        plan = extended(catalog, plan, set(rebuilt["changed"]))
        more = _once(catalog, record, f"withdrawn more{suffix}", lambda: withdraw(catalog, record, plan, options))
        done.routes = {**more["routes"], **done.routes}
    retrained = _once(
        catalog, record, f"retrained{suffix}", lambda: retrain(catalog, plan, done.datasets, options, done.replaced)
    )
    done.runs += retrained["runs"]
    done.replaced |= retrained["versions"]
    moved = _once(catalog, record, f"moved{suffix}", lambda: move(catalog, record, done.routes, done.replaced))
    done.aliases |= moved["aliases"]
    done.waiting |= moved.get("waiting", {})
    done.plans.append(plan)
    done.purged.append(
        _once(
            catalog, record, f"purged{suffix}", lambda: purge_listed(catalog, record.id, plan, options.keep_weights, suffix)
        )
    )


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
        if not reached.places and not reached.num_answers:
            hint = "`forge data find` looks for a record or a subject"
            if reached.variants:
                hint = "`--plan` lists rows that nearly match, and how to erase them"
            raise NotFound("no dataset version and no kept answer of this store holds such a row", hint=hint)
        catalog.check_may(*rights(plan_of(catalog, reached), options))
        erased.write_tombstones(catalog.store, erasure.id, reached.tombstones)
        catalog.sync()
        reached = search(catalog, request)
        erased.write_tombstones(catalog.store, erasure.id, reached.tombstones)
        plan = plan_of(catalog, reached)
        erasure = erasure.model_copy(update={"num_records": plan.num_records, "plan": plan.stored()})
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
