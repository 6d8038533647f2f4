"""A small process beside every worker that ends it when it makes no progress (imports nothing heavy).

The worker writes into a shared file until when it will have taken its next step. When that time is over, the stacks of its
threads are saved (py-spy, from outside: it may be stopped, or hold the interpreter's lock), an incident is written, and the
worker is killed; then its group is started again. A worker that waits in a collective for a stopped one is ended too: its
stacks say so. Being another process it also works when the worker has been stopped as a whole (SIGSTOP).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from forge_ray.store import paths

if TYPE_CHECKING:
    from forge_ray.config.guards import Guards

LOOK_EVERY_S = 0.2
OTHERS_S = 3.0  # the worker is kept for so long after its stacks were taken: the others' are taken in the same moment
FORMAT = struct.Struct("dq16s")  # until when (monotonic clock; 0: no limit), which step, doing what
PR_SET_PTRACER = 0x59616D61


class Watchdog:
    """The worker's side. `expect("step", 12)` when it begins; the time since the last `expect` becomes history."""

    def __init__(self, guards: Guards, store: str, run: str, rank: int) -> None:
        self.guards = guards
        self.history: dict[str, deque[float]] = {}
        self.phase, self.began = "", 0.0
        with tempfile.NamedTemporaryFile(prefix="forge-watch-") as file:
            file.write(FORMAT.pack(0.0, 0, b""))
            file.flush()
            self.shared = mmap.mmap(file.fileno(), FORMAT.size)
            os.set_inheritable(file.fileno(), True)
            command = [sys.executable, "-m", __name__, str(os.getpid()), str(file.fileno()), store, run, str(rank)]
            self.process = subprocess.Popen(command, close_fds=False, stdin=subprocess.DEVNULL, start_new_session=True)
        if sys.platform == "linux":  # where only parents may look at a process, let this child too
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, self.process.pid, 0, 0, 0)

    def expect(self, phase: str, step: int) -> None:
        now = time.monotonic()
        if self.phase:
            self.history.setdefault(self.phase, deque(maxlen=50)).append(now - self.began)
        self.phase, self.began = phase, now
        limit = now + self.allowed(phase) if phase else 0.0
        self.shared[:] = FORMAT.pack(limit, step, phase.encode())

    def allowed(self, phase: str) -> float:
        """Seconds until a phase counts as hung; generous until it has a history."""
        durations = self.history.get(phase, ())
        if len(durations) < 3:
            return self.guards.first_step_s
        return self.guards.hang_factor * statistics.median(durations) + self.guards.hang_slack_s

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.shared.close()


def main(worker: int, handle: int, store: str, run: str, rank: int) -> None:
    """The process. It ends with the worker."""
    shared = mmap.mmap(handle, FORMAT.size, prot=mmap.PROT_READ)
    while os.getppid() == worker:
        limit, step, phase = FORMAT.unpack(shared[:])
        if 0 < limit < time.monotonic():
            _end(worker, store, run, rank, step, phase.rstrip(b"\0").decode(), time.monotonic() - limit)
            return
        time.sleep(LOOK_EVERY_S)


def _end(worker: int, store_uri: str, run: str, rank: int, step: int, phase: str, over_s: float) -> None:
    deadline = time.monotonic() + OTHERS_S
    state = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
    stacks = _stacks(worker)
    try:
        import platform

        from forge_ray.store.files import Store
        from forge_ray.train import incidents

        store = Store(store_uri)
        path = paths.run(run, "stacks", f"{paths.step(step)}-rank-{rank:05d}-{int(time.time())}.txt")
        store.write(path, stacks.encode())
        facts = {"phase": phase, "rank": rank, "node": platform.node(), "was_stopped": state in "Tt", "stacks": path}
        incidents.write(store, run, "hang", step, **facts)
    finally:  # whatever the store says, a hung group is of no use
        time.sleep(max(0.0, deadline - time.monotonic()))
        os.kill(worker, signal.SIGKILL)


def _stacks(worker: int) -> str:
    tool = Path(sys.executable).with_name("py-spy")
    command = [str(tool) if tool.exists() else "py-spy", "dump", "--nonblocking", "--pid", str(worker)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy gave no stacks: {error}\n"
    return done.stdout or f"py-spy gave no stacks: {done.stderr}\n"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
