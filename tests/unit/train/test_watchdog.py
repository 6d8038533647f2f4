"""The process beside a worker: what it allows, and that it ends one that is stopped, with its stacks saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forge_ray.config.guards import Guards
from forge_ray.store.files import Store
from forge_ray.train import guards, incidents, watchdog

pytestmark = [pytest.mark.unit, pytest.mark.slow]

WORKER = """
import sys, time
from forge_ray.config.guards import Guards
from forge_ray.train.watchdog import Watchdog
dog = Watchdog(Guards(hang_slack_s=0.5, first_step_s=60), sys.argv[1], "run_a", 3)
for step in range(1, 6):
    dog.expect("step", step)
    time.sleep(0.02)
dog.expect("step", 6)
print("waiting", flush=True)
def waits_for_ever():
    time.sleep(600)
waits_for_ever()
"""


def test_time_limit_derives_from_median_step(tmp_path: Path) -> None:
    dog = watchdog.Watchdog(Guards(), str(tmp_path), "run_a", 0)
    try:
        assert dog.allowed("step") == 1800.0
        dog.history["step"] = watchdog.deque([1.0, 2.0, 9.0])
        assert dog.allowed("step") == 16.0
        assert dog.allowed("checkpoint") == 1800.0
    finally:
        dog.close()


@pytest.mark.parametrize("stopped", [False, True], ids=["waiting", "stopped"])
def test_hung_worker_is_killed_and_its_stacks_are_saved(stopped: bool, tmp_path: Path) -> None:
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "waiting\n"
    if stopped:
        os.kill(worker.pid, signal.SIGSTOP)
    assert worker.wait(30) == -signal.SIGKILL
    store = Store(str(tmp_path))
    (incident,) = incidents.read(store, "run_a")
    assert (incident["kind"], incident["step"], incident["rank"], incident["phase"]) == ("hang", 6, 3, "step")
    assert incident["was_stopped"] is stopped
    assert "waits_for_ever" in store.read(incident["stacks"]).decode()


def test_watchdog_exits_with_its_worker(tmp_path: Path) -> None:
    code = WORKER.replace("time.sleep(600)", "print(dog.process.pid, flush=True)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    pid = int(done.stdout.split()[-1])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    assert incidents.read(Store(str(tmp_path)), "run_a") == []


def test_slow_ranks_are_measured_against_the_median() -> None:
    assert guards.slow_ranks([1.0, 1.1, 0.9, 1.7], 1.5) == {3}
    assert guards.slow_ranks([1.0, 1.4], 1.5) == set()
    assert guards.slow_ranks([1.0, 2.0], 1.5) == {1}
