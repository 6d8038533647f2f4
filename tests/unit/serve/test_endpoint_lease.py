"""The lease of an endpoint, as its coordinator keeps it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from forge_ray.serve.endpoint_lease import EndpointLease, beat, give_up
from forge_ray.store import lease, paths
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
