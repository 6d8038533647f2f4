"""The coordinator: one small actor that the replicas of a deployment share.

It reads the store's facts, computes tables from them, and moves all replicas from one table to the next: each prepares the
new table, and once all living replicas have done so, it goes live everywhere. It also keeps what only a view over all
replicas can tell: whether a canary exceeds its bounds, how much of its limits a key has used, and whether the endpoint
lives, which its lease says to other machines. It keeps no other state: when it dies, replicas continue with their table,
Ray restarts it, and it reads the rest from the store. Its name contains the id of the deployment: a new one has its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import ray

from forge_ray.config.base import parse
from forge_ray.config.release import DeployConfig
from forge_ray.records import Deployment
from forge_ray.serve.canary import AnswerOutcome, Outcomes, without_canaries
from forge_ray.serve.endpoint_lease import EndpointLease, beat, give_up
from forge_ray.serve.keys import ApiKey
from forge_ray.serve.limits import Counters, LimitVerdict
from forge_ray.serve.metrics import store_metrics
from forge_ray.serve.routing import RoutingFacts, Table, table_of, versions_of
from forge_ray.serve.watcher import StoreWatcher
from forge_ray.store.aliases import alias_event, route_of
from forge_ray.store.files import Store
from forge_ray.store.lease import new_lease
from forge_ray.store.log_reader import Line
from forge_ray.store.placed import event_of, is_readable

NAMESPACE = "forge_ray"
WATCH_S = 5.0  # a watch that sees nothing new returns after this
SILENT_S = 5.0  # a replica that has not reported for this long is not waited for
FORGET_S = 60.0  # after this it is not listed any more
IDLE_S = 600.0  # a coordinator that no replica calls for this long exits; the next replica starts another
LOG = logging.getLogger(__name__)


def read_table(config: DeployConfig, store: StoreWatcher, broken: dict[str, str], before: Table | None = None) -> Table:
    """The table that follows from the store's current facts."""
    facts = RoutingFacts(store.routes(), frozenset(store.archived()), store.version)
    return table_of(config, facts, broken, before)


@dataclass
class ReplicaReport:
    """What a replica last reported about itself."""

    at: float
    prepared: str = ""
    live: str = ""
    load: dict[str, int] = field(default_factory=dict)
    in_memory: list[str] = field(default_factory=list)
    metrics: str = ""


class Coordinator:
    """The actor; `coordinator_of` starts it."""

    def __init__(self, record: dict[str, Any], store_uri: str, idle_s: float = IDLE_S) -> None:
        self.idle_s = idle_s
        self.deployment = Deployment.model_validate(record)
        self.config = parse(DeployConfig, self.deployment.config)
        self.watcher = StoreWatcher(Store(store_uri), self.deployment.genesis, self.deployment.log_head)
        self.watcher.refresh()
        self.broken: dict[str, str] = {}
        self.outcomes = Outcomes()
        self.counters = Counters()
        self.replicas: dict[str, ReplicaReport] = {}
        self.next = read_table(self.config, self.watcher, self.broken)
        self.live: Table | None = None
        self._changed = asyncio.Event()
        self._polling: asyncio.Task[None] | None = None
        self._last_report = time.monotonic()
        self.is_store_readable = True
        self.lease = EndpointLease(new_lease())

    async def start(self) -> dict[str, Any]:
        """The table with which a new replica begins."""
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll())
        return (self.live or self.next).model_dump(mode="json")

    async def watch(self, replica: str, prepared: str, live: str, broken: dict[str, str]) -> dict[str, Any]:
        """What a replica should do: `prepare` this table, and answer by the table `live`. Returns at once if that differs
        from what the replica reports, else when something changes."""
        await self.start()
        report = self.replicas.setdefault(replica, ReplicaReport(time.monotonic()))
        report.at, report.prepared, report.live = time.monotonic(), prepared, live
        if prepared == self.next.id and broken.keys() - self.broken.keys():
            LOG.error("cannot be served: %s", broken)
            self.broken |= broken
            self._renew()
        self._advance()
        if self.next.id == prepared and (self.live is None or self.live.id == live):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), WATCH_S)
        return {
            "prepare": None if self.next.id == prepared else self.next.model_dump(mode="json"),
            "live": self.live.id if self.live else "",
        }

    async def report(
        self, replica: str, load: dict[str, int], in_memory: list[str], outcomes: list[AnswerOutcome], metrics: str | None
    ) -> None:
        """A replica's heartbeat: its load, the versions in its memory, its answers since the last one; about every tenth
        carries `metrics`."""
        report = self.replicas.setdefault(replica, ReplicaReport(time.monotonic()))
        report.at, report.load, report.in_memory = time.monotonic(), load, in_memory
        self._last_report = time.monotonic()
        if metrics is not None:
            report.metrics = metrics
        for outcome in outcomes:
            self.outcomes.add(outcome)
        await self.counters.renew(replica)
        self._advance()

    async def take(self, key: ApiKey, lease: str, owner: str, tokens: int) -> LimitVerdict:
        """As `Counters.take`, for all replicas."""
        return await self.counters.take(key, lease, owner, tokens)

    async def settle(self, key_id: str, lease: str, used: int) -> None:
        """As `Counters.settle`."""
        await self.counters.settle(key_id, lease, used)

    async def metrics(self) -> dict[str, str]:
        """The exposition of each replica, as last reported, and the coordinator's own."""
        own = store_metrics(self.deployment.name, self.watcher.standing.num_ignored, not self.is_store_readable)
        return {"coordinator": own} | {name: report.metrics for name, report in self._alive().items()}

    async def state(self) -> dict[str, Any]:
        """The table and the replicas, for `forge deploy --status`."""
        now = time.monotonic()
        table = self.live or self.next
        return {
            "deployment": self.deployment.id,
            "table": table.model_dump(mode="json"),
            "settled": self.live is not None and self.live.id == self.next.id,
            "lease": self.lease.state,
            "replicas": {
                name: {
                    "live": report.live == table.id,
                    "seen_s": round(now - report.at, 1),
                    "held": report.in_memory,
                    **report.load,
                }
                for name, report in self._alive().items()
            },
        }

    async def refresh(self) -> None:
        """Read the store's new events now."""
        if lines := self.watcher.refresh():
            for version in _mentioned(lines):  # it is asked for again: it may have been repaired
                self.broken.pop(version, None)
            self._renew()

    def _renew(self) -> None:
        table = read_table(self.config, self.watcher, self.broken, self.live)
        if table.id != self.next.id:
            self.next = table
            self._notify()

    def _advance(self) -> None:
        """Make the next table live once every living replica has prepared it."""
        alive = self._alive()
        ready = alive and all(report.prepared == self.next.id for report in alive.values())
        if not ready or (self.live is not None and self.live.id == self.next.id):
            return
        before, self.live = self.live, self.next
        for name, route in self.live.routes.items():
            if before and before.routes.get(name) != route:
                self.outcomes.forget(name)
        self._notify()

    def _alive(self) -> dict[str, ReplicaReport]:
        now = time.monotonic()
        for name in [name for name, report in self.replicas.items() if now - report.at > FORGET_S]:
            del self.replicas[name]
        return {name: report for name, report in self.replicas.items() if now - report.at < SILENT_S}

    def _idle_for(self) -> float:
        return time.monotonic() - max((report.at for report in self.replicas.values()), default=self._last_report)

    def _notify(self) -> None:
        """Wake every watch, and let the next ones wait for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.watcher.standing.poll_s)
            if self._idle_for() > self.idle_s:
                if not self.config.replicas.min:  # it serves without a replica: its state is that of its last event
                    await asyncio.to_thread(give_up, self.watcher.store, self.deployment.id, self.lease)
                ray.kill(ray.get_runtime_context().current_actor)
                return  # the actor lives for another moment, in which it must not take the lease again
            try:
                await self.refresh()
                self._roll_back_failing_canaries()
                self._advance()
                self.is_store_readable = True
            except Exception:  # the store may be unreachable for a moment; what was read before stays valid
                self.is_store_readable = False
                LOG.exception("the store could not be read")
            if self._alive() or not self.config.replicas.min:
                self.lease = await asyncio.to_thread(beat, self.watcher.store, self.deployment.id, self.lease)

    def _roll_back_failing_canaries(self) -> None:
        """Move the aliases of canaries that exceed their bounds back to the stable version."""
        for name, route in (self.live.routes if self.live else {}).items():
            if len(route.versions) > 1 and (why := self.outcomes.verdict(name, route)):
                LOG.error("alias %s rolled back: %s", name, why)
                self.watcher.append(alias_event(name, without_canaries(route), f"rolled back: {why}"))
                self.outcomes.forget(name)


def _mentioned(lines: list[Line]) -> set[str]:
    """Versions that new lines of the log name."""
    moves = [event_of(line.body(), line.path) for line in lines if line.action.startswith("alias.")]
    routes = [route for event in moves if event and is_readable(event) and (route := route_of(event))]
    return {version for route in routes for version in versions_of(route)} | {line.subject for line in lines}


def coordinator_name(deployment: str) -> str:
    return f"coordinator-{deployment}"


def coordinator_of(deployment: Deployment, store_uri: str, idle_s: float = IDLE_S) -> Any:
    """The deployment's coordinator, started if there is none. It needs no CPU and outlives the process that starts it."""
    actor: Any = ray.remote(Coordinator)
    return actor.options(
        name=coordinator_name(deployment.id),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=1000,
    ).remote(deployment.model_dump(mode="json"), store_uri, idle_s)


def find_coordinator(deployment: str) -> Any:
    """The coordinator if there is one, else None."""
    try:
        return ray.get_actor(coordinator_name(deployment), namespace=NAMESPACE)
    except ValueError:
        return None
