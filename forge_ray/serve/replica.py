"""One replica of a deployment: HTTP and directory in one process, its engines in one each.

It reads records and files from the store and never opens the catalogue. Two threads keep it in step with the other replicas:
one follows the coordinator's tables, one sends the coordinator heartbeats.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import threading
import time
from typing import Any

import ray
from ray import serve
from starlette.types import ASGIApp

from forge_ray.config.base import parse
from forge_ray.config.release import DeployConfig
from forge_ray.errors import EngineError
from forge_ray.machine.ray_internals import replica_port_on
from forge_ray.records import Deployment
from forge_ray.serve.access_log import write_access_log
from forge_ray.serve.canary import AnswerOutcome
from forge_ray.serve.context import Admission, Caller, Chosen, ServingContext
from forge_ray.serve.coordinator import coordinator_of, read_table
from forge_ray.serve.directory import ReplicaDirectory
from forge_ray.serve.engines import EnginePool
from forge_ray.serve.haproxy import behind_haproxy
from forge_ray.serve.http import replica_app
from forge_ray.serve.keeper import Keeper
from forge_ray.serve.keys import KeyTail
from forge_ray.serve.ledger import Ledger
from forge_ray.serve.limits import LimitVerdict
from forge_ray.serve.metrics import Metrics, merged
from forge_ray.serve.routing import Table
from forge_ray.serve.watcher import StoreWatcher
from forge_ray.store.files import Store
from forge_ray.store.home import settle

HEARTBEAT_S = 0.5
METRICS_EVERY = 10  # heartbeats
MAX_OUTCOMES = 10_000  # kept while the coordinator is unreachable
COORDINATOR_TIMEOUT_S = 30.0  # a coordinator that does not answer within this is treated as absent
LOG = logging.getLogger(__name__)


@serve.ingress()
class Replica:
    """The class that Ray Serve runs."""

    def __init__(self, record: dict[str, Any], store_uri: str) -> None:
        settle()
        replica_port_on(ray.util.get_node_ip_address())
        self.name = serve.get_replica_context().replica_id.unique_id
        self.deployment = Deployment.model_validate(record)
        self.store_uri = store_uri
        config = parse(DeployConfig, self.deployment.config)
        self.engines = EnginePool(config, Store(store_uri))
        self.engines.begin()
        self.directory = ReplicaDirectory(self.engines)
        self.outcomes: list[AnswerOutcome] = []
        self.closing = threading.Event()
        self.coordinator: Any = None
        table = self._first_table(config)
        self.broken = self.directory.prepare(table)
        self.engines.end_begun()
        if self.directory.prepared is None or not self.directory.prepared.loaded:
            raise EngineError(f"no version can be served: {self.broken}", hint="fix or re-import the versions listed above")
        self.directory.go_live(table.id)
        self.metrics = Metrics(
            self.deployment.name, self.name, self.engines.health, lambda: self.directory.current.loaded.values()
        )
        keeps = config.keep_answers.days > 0
        self.keeper = (
            Keeper(Store(store_uri), config.keep_answers, self.deployment.id, self.name, self.metrics) if keeps else None
        )
        self.context = ServingContext(
            config,
            self.deployment.id,
            self.directory,
            self.metrics,
            self._admit,
            self._exposition,
            keeper=self.keeper,
        )
        held = self.deployment.genesis, self.deployment.log_head
        self.keys = KeyTail(Store(store_uri), *held) if needs_keys(config) else None
        if self.keys is not None:
            self.keys.refresh()
            # not with the heartbeat: a revoked key must end even while the coordinator is unreachable
            threading.Thread(target=self.keys.follow, args=(self.closing,), name="keys", daemon=True).start()
        self.ledger = Ledger(Store(store_uri), self.name)
        for loop in (self._follow, self._send_heartbeats):
            threading.Thread(target=loop, name=loop.__name__, daemon=True).start()
        # What loading made stays: a pass of the collector over all of it would stop every thread for 0.1 s and more
        gc.collect()
        gc.freeze()

    def _first_table(self, config: DeployConfig) -> Table:
        """From the coordinator, or from the store if it does not answer."""
        try:
            return Table.model_validate(ray.get(self._coordinator().start.remote(), timeout=COORDINATOR_TIMEOUT_S))
        except (ray.exceptions.RayError, TimeoutError):
            LOG.warning("the coordinator does not answer: starting with the table of the store")
            watcher = StoreWatcher(Store(self.store_uri), self.deployment.genesis, self.deployment.log_head)
            watcher.refresh()
            return read_table(config, watcher, {})

    def __serve_build_asgi_app__(self) -> ASGIApp:
        write_access_log()
        keys = None if self.keys is None else lambda: self.keys.keys if self.keys else {}
        health, is_public = self.engines.health, behind_haproxy()
        return replica_app(self.context, keys, self._take, self._settle, self.name, health, self.ledger, is_public)

    async def _take(self, *arguments: Any) -> LimitVerdict:
        verdict: LimitVerdict = await self._coordinator().take.remote(*arguments)
        return verdict

    async def _settle(self, *arguments: Any) -> None:
        await self._coordinator().settle.remote(*arguments)

    async def _exposition(self) -> str:
        """The metrics of all replicas: a scrape reaches one of them and cannot choose which."""
        try:
            others: dict[str, str] = await self._coordinator().metrics.remote()
        except ray.exceptions.RayError:
            others = {}
        return merged(others | {self.name: self.metrics.text()})

    def _coordinator(self) -> Any:
        """Looked up once, for every request of a key with limits calls it. `_follow` notices when it has died."""
        if self.coordinator is None:
            self.coordinator = coordinator_of(self.deployment, self.store_uri)
        return self.coordinator

    async def _admit(self, caller: Caller, chosen: Chosen, prompt_tokens: int, max_new_tokens: int) -> Admission:
        return _OutcomeRecorder(chosen, self.outcomes, time.monotonic())

    def _follow(self) -> None:
        """Prepare the table that the coordinator announces; answer by the one that it declares live."""
        while not self.closing.is_set():
            try:
                prepared = self.directory.prepared.table.id if self.directory.prepared else ""
                instructions = ray.get(
                    self._coordinator().watch.remote(self.name, prepared, self.directory.current.table.id, self.broken),
                    timeout=COORDINATOR_TIMEOUT_S,
                )
                if instructions["live"]:
                    self.directory.go_live(instructions["live"])
                if instructions["prepare"] is not None:
                    self.broken = self.directory.prepare(Table.model_validate(instructions["prepare"]))
                self.directory.unload_unused()
            except (ray.exceptions.RayError, TimeoutError):
                self.coordinator = None
                self.closing.wait(1)
            except Exception:  # a table that cannot be prepared must not prevent the next one
                LOG.exception("the coordinator's table could not be followed")
                self.closing.wait(1)

    def _send_heartbeats(self) -> None:
        """Report to the coordinator that this replica is alive, its load and the outcomes of its answers."""
        for number in itertools.count():
            if self.closing.wait(HEARTBEAT_S):
                return
            sent = self.outcomes[:]
            text = self.metrics.text() if number % METRICS_EVERY == 0 else None  # costs milliseconds
            try:
                in_memory = self.engines.versions_in_memory()
                report = self._coordinator().report.remote(self.name, self._load(), in_memory, sent, text)
                ray.get(report, timeout=COORDINATOR_TIMEOUT_S)
                del self.outcomes[: len(sent)]
            except (ray.exceptions.RayError, TimeoutError):
                del self.outcomes[:-MAX_OUTCOMES]
            except Exception:  # a replica without heartbeats is taken for dead
                LOG.exception("a heartbeat failed")

    def _load(self) -> dict[str, int]:
        return {"pid": os.getpid(), **self.engines.workload()}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `scaling.TokensPolicy`."""
        return {"tokens": float(self.engines.workload()["tokens"])}

    def check_health(self) -> None:
        """Serve restarts the replica when this raises."""
        if failures := self.engines.failures():
            raise EngineError("; ".join(failures), hint="the replica is restarted; its log has the cause")

    def __del__(self) -> None:
        if hasattr(self, "closing"):
            self.closing.set()
        if hasattr(self, "engines"):  # absent where loading failed
            self.engines.close()
        if hasattr(self, "ledger"):
            self.ledger.close()
        if hasattr(self, "keeper") and self.keeper is not None:
            self.keeper.close()


class _OutcomeRecorder:
    """An admission that records the request's outcome for the alias that it was routed by."""

    def __init__(self, chosen: Chosen, outcomes: list[AnswerOutcome], started: float) -> None:
        self.chosen, self.outcomes, self.started = chosen, outcomes, started

    def close(self, prompt_tokens: int, completion_tokens: int, status: int) -> None:
        tokens = completion_tokens if self.chosen.loaded.head is None else prompt_tokens  # a classifier reads alone
        token_s = (time.monotonic() - self.started) / tokens if tokens else 0.0
        if self.chosen.route:
            self.outcomes.append(AnswerOutcome(self.chosen.name, self.chosen.loaded.version, status, token_s))


def needs_keys(config: DeployConfig) -> bool:
    """Whether the endpoint requires API keys. HAProxy listens on all interfaces, whatever `host` says."""
    return config.needs_keys or (config.auth == "auto" and behind_haproxy())
