"""The directory of one replica: aliases → loaded versions, by tables that are replaced as a whole (no ray).

A new table is prepared while the current one answers: every version is fetched, verified, loaded and asked for a token. It
goes live when the coordinator says so: the swap is one assignment, so no request sees a mixture of both.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from forge_ray.config.release import AliasRoute
from forge_ray.errors import EngineError
from forge_ray.inference.engine import Engine, GenerationRequest
from forge_ray.serve.class_results import card_of, holding, logits_of_group, shares_of
from forge_ray.serve.context import Caller, Chosen
from forge_ray.serve.engines import EnginePool
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.routing import RoutingInputs, ServedVersion, Table, decide, sticky

SETTLED_S = 30.0  # after this, requests that chose from an older table have reached their engine
MAX_LABEL_TOKENS = 8
ROUTES = "(routes)"  # whose turn it is when prompts are labelled for a route
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A table with those of its versions that could be loaded."""

    table: Table
    loaded: dict[str, Loaded]


class ReplicaDirectory:
    """The `Directory` of a replica."""

    def __init__(self, engines: EnginePool) -> None:
        self.engines = engines
        self.current = Snapshot(Table(versions={}, routes={}), {})
        self.prepared: Snapshot | None = None
        self._swapped = time.monotonic()

    def prepare(self, table: Table) -> dict[str, str]:
        """Load what the table names; return the versions that cannot be served, with the reason."""
        loaded, broken = {}, {}
        for version in table.versions.values():
            if version.id in table.archived or version.id in table.broken:
                continue
            try:
                loaded[version.id] = self.engines.load_version(version)
            except Exception as error:  # whatever is wrong with one version, the others are served
                LOG.exception("%s cannot be served", version.id)
                broken[version.id] = str(error)
        self.prepared = Snapshot(table, loaded)
        return broken

    def go_live(self, table_id: str) -> bool:
        """Answer by the prepared table from now on; False if another one is prepared."""
        if self.prepared is None or self.prepared.table.id != table_id:
            return False
        if self.current.table.id != table_id:
            self.current = self.prepared
            self._swapped = time.monotonic()
        return True

    def unload_unused(self) -> None:
        """Some time after a swap, unload what neither the current nor the prepared table needs."""
        if time.monotonic() - self._swapped > SETTLED_S:
            tables = [snapshot.table for snapshot in (self.current, self.prepared) if snapshot]
            needed = {
                name: version for table in tables for name, version in table.versions.items() if name not in table.archived
            }
            self.engines.unload_unused(needed)

    def stable(self, name: str, caller: Caller) -> Loaded:
        snapshot = self.current
        route = snapshot.table.routes.get(name)
        if route is None:
            return _by_id(snapshot, name, name)
        return _by_route(snapshot, name, route, route.stable)[0]

    async def choose(self, name: str, caller: Caller, inputs: RoutingInputs) -> Chosen:
        snapshot = self.current
        route = snapshot.table.routes.get(name)
        if route is None:
            chosen = Chosen(name, _by_id(snapshot, name, name))
        else:
            inputs = replace(inputs, labels=await self._labels(snapshot, route, inputs))
            draw = sticky(name, inputs.user) if inputs.user else random.random()
            target, why = decide(route, inputs, draw)
            version = snapshot.table.base_of(route) if target == "base" else target
            loaded, substitute = _by_route(snapshot, name, route, version)
            shadows = tuple(snapshot.loaded[version] for version in route.shadow if version in snapshot.loaded)
            chosen = Chosen(name, loaded, substitute or why, shadows)
        for loaded in (chosen.loaded, *chosen.shadows):
            await self._ensure_adapter(snapshot, loaded)
        return chosen

    async def _ensure_adapter(self, snapshot: Snapshot, loaded: Loaded) -> None:
        version = snapshot.table.versions[loaded.version]
        if not self.engines.touch(version, loaded):
            try:
                await asyncio.get_running_loop().run_in_executor(None, self.engines.ensure_adapter, version, loaded)
            except EngineError as error:
                raise ApiError(503, error.message, param="model", code="adapter_unavailable") from None

    async def _labels(self, snapshot: Snapshot, route: AliasRoute, inputs: RoutingInputs) -> dict[str, tuple[str, ...]]:
        """The labels that each classifier of the route gives the prompt: those of its head that hold, or one short greedy
        answer; none where its template or its context has no place for the prompt."""
        labels: dict[str, tuple[str, ...]] = {}
        for version in {rule.classifier for rule in route.rules if rule.classifier} & snapshot.loaded.keys():
            loaded = snapshot.loaded[version]
            await self._ensure_adapter(snapshot, loaded)
            try:
                prompt_ids = await inputs.prompt_by(loaded) if inputs.prompt_by else inputs.prompt_ids
            except ApiError:
                continue
            num_new = 0 if loaded.head else MAX_LABEL_TOKENS
            if 1 <= len(prompt_ids) <= loaded.engine.max_request_tokens - num_new:
                labels[version] = await _labels_of(loaded, prompt_ids)
        return labels

    def cards(self, caller: Caller) -> list[dict[str, Any]]:
        snapshot, sees_routes = self.current, caller.key is not None and "admin" in caller.key.scopes
        table = snapshot.table
        cards = [
            _card(name, table.versions[route.stable], snapshot.loaded, route if sees_routes else None)
            for name, route in self._routes(table)
            if _can_answer(snapshot, route)
        ]
        hidden = {*table.archived, *(() if sees_routes else _helpers(table))}
        listed = [version for version in table.versions.values() if version.id not in hidden]
        return cards + [_card(version.id, version, snapshot.loaded) for version in listed]

    @staticmethod
    def _routes(table: Table) -> list[tuple[str, AliasRoute]]:
        return [(name, route) for name, route in table.routes.items() if route.stable in table.versions]


def _can_answer(snapshot: Snapshot, route: AliasRoute) -> bool:
    """Whether anything answers for an alias: its stable version is not archived, or the fallback is there."""
    has_fallback = route.fallback == "base" and snapshot.table.base_of(route) in snapshot.loaded
    return route.stable not in snapshot.table.archived or has_fallback


def _helpers(table: Table) -> set[str]:
    """Versions that only work behind aliases, as shadow or classifier: no answer that a client sees is theirs."""
    routes = table.routes.values()
    helpers = {name for route in routes for name in (*route.shadow, *(rule.classifier for rule in route.rules))}
    answering = {name for route in routes for name in (*route.versions, *(rule.to for rule in route.rules))}
    return helpers - answering - {version.base for version in table.versions.values()}


def _by_route(snapshot: Snapshot, name: str, route: AliasRoute, version: str) -> tuple[Loaded, str]:
    """`version`, which the route chose, and ""; if it is not loaded, what replaces it: `stable` or `fallback`."""
    if version in snapshot.loaded:
        return snapshot.loaded[version], ""
    if version != route.stable and route.stable in snapshot.loaded:
        return snapshot.loaded[route.stable], "stable"
    base = snapshot.table.base_of(route)
    if route.fallback == "base" and base in snapshot.loaded:
        return snapshot.loaded[base], "fallback"
    return _by_id(snapshot, name, route.stable), ""


def _by_id(snapshot: Snapshot, name: str, version: str) -> Loaded:
    """The version with this id; `ApiError` with the reason if it cannot answer."""
    if version in snapshot.loaded:
        return snapshot.loaded[version]
    if version in snapshot.table.archived:
        raise ApiError(410, f"model {name!r} was archived", param="model", code="model_archived")
    if version in snapshot.table.versions:
        why = snapshot.table.broken.get(version, "it could not be loaded by this replica")
        raise ApiError(503, f"model {name!r} ({version}) cannot be served: {why}", param="model", code="model_broken")
    raise ApiError(404, f"model {name!r} is not served here", param="model", code="model_not_found")


async def _labels_of(loaded: Loaded, prompt_ids: tuple[int, ...]) -> tuple[str, ...]:
    if loaded.head is None:
        return (await _answer(loaded.generator, loaded, prompt_ids),)
    if prompt_ids[-1] == loaded.tokenizer.pad_id:  # a head is not read there
        return ()
    logits = await logits_of_group(loaded, [prompt_ids], ROUTES)
    return holding(loaded.head, shares_of(loaded.head, logits[0]))


async def _answer(engine: Engine, loaded: Loaded, prompt_ids: tuple[int, ...]) -> str:
    request = GenerationRequest(prompt_ids, MAX_LABEL_TOKENS, stop_token_ids=loaded.stop_token_ids, adapter=loaded.adapter)
    ids = [token.token_id async for token in engine.stream(request) if token.token_id is not None]
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _card(
    name: str, version: ServedVersion, loaded: Mapping[str, Loaded], route: AliasRoute | None = None
) -> dict[str, Any]:
    """OpenAI's model object, with what the answers come from: version, base, dataset, run; what it can do (Mistral's
    `capabilities`), of a classifier also its labels; and the route, for who may see it."""
    head = loaded[version.id].head if version.id in loaded else None
    is_text = not version.classifier
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
        "capabilities": {
            "completion_chat": is_text,
            "classification": version.classifier,
            "moderation": bool(head and head.flags),
        },
    }
    if head is not None:
        card["classifier"] = card_of(head)
    if route and (len(route.versions) > 1 or route.rules or route.shadow or route.fallback):
        card["route"] = route.model_dump(mode="json", exclude_defaults=True)
    return card
