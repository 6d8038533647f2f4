"""Leases: who holds one, for how long it counts, and what a clock, a pause or a store that refuses does to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forge_ray.store import lease
from forge_ray.store.files import Store
from forge_ray.store.lease import Lease

pytestmark = pytest.mark.unit
PATH = "work/endpoints/dep_1.json"
ELSEWHERE = Lease(token="t", host="elsewhere", boot="b", pid=7, started="1", at="2026-01-01T00:00:00Z")


@pytest.fixture
def place(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def ended_process() -> Lease:
    """A lease of a process of this machine that has ended."""
    code = "from forge_ray.store.lease import new_lease; print(new_lease().model_dump_json())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return Lease.model_validate_json(done.stdout.splitlines()[-1])


def age(store: Store, seconds: float) -> None:
    at = time.time() - seconds
    os.utime(store.path(PATH), (at, at))


def test_process_of_this_machine_says_itself_whether_it_lives(place: Store) -> None:
    """However old or fresh its lease is."""
    own, ended = lease.new_lease(), ended_process()
    assert lease.take(place, PATH, own, 60) == ""
    age(place, 1000)
    assert lease.sign_of_life(place, PATH, own, 60) == "which is running"
    assert lease.take(place, PATH, ended, 60).startswith(f"pid {os.getpid()} on {own.host}, since {own.at}")
    lease.write(place, PATH, ended)
    assert lease.sign_of_life(place, PATH, ended, 60) == ""
    assert lease.take(place, PATH, own, 60) == ""
    assert lease.is_held(place, PATH, own)


def test_age_decides_about_another_machine(place: Store) -> None:
    lease.write(place, PATH, ELSEWHERE)
    age(place, 59)
    assert lease.sign_of_life(place, PATH, ELSEWHERE, 60).startswith("last seen 59 s ago")
    age(place, 61)
    assert lease.sign_of_life(place, PATH, ELSEWHERE, 60) == ""


@pytest.mark.parametrize("skew_s", [-86400.0, 86400.0])
def test_clock_of_the_reader_does_not_count(place: Store, skew_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's clock does; only where the reader may not write it has no other than its own, and no age is negative."""
    lease.write(place, PATH, ELSEWHERE)
    age(place, 10)
    now = time.time_ns() + int(skew_s * 1e9)
    monkeypatch.setattr(time, "time_ns", lambda: now)
    assert 9 < lease.age_s(place, PATH) < 20
    names = sorted(Path(place.path("work/endpoints")).iterdir())
    assert [name.name for name in names] == ["dep_1.json"]  # what asked the clock is deleted
    assert lease.age_s(place, PATH, may_write=False) == pytest.approx(max(0.0, skew_s + 10), abs=5)


def test_store_that_refuses_to_be_written_has_the_readers_clock(place: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lease.write(place, PATH, ELSEWHERE)
    age(place, 10)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Store, "write", refuse)
    assert 9 < lease.age_s(place, PATH) < 20


@pytest.mark.parametrize("content", [b"", b'{"tok', b"[]", b"7", b'{"token": "t"}', b'{"token": 1, "pid": "x"}'])
def test_unreadable_lease_is_nobodys(place: Store, content: bytes) -> None:
    place.write(PATH, content)
    own = lease.new_lease()
    assert lease.read(place, PATH) is None
    lease.release(place, PATH, own)
    assert place.read(PATH) == content
    assert lease.take(place, PATH, own, 60) == ""
    assert lease.read(place, PATH) == own


def test_holder_neither_renews_nor_deletes_a_lease_that_was_taken_over(place: Store) -> None:
    own = lease.new_lease()
    assert lease.take(place, PATH, own, 60) == ""
    with lease.held(place, PATH, own, every_s=0.01):
        age(place, 1000)
        deadline = time.monotonic() + 10
        while lease.age_s(place, PATH) > 100:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        lease.write(place, PATH, ELSEWHERE)
        age(place, 1000)
        time.sleep(0.2)
        assert lease.age_s(place, PATH) > 900
    assert lease.read(place, PATH) == ELSEWHERE
