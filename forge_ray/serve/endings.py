"""What the log says of endpoints: that they run, that they ended, and why (no ray).

An end that nobody recorded is recorded by the next start of the same name, or by `forge undeploy`: what a lease shows is a
hint, and the signed event is the act of a person.
"""

from __future__ import annotations

import contextlib
from typing import Any

from forge_ray.records import Deployment, Event
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.endpoint_state import CRASHED, ENDED, RUNNING, SILENT, EndpointState, state_of


def note(catalog: Catalog, deployment: Deployment, state: str, **more: Any) -> None:
    """Write an event of the deployment. The lease of one that ended is deleted; a coordinator that still runs, because its
    network was cut, writes it again."""
    data = {"state": state, "name": deployment.name, "model_version": deployment.model_version, **more}
    catalog.append(Event(kind="deployment", subject=deployment.id, data=data))
    if state != RUNNING:
        with contextlib.suppress(OSError):  # it is another user's; behind this event it says nothing
            catalog.store.delete(paths.endpoint(deployment.id))


def last_deployment(catalog: Catalog, name: str) -> Deployment | None:
    """The deployment of this name that was started last."""
    records = [record for record in catalog.all(Deployment) if record.name == name]
    placed = {record.id: catalog.standing.placed("deployment", record.id) for record in records}
    started = {record: max((event.line for event in events), default=0) for record, events in placed.items()}
    return max(records, key=lambda record: (started[record.id], record.created_at), default=None)


def note_unsaid_ends(catalog: Catalog, name: str, served: str = "") -> list[str]:
    """Record the end of each deployment of the name that has crashed or is silent, with when it was last seen; their ids.
    `served`: the deployment that the cluster serves, of which that is not true whatever its lease says."""
    ended = []
    for record in catalog.all(Deployment):
        now = state_of(catalog, record.id)
        if record.name == name and record.id != served and now.state in (CRASHED, SILENT):
            note(catalog, record, ENDED, was=now.state, reason=_reason(now))
            ended.append(record.id)
    return ended


def note_replaced(catalog: Catalog, before: Deployment, deployment: Deployment) -> None:
    """Record the end of a deployment in whose place another one answers."""
    if state_of(catalog, before.id).state in (RUNNING, SILENT):
        note(catalog, before, ENDED, was=RUNNING, reason=f"replaced by {deployment.id}")


def status_on_record(catalog: Catalog, elsewhere_than: set[str]) -> list[dict[str, Any]]:
    """What the store knows of endpoints that are not among the names: the last of each name that was started and has no end
    on record."""
    names = dict.fromkeys(record.name for record in catalog.all(Deployment))
    endpoints = []
    for record in (last_deployment(catalog, name) for name in names if name not in elsewhere_than):
        now = state_of(catalog, record.id) if record else EndpointState("")
        if record and now.state in (RUNNING, SILENT, CRASHED):
            events = catalog.events("deployment", record.id)
            url = next((str(event.data["url"]) for event in reversed(events) if event.data.get("url")), "")
            named = {"name": record.name, "status": now.state, "message": now.seen or "by its last event"}
            endpoints.append({**named, "url": url, "replica_states": {}, "deployment": record.id})
    return endpoints


def _reason(now: EndpointState) -> str:
    """Why an end is recorded that nobody saw."""
    seen = f"last seen at {now.seen_at}" if now.seen_at else ""
    if now.state == CRASHED:
        return ", ".join(filter(None, ("its process ended without a word", seen)))
    return f"silent, {seen}"
