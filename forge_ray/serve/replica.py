"""One replica of a deployment: HTTP, directory and engines in one process.

It reads records and files from the store and never opens the catalogue. Two threads keep it in step with the others: one
follows the board's tables, one tells the board how it does.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from typing import Any

import ray
from ray import serve

from forge_ray.config.base import parse
from forge_ray.config.release import DeployConfig
from forge_ray.errors import EngineError
from forge_ray.records import Deployment
from forge_ray.serve.access import AsgiApp, write_access_log
from forge_ray.serve.board import board_of, read_table
from forge_ray.serve.front import front
from forge_ray.serve.haproxy import behind_haproxy
from forge_ray.serve.home import Homes
from forge_ray.serve.keys import KeyTail
from forge_ray.serve.ledger import Ledger
from forge_ray.serve.limits import LimitVerdict
from forge_ray.serve.live import Live
from forge_ray.serve.metrics import Metrics, merged
from forge_ray.serve.outcomes import AnswerOutcome
from forge_ray.serve.published import Published
from forge_ray.serve.routing import Table
from forge_ray.serve.served import Admission, Chosen, Served
from forge_ray.store.files import Store

PULSE_S = 0.5
METRICS_EVERY = 10  # pulses
MOST_OUTCOMES = 10_000  # kept while the board is away
BOARD_S = 30.0  # a board that does not answer for so long is done without
LOG = logging.getLogger(__name__)


@serve.ingress()
class Replica:
    """What Ray Serve runs."""

    def __init__(self, record: dict[str, Any], store_uri: str) -> None:
        self.name = serve.get_replica_context().replica_id.unique_id
        self.deployment = Deployment.model_validate(record)
        self.store_uri = store_uri
        config = parse(DeployConfig, self.deployment.config)
        self.homes = Homes(config, Store(store_uri))
        self.live = Live(self.homes)
        self.outcomes: list[AnswerOutcome] = []
        self.closing = threading.Event()
        self.board: Any = None
        table = self._first_table(config)
        self.broken = self.live.prepare(table)
        if self.live.prepared is None or not self.live.prepared.loaded:
            raise EngineError(
                f"nothing can be served: {self.broken}", hint="see the reasons; mend or re-import the versions"
            )
        self.live.go_live(table.id)
        self.metrics = Metrics(self.deployment.name, self.name, self.homes.health, lambda: self.live.current.loaded.values())
        self.served = Served(config, self.deployment.id, self.live, self.metrics, self._admit, self._exposition)
        self.keys = KeyTail(Store(store_uri)) if needs_keys(config) else None
        if self.keys is not None:
            self.keys.refresh()
            # not with the pulse: a board that is away must not keep a revoked key alive
            threading.Thread(target=self.keys.follow, args=(self.closing,), name="keys", daemon=True).start()
        self.ledger = Ledger(Store(store_uri), self.name)
        for loop in (self._follow, self._pulse):
            threading.Thread(target=loop, name=loop.__name__, daemon=True).start()

    def _first_table(self, config: DeployConfig) -> Table:
        """From the board, or from the store where it does not answer."""
        try:
            return Table.model_validate(ray.get(self._board().start.remote(), timeout=BOARD_S))
        except (ray.exceptions.RayError, TimeoutError):
            LOG.warning("no board: beginning by the store alone")
            published = Published(Store(self.store_uri))
            published.refresh()
            return read_table(config, published, {})

    def __serve_build_asgi_app__(self) -> AsgiApp:
        write_access_log()
        keys = None if self.keys is None else lambda: self.keys.keys if self.keys else {}
        return front(self.served, keys, self._take, self._settle, self.name, self.homes.health, self.ledger)

    async def _take(self, *arguments: Any) -> LimitVerdict:
        verdict: LimitVerdict = await self._board().take.remote(*arguments)
        return verdict

    async def _settle(self, *arguments: Any) -> None:
        await self._board().settle.remote(*arguments)

    async def _exposition(self) -> str:
        """The metrics of all replicas: a scrape reaches one of them, and nobody can choose which."""
        try:
            others: dict[str, str] = await self._board().metrics.remote()
        except ray.exceptions.RayError:
            others = {}
        return merged(others | {self.name: self.metrics.text()})

    def _board(self) -> Any:
        """Looked up once: it is asked for every request of a key that has limits. `_follow` notices when it is gone."""
        if self.board is None:
            self.board = board_of(self.deployment, self.store_uri)
        return self.board

    async def _admit(self, caller: Any, chosen: Chosen, prompt_tokens: int, most_new_tokens: int) -> Admission:
        return _Watched(chosen, self.outcomes, time.monotonic())

    def _follow(self) -> None:
        """Prepare what the board wants prepared, answer by what it says is live."""
        while not self.closing.is_set():
            try:
                prepared = self.live.prepared.table.id if self.live.prepared else ""
                told = ray.get(
                    self._board().watch.remote(self.name, prepared, self.live.current.table.id, self.broken),
                    timeout=BOARD_S,
                )
                if told["live"]:
                    self.live.go_live(told["live"])
                if told["prepare"] is not None:
                    self.broken = self.live.prepare(Table.model_validate(told["prepare"]))
                self.live.tidy()
            except (ray.exceptions.RayError, TimeoutError):
                self.board = None
                self.closing.wait(1)
            except Exception:  # a table that cannot be prepared must not stop the next one from coming
                LOG.exception("following failed")
                self.closing.wait(1)

    def _pulse(self) -> None:
        """Tell the board that this replica lives, how loaded it is, and how its answers went."""
        for number in itertools.count():
            if self.closing.wait(PULSE_S):
                return
            sent = self.outcomes[:]
            text = self.metrics.text() if number % METRICS_EVERY == 0 else None  # costs milliseconds
            try:
                ray.get(self._board().report.remote(self.name, self._load(), self.homes.held(), sent, text), timeout=BOARD_S)
                del self.outcomes[: len(sent)]
            except (ray.exceptions.RayError, TimeoutError):
                del self.outcomes[:-MOST_OUTCOMES]
            except Exception:  # a replica without a pulse would be taken for dead
                LOG.exception("the pulse failed")

    def _load(self) -> dict[str, int]:
        return {"pid": os.getpid(), **self.homes.load()}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `scaling.tokens_policy`."""
        return {"tokens": float(self.homes.load()["tokens"])}

    def check_health(self) -> None:
        """Serve restarts the replica when this raises."""
        if failures := self.homes.failures():
            raise EngineError("; ".join(failures), hint="the replica is restarted; its log has the cause")

    def __del__(self) -> None:
        if hasattr(self, "closing"):
            self.closing.set()
        if hasattr(self, "homes"):  # not where loading failed
            self.homes.close()
        if hasattr(self, "ledger"):
            self.ledger.close()


class _Watched:
    """A request whose outcome is noted for the alias that led to it."""

    def __init__(self, chosen: Chosen, outcomes: list[AnswerOutcome], started: float) -> None:
        self.chosen, self.outcomes, self.started = chosen, outcomes, started

    def close(self, prompt_tokens: int, completion_tokens: int, status: int) -> None:
        token_s = (time.monotonic() - self.started) / completion_tokens if completion_tokens else 0.0
        if self.chosen.route:
            self.outcomes.append(AnswerOutcome(self.chosen.name, self.chosen.loaded.version, status, token_s))


def needs_keys(config: DeployConfig) -> bool:
    """HAProxy listens on all interfaces, whatever host is asked for."""
    return config.needs_keys or (config.auth == "auto" and behind_haproxy())
