"""One driver at a time, and a number for each start of a run's workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from forge_ray.errors import TrainingError
from forge_ray.store import lease
from forge_ray.store.files import Store
from forge_ray.train import attempts

pytestmark = pytest.mark.unit
HOLDER = """
import sys, time
from forge_ray.store.files import Store
from forge_ray.train import attempts
with attempts.driving(Store(sys.argv[1]), "run_a"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def place(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_concurrent_attempts_get_distinct_numbers(place: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda n: attempts.start(place, "run_a", 2, n), range(40)))
    assert sorted(numbers) == list(range(1, 41))
    written = attempts.read(place, "run_a")
    assert [item["number"] for item in written] == list(range(1, 41))
    assert sorted(item["first_step"] for item in written) == list(range(40))
    assert attempts.newest(place, "run_b") == 0


def test_superseded_attempt_error_names_newer_attempt(place: Store) -> None:
    first = attempts.start(place, "run_a", 2, 0)
    attempts.check_newest(place, "run_a", first)
    second = attempts.start(place, "run_a", 2, 4)
    with pytest.raises(
        TrainingError, match=rf"attempt 1 of run_a was overtaken by attempt 2 on .* \(pid {os.getpid()},"
    ) as error:
        attempts.check_newest(place, "run_a", first)
    assert "nothing is lost" in error.value.hint
    attempts.check_newest(place, "run_a", second)


def test_second_driver_is_refused_while_first_is_alive(place: Store) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, place.uri], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(TrainingError, match=rf"another driver: pid {holder.pid} on .* which is running") as error,
            attempts.driving(place, "run_a"),
        ):
            pass
        assert "wait for it, or stop it" in error.value.hint
        with attempts.driving(place, "run_b"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with attempts.driving(place, "run_a"):
        assert place.read_json("runs/run_a/driver.json")["pid"] == os.getpid()
    assert not place.exists("runs/run_a/driver.json")


def test_lease_of_remote_driver_expires_without_heartbeat(place: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "runs/run_a/driver.json"
    other = {"token": "t", "host": "elsewhere", "boot": "b", "pid": 1, "started": "1", "at": "2026-01-01T00:00:00Z"}
    place.write(path, json.dumps(other).encode())
    with (
        pytest.raises(TrainingError, match=r"pid 1 on elsewhere, since 2026-01-01T00:00:00Z, last seen \d s ago"),
        attempts.driving(place, "run_a"),
    ):
        pass
    long_ago = time.time() - attempts.LEASE_S - 1
    os.utime(place.path(path), (long_ago, long_ago))
    with attempts.driving(place, "run_a"):
        assert place.read_json(path)["token"] != "t"


def test_lease_heartbeat_and_takeover_of_corrupt_lease(place: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "HEARTBEAT_S", 0.02)
    path = "runs/run_a/driver.json"
    place.write(path, b'{"tok')
    with attempts.driving(place, "run_a"):
        os.utime(place.path(path), (1, 1))
        deadline = time.monotonic() + 10
        while lease.age_s(place, path) > 60:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        place.write(path, json.dumps({"token": "another's"}).encode())
        while any(thread.name == "forge-lease" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert place.read_json(path) == {"token": "another's"}
    assert [name for name in Path(place.path("runs/run_a")).iterdir() if name.name.startswith(".")] == []
