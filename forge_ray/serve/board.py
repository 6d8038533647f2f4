"""What the replicas of one deployment share: one small actor.

It reads the store's facts, makes tables of them, and moves all replicas from one to the next: each prepares the new table,
and when all that live have done so, it goes live everywhere. It also knows what only a view over all replicas can tell:
whether a canary crosses its bounds, how much a key used. It owns nothing else: when it dies, replicas go on by their table,
Ray starts it again, and the store tells it the rest. Its name is the deployment's id, so a new deployment has its own.
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
from forge_ray.records import Deployment, Event
from forge_ray.serve.keys import ApiKey
from forge_ray.serve.limits import Counters, LimitVerdict
from forge_ray.serve.outcomes import AnswerOutcome, Outcomes, without_canaries
from forge_ray.serve.published import Published
from forge_ray.serve.routing import RoutingFacts, Table, table_of, versions_of
from forge_ray.store.aliases import alias_event, route_of
from forge_ray.store.files import Store

NAMESPACE = "forge_ray"
WATCH_S = 5.0  # a watch that sees nothing new returns after this
SILENT_S = 5.0  # a replica that has not reported for so long is not waited for
GONE_S = 60.0
ALONE_S = 600.0  # a board that no replica asks ends; the next replica starts another
LOG = logging.getLogger(__name__)


def read_table(config: DeployConfig, published: Published, broken: dict[str, str], before: Table | None = None) -> Table:
    """The table of what the store says now."""
    facts = RoutingFacts(published.routes(), frozenset(published.archived()), published.version)
    return table_of(config, facts, broken, before)


@dataclass
class Seen:
    """What a replica last said of itself."""

    at: float
    prepared: str = ""
    live: str = ""
    load: dict[str, int] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)
    metrics: str = ""


class Board:
    """The actor; made by `board_of`."""

    def __init__(self, record: dict[str, Any], store_uri: str, alone_s: float = ALONE_S) -> None:
        self.alone_s = alone_s
        self.deployment = Deployment.model_validate(record)
        self.config = parse(DeployConfig, self.deployment.config)
        self.published = Published(Store(store_uri))
        self.published.refresh()
        self.broken: dict[str, str] = {}
        self.outcomes = Outcomes()
        self.counters = Counters()
        self.replicas: dict[str, Seen] = {}
        self.next = read_table(self.config, self.published, self.broken)
        self.live: Table | None = None
        self._changed = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._last_seen = time.monotonic()

    async def start(self) -> dict[str, Any]:
        """The table by which a new replica begins."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        return (self.live or self.next).model_dump(mode="json")

    async def watch(self, replica: str, prepared: str, live: str, broken: dict[str, str]) -> dict[str, Any]:
        """What a replica should do: `prepare` this table, and answer by the table `live`. Returns at once if that differs
        from what it said, else when something changes."""
        await self.start()
        seen = self.replicas.setdefault(replica, Seen(time.monotonic()))
        seen.at, seen.prepared, seen.live = time.monotonic(), prepared, live
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
        self, replica: str, load: dict[str, int], held: list[str], outcomes: list[AnswerOutcome], metrics: str | None
    ) -> None:
        """A replica's pulse: its load, the versions in its memory, what it answered since the last one; `metrics` comes with
        every tenth or so."""
        seen = self.replicas.setdefault(replica, Seen(time.monotonic()))
        seen.at, seen.load, seen.held, self._last_seen = time.monotonic(), load, held, time.monotonic()
        if metrics is not None:
            seen.metrics = metrics
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
        """The exposition of each replica, as of its last pulse."""
        return {name: seen.metrics for name, seen in self._alive().items()}

    async def state(self) -> dict[str, Any]:
        """For people: who serves what."""
        now = time.monotonic()
        table = self.live or self.next
        return {
            "deployment": self.deployment.id,
            "table": table.model_dump(mode="json"),
            "settled": self.live is not None and self.live.id == self.next.id,
            "replicas": {
                name: {"live": seen.live == table.id, "seen_s": round(now - seen.at, 1), "held": seen.held, **seen.load}
                for name, seen in self._alive().items()
            },
        }

    async def refresh(self) -> None:
        """Look at the store now."""
        if new := self.published.refresh():
            for version in _mentioned(new):  # somebody wants it again: it may have been mended
                self.broken.pop(version, None)
            self._renew()

    def _renew(self) -> None:
        table = read_table(self.config, self.published, self.broken, self.live)
        if table.id != self.next.id:
            self.next = table
            self._tell()

    def _advance(self) -> None:
        """Go live once every living replica is prepared."""
        alive = self._alive()
        ready = alive and all(seen.prepared == self.next.id for seen in alive.values())
        if not ready or (self.live is not None and self.live.id == self.next.id):
            return
        before, self.live = self.live, self.next
        for name, route in self.live.routes.items():
            if before and before.routes.get(name) != route:
                self.outcomes.forget(name)
        self._tell()

    def _alive(self) -> dict[str, Seen]:
        now = time.monotonic()
        for name in [name for name, seen in self.replicas.items() if now - seen.at > GONE_S]:
            del self.replicas[name]
        return {name: seen for name, seen in self.replicas.items() if now - seen.at < SILENT_S}

    def _alone_for(self) -> float:
        return time.monotonic() - max((seen.at for seen in self.replicas.values()), default=self._last_seen)

    def _tell(self) -> None:
        """Wake every watch, and let the next ones wait for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self.published.tail.poll_s)
            if self._alone_for() > self.alone_s:
                ray.kill(ray.get_runtime_context().current_actor)
            try:
                await self.refresh()
                self._guard()
                self._advance()
            except Exception:  # the store may be away for a moment; the board goes on by what it knows
                LOG.exception("could not look at the store")

    def _guard(self) -> None:
        """Take back canaries that cross their bounds."""
        for name, route in (self.live.routes if self.live else {}).items():
            if len(route.versions) > 1 and (why := self.outcomes.verdict(name, route)):
                LOG.error("alias %s rolled back: %s", name, why)
                self.published.append(alias_event(name, without_canaries(route), f"rolled back: {why}"))
                self.outcomes.forget(name)


def _mentioned(events: list[Event]) -> set[str]:
    routes = [route for event in events if event.kind == "alias" and (route := route_of(event))]
    return {version for route in routes for version in versions_of(route)} | {event.subject for event in events}


def board_name(deployment: str) -> str:
    return f"board-{deployment}"


def board_of(deployment: Deployment, store_uri: str, alone_s: float = ALONE_S) -> Any:
    """The deployment's board; started if there is none. It needs no CPU and outlives the process that asked first."""
    actor: Any = ray.remote(Board)
    return actor.options(
        name=board_name(deployment.id),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=1000,
    ).remote(deployment.model_dump(mode="json"), store_uri, alone_s)


def find_board(deployment: str) -> Any:
    """The board if there is one, else None."""
    try:
        return ray.get_actor(board_name(deployment), namespace=NAMESPACE)
    except ValueError:
        return None
