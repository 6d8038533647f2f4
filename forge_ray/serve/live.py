"""The directory of one replica: it follows tables, and swaps them whole (no ray).

A new table is prepared beside the one that answers: every version fetched, verified, loaded and asked for a token. Only
then, and when told, does it answer: the swap is one assignment, so no request sees a half of each.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from forge_ray.config.release import AliasRoute
from forge_ray.errors import EngineError
from forge_ray.inference.engine import Engine, GenerationRequest
from forge_ray.serve.home import Homes
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.routing import RoutingRequest, ServedVersion, Table, decide, sticky
from forge_ray.serve.served import Chosen, RoutingInputs

SETTLED_S = 30.0  # requests that chose from an older table have reached their engine by then
MAX_LABEL_TOKENS = 8
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A table with every version of it that could be loaded."""

    table: Table
    loaded: dict[str, Loaded]


class Live:
    """`Directory` of a replica."""

    def __init__(self, homes: Homes) -> None:
        self.homes = homes
        self.current = Snapshot(Table(versions={}, routes={}), {})
        self.prepared: Snapshot | None = None
        self._swapped = time.monotonic()

    def prepare(self, table: Table) -> dict[str, str]:
        """Load what the table names; returns the versions that cannot be served, with the reason."""
        loaded, broken = {}, {}
        for version in table.versions.values():
            if version.id in table.gone or version.id in table.broken:
                continue
            try:
                loaded[version.id] = self.homes.ready(version)
            except Exception as error:  # whatever is wrong with one version, the others are served
                LOG.exception("%s cannot be served", version.id)
                broken[version.id] = str(error)
        self.prepared = Snapshot(table, loaded)
        return broken

    def go_live(self, table_id: str) -> bool:
        """Answer by the prepared table from now on."""
        if self.prepared is None or self.prepared.table.id != table_id:
            return False
        if self.current.table.id != table_id:
            self.current = self.prepared
            self._swapped = time.monotonic()
        return True

    def tidy(self) -> None:
        """Some time after a swap: let go of what is not needed."""
        if time.monotonic() - self._swapped > SETTLED_S:
            tables = [snapshot.table for snapshot in (self.current, self.prepared) if snapshot]
            needed = {
                name: version for table in tables for name, version in table.versions.items() if name not in table.gone
            }
            self.homes.tidy(needed)

    def stable(self, name: str) -> Loaded:
        now = self.current
        route = now.table.routes.get(name)
        if route is None:
            return self._version(now, name, name)
        return self._of_route(now, name, route, route.stable)[0]

    async def choose(self, name: str, facts: RoutingInputs) -> Chosen:
        now = self.current
        route = now.table.routes.get(name)
        if route is None:
            chosen = Chosen(name, self._version(now, name, name))
        else:
            request = RoutingRequest(facts.headers, facts.user, len(facts.prompt_ids), await self._labels(now, route, facts))
            draw = sticky(name, facts.user) if facts.user else random.random()
            target, why = decide(route, request, draw)
            wanted = now.table.base_of(route) if target == "base" else target
            loaded, instead = self._of_route(now, name, route, wanted)
            shadows = tuple(now.loaded[version] for version in route.shadow if version in now.loaded)
            chosen = Chosen(name, loaded, instead or why, shadows)
        for loaded in (chosen.loaded, *chosen.shadows):
            await self._bring(now, loaded)
        return chosen

    async def _bring(self, now: Snapshot, loaded: Loaded) -> None:
        version = now.table.versions[loaded.version]
        if not self.homes.touch(version, loaded):
            try:
                await asyncio.get_running_loop().run_in_executor(None, self.homes.bring, version, loaded)
            except EngineError as error:
                raise ApiError(503, error.message, param="model", code="adapter_unavailable") from None

    def _of_route(self, now: Snapshot, name: str, route: AliasRoute, wanted: str) -> tuple[Loaded, str]:
        """The version that the route means, or who stands in for it, and as what."""
        if wanted in now.loaded:
            return now.loaded[wanted], ""
        if wanted != route.stable and route.stable in now.loaded:
            return now.loaded[route.stable], "stable"
        base = now.table.base_of(route)
        if route.fallback == "base" and base in now.loaded:
            return now.loaded[base], "fallback"
        return self._version(now, name, route.stable), ""

    def _version(self, now: Snapshot, name: str, version: str) -> Loaded:
        """A version by its id; otherwise why it cannot answer."""
        if version in now.loaded:
            return now.loaded[version]
        if version in now.table.gone:
            raise ApiError(410, f"model {name!r} was archived", param="model", code="model_archived")
        if version in now.table.versions:
            why = now.table.broken.get(version, "it could not be loaded by this replica")
            raise ApiError(503, f"model {name!r} ({version}) cannot be served: {why}", param="model", code="model_broken")
        raise ApiError(404, f"model {name!r} is not served here", param="model", code="model_not_found")

    async def _labels(self, now: Snapshot, route: AliasRoute, facts: RoutingInputs) -> dict[str, str]:
        """What each classifier of the route says of the prompt: one short greedy answer."""
        labels = {}
        for version in {rule.classifier for rule in route.rules if rule.classifier} & now.loaded.keys():
            loaded = now.loaded[version]
            await self._bring(now, loaded)
            labels[version] = await _answer(loaded.engine, loaded, facts.prompt_ids)
        return labels

    def cards(self) -> list[dict[str, Any]]:
        table = self.current.table
        cards = [_card(name, table.versions[route.stable], table, route) for name, route in self._routes(table)]
        return cards + [
            _card(version.id, version, table) for version in table.versions.values() if version.id not in table.gone
        ]

    @staticmethod
    def _routes(table: Table) -> list[tuple[str, AliasRoute]]:
        return [(name, route) for name, route in table.routes.items() if route.stable in table.versions]


async def _answer(engine: Engine, loaded: Loaded, prompt_ids: tuple[int, ...]) -> str:
    request = GenerationRequest(prompt_ids, MAX_LABEL_TOKENS, stop_token_ids=loaded.stop_token_ids, adapter=loaded.adapter)
    ids = [token.token_id async for token in engine.stream(request) if token.token_id is not None]
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _card(name: str, version: ServedVersion, table: Table, route: AliasRoute | None = None) -> dict[str, Any]:
    """OpenAI's model object, with where the answers come from."""
    card = {
        "id": name,
        "object": "model",
        "created": int(datetime.fromisoformat(version.created_at).timestamp()),
        "owned_by": "forge_ray",
        "root": version.base,
        "parent": None if version.weights == "full" else version.base,
        "model_version": version.id,
        "model_digest": version.digest,
        "base_model": version.base,
        "dataset": version.dataset or None,
        "run": version.run or None,
        "licence": version.licence or None,
    }
    if route and (len(route.versions) > 1 or route.rules or route.shadow or route.fallback):
        card["route"] = route.model_dump(mode="json", exclude_defaults=True)
    return card
