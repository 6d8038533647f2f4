"""Whether an endpoint runs, as far as the store and this machine can tell: its last event, its process, its lease.

    work/endpoints/<deployment>.json   the lease, which the coordinator of the deployment renews (`store/lease.py`)

A lease is not signed, and a machine that is cut off looks like one that has crashed: an old lease never ends anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from forge_ray.errors import StoreError
from forge_ray.records import Event
from forge_ray.store import lease, paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.lease import Lease
from forge_ray.store.owner import is_alive

BEAT_S = 30.0
VALID_S = 180.0  # an endpoint that was not seen for so long is silent
RUNNING, SILENT, CRASHED, ENDED = "running", "silent", "crashed", "ended"


@dataclass(frozen=True)
class EndpointState:
    """`state`: `running`; `silent`: its lease is out of date; `crashed`: its process is known to have ended without a word;
    `ended`: its end is on record; or what else its last event states, "" without one. `age_s`: seconds since its lease was
    renewed, None without one. `lives`: whether something shows that it is running now."""

    state: str
    age_s: float | None = None
    lives: bool = False

    @property
    def seen(self) -> str:
        """When it was last seen, in words; "" without a lease."""
        return "" if self.age_s is None else lease.last_seen(self.age_s)

    @property
    def seen_at(self) -> str:
        """When it was last seen, as a time; "" without a lease."""
        if self.age_s is None:
            return ""
        return (datetime.now(UTC) - timedelta(seconds=self.age_s)).isoformat(timespec="seconds")


def state_of(catalog: Catalog, deployment: str) -> EndpointState:
    """The state of the deployment with this id. `crashed` can be said on the machine of its process alone, until that is
    started again. One without a lease, or with one that cannot be read, is in the state of its last event."""
    events = catalog.events("deployment", deployment)
    last = events[-1] if events else None
    state = str(last.data["state"]) if last else ""
    if last and state != RUNNING and not was_silent(last):
        return EndpointState(state)
    process = str(last.data.get("process", "")) if last else ""
    is_process_dead = state == RUNNING and is_alive(process) is False
    path = paths.endpoint(deployment)
    holder = _holder(catalog.store, path)
    if holder is None:
        return EndpointState(CRASHED if is_process_dead else state)
    age_s = lease.age_s(catalog.store, path, may_write=catalog.is_writable)
    lives = age_s < VALID_S and lease.runs_here(holder) is not False
    if is_process_dead and not lives:
        return EndpointState(CRASHED, age_s)
    if age_s < VALID_S:  # one that was recorded as ended may have been cut off, and is back
        return EndpointState(RUNNING, age_s, lives)
    return EndpointState(SILENT if state != ENDED else ENDED, age_s)


def was_silent(event: Event) -> bool:
    """Whether an event records the end of an endpoint that nobody saw end: it was silent."""
    return event.data["state"] == ENDED and event.data.get("was") == SILENT


def _holder(store: Store, path: str) -> Lease | None:
    try:
        return lease.read(store, path)
    except (OSError, StoreError):  # of another user, in a store that no group shares
        return None
