"""The first SIGINT or SIGTERM ends a process in order, or after a while at once; later ones change nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.unit

PROGRAM = """
import asyncio, signal, sys, threading
from forge_ray.cli import ends
from forge_ray.machine.signals import handlers_kept, raise_on_signals
from forge_ray.progress import stage
ends.END_S = 1.0
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)  # the tests may run in the background, where shells ignore SIGINT
raise_on_signals(ends.stop_in_time)
with handlers_kept():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as ray.init does
if sys.argv[1] == "hangs after a loop":
    loop = asyncio.new_event_loop()
    loop.add_signal_handler(signal.SIGUSR1, print)
    loop.close()  # there is no wakeup descriptor any more
try:
    with stage("train"):
        print("ready", flush=True)
        threading.Event().wait()
except KeyboardInterrupt as error:
    if sys.argv[1].startswith("hangs"):
        threading.Event().wait()
    code = ends.report(error)
    if sys.argv[1] == "exit hangs":
        threading.Event().wait()
    sys.exit(code)
"""


@pytest.mark.parametrize("how", ["ends", "hangs", "hangs after a loop", "exit hangs"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_a_process_with_its_code(number: signal.Signals, how: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    time.sleep(0.2)
    if process.poll() is None:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert number.name in errors[0]
    assert "Traceback" not in err
    if not how.startswith("hangs"):
        assert "in stage train" in errors[0]
        assert "the same command resumes" in err


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As in `nohup`, and in what a script starts in the background."""
    program = """
import os, signal
from forge_ray.cli import ends
from forge_ray.machine.signals import raise_on_signals
signal.signal(signal.SIGINT, signal.SIG_IGN)
raise_on_signals(ends.stop_in_time)
os.kill(os.getpid(), signal.SIGINT)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
