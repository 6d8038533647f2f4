"""The lease of an endpoint, as its coordinator keeps it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fabricated import version

from forge_ray.config.base import parse, resolved
from forge_ray.config.release import DeployConfig
from forge_ray.records import Deployment
from forge_ray.serve import coordinator, endpoint_lease
from forge_ray.serve.coordinator import Coordinator
from forge_ray.serve.endpoint_lease import EndpointLease, beat, give_up
from forge_ray.store import lease, paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.endpoint_state import BEAT_S
from forge_ray.store.files import Store
from forge_ray.store.lease import new_lease

pytestmark = pytest.mark.unit
DEPLOYMENT = "dep_0000000000000000"
PATH = paths.endpoint(DEPLOYMENT)


@pytest.fixture
def place(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the monotonic clock."""
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def move(seconds: float) -> None:
        clock[0] += seconds

    return move


def writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are written to a store from now on."""
    written: list[str] = []
    write = Store.write

    def counted(store: Store, relative: str, data: bytes) -> None:
        written.append(relative)
        write(store, relative, data)

    monkeypatch.setattr(Store, "write", counted)
    return written


def test_a_beat_is_one_write_and_comes_when_it_is_due(
    place: Store, later: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = writes(monkeypatch)
    held = beat(place, DEPLOYMENT, EndpointLease(new_lease()))
    assert (held.state, written) == ("held", [PATH])
    later(BEAT_S - 1)
    held = beat(place, DEPLOYMENT, held)
    assert written == [PATH]
    later(1)
    os.utime(place.path(PATH), (1, 1))
    assert beat(place, DEPLOYMENT, held).state == "held"
    assert written == [PATH, PATH]
    assert lease.age_s(place, PATH) < 60


def test_a_coordinator_that_starts_takes_over_and_the_paused_one_stops(place: Store, later: Callable[[float], None]) -> None:
    paused = beat(place, DEPLOYMENT, EndpointLease(new_lease()))
    other = beat(place, DEPLOYMENT, EndpointLease(new_lease()))
    assert other.state == "held"
    for _ in range(3):
        later(BEAT_S)
        paused = beat(place, DEPLOYMENT, paused)
        assert paused.state == "overtaken"
        assert lease.read(place, PATH) == other.own
    give_up(place, DEPLOYMENT, paused)
    assert lease.read(place, PATH) == other.own
    give_up(place, DEPLOYMENT, other)
    assert not place.exists(PATH)


def test_a_lease_that_was_lost_or_spoilt_is_written_again(place: Store, later: Callable[[float], None]) -> None:
    held = beat(place, DEPLOYMENT, EndpointLease(new_lease()))
    for spoil in (lambda: place.delete(PATH), lambda: place.write(PATH, b'{"tok')):
        spoil()
        later(BEAT_S)
        held = beat(place, DEPLOYMENT, held)
        assert lease.read(place, PATH) == held.own


def test_a_store_that_may_not_be_written_has_no_lease_and_one_line_in_the_log(
    place: Store, later: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    held = EndpointLease(new_lease())
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(Store, "write", refuse)
        for _ in range(3):
            held = beat(place, DEPLOYMENT, held)
            assert held.state == "unwritable"
            later(BEAT_S)
    assert len(caplog.records) == 1
    assert "cannot be written (PermissionError)" in caplog.text
    assert not place.exists(PATH)
    assert beat(place, DEPLOYMENT, held).state == "held"


def test_an_outage_does_not_let_a_paused_coordinator_take_the_lease_back(
    place: Store, later: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    held = beat(place, DEPLOYMENT, EndpointLease(new_lease()))
    later(BEAT_S)
    with monkeypatch.context() as patched:
        patched.setattr(Store, "write", refuse)
        held = beat(place, DEPLOYMENT, held)
    other = beat(place, DEPLOYMENT, EndpointLease(new_lease()))
    later(BEAT_S)
    assert beat(place, DEPLOYMENT, held).state == "overtaken"
    assert lease.read(place, PATH) == other.own


# ---------------------------------------------------------------- the coordinator


def record_of(catalog: Catalog, min_replicas: int) -> Deployment:
    model = version(catalog, "support")
    settings = {"name": "support", "models": [model.id], "replicas": {"min": min_replicas, "max": 2}}
    return Deployment(
        name="support",
        model=model.id,
        model_version=model.id,
        model_digest="",
        models={model.id: model.id},
        config=resolved(parse(DeployConfig, settings)),
        config_digest="",
    ).sealed()


def poll(actor: Coordinator, seconds: float) -> None:
    """Let the coordinator look at its store for so long, or until it ends."""

    async def polled() -> None:
        actor.watcher.standing.poll_s, actor._polling = 0.05, None
        await actor.start()
        assert actor._polling is not None
        await asyncio.wait([actor._polling], timeout=seconds)
        actor._polling.cancel()
        await asyncio.wait([actor._polling])

    asyncio.run(polled())


def lease_state(actor: Coordinator) -> str:
    return str(asyncio.run(actor.state())["lease"])


def coordinator_of(catalog: Catalog, min_replicas: int, idle_s: float = 600.0) -> Coordinator:
    return Coordinator(record_of(catalog, min_replicas).model_dump(mode="json"), catalog.store.uri, idle_s)


def test_a_coordinator_holds_the_lease_only_while_replicas_report(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_lease, "BEAT_S", 0.0)
    monkeypatch.setattr(coordinator, "SILENT_S", 1e9)
    actor = coordinator_of(catalog, min_replicas=1)
    path = paths.endpoint(actor.deployment.id)
    poll(actor, 0.5)
    assert not catalog.store.exists(path)
    assert lease_state(actor) == "none"
    asyncio.run(actor.report("replica-1", {}, [], [], None))
    poll(actor, 1.0)
    assert lease.read(catalog.store, path) == actor.lease.own
    assert lease_state(actor) == "held"
    monkeypatch.setattr(coordinator, "SILENT_S", 0.0)
    os.utime(catalog.store.path(path), (1, 1))
    poll(actor, 0.5)
    assert lease.age_s(catalog.store, path) > 1000


def test_with_a_minimum_of_no_replicas_the_lease_is_held_until_the_coordinator_is_idle(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[object] = []
    monkeypatch.setattr(coordinator.ray, "kill", ended.append)
    monkeypatch.setattr(coordinator.ray, "get_runtime_context", lambda: SimpleNamespace(current_actor="itself"))
    actor = coordinator_of(catalog, min_replicas=0)
    path = paths.endpoint(actor.deployment.id)
    poll(actor, 1.0)
    assert lease.read(catalog.store, path) == actor.lease.own
    actor.idle_s = 0.0
    poll(actor, 0.5)
    assert ended == ["itself"]
    assert not catalog.store.exists(path)


def test_a_coordinator_that_starts_again_takes_over(catalog: Catalog) -> None:
    first, second = (coordinator_of(catalog, min_replicas=0) for _ in range(2))
    path = paths.endpoint(first.deployment.id)
    for actor in (first, second):
        poll(actor, 1.0)
        assert lease.read(catalog.store, path) == actor.lease.own
