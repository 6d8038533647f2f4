"""An engine core whose parent is killed does not stay."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

import pytest

pytestmark = pytest.mark.unit

SPAWN = multiprocessing.get_context("spawn")


def engine_core(end: Connection) -> None:
    import forge_ray.inference.vllm_worker  # noqa: F401

    end.send(os.getpid())
    time.sleep(120)


def replica(end: Connection) -> None:
    SPAWN.Process(target=engine_core, args=(end,)).start()
    time.sleep(120)


def test_engine_core_exits_with_its_killed_replica() -> None:
    here, there = SPAWN.Pipe()
    parent = SPAWN.Process(target=replica, args=(there,))
    parent.start()
    there.close()
    child = here.recv()
    os.kill(child, 0)  # it runs
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join(10)
    assert here.poll(20)  # the pipe's other end closed: the child ended
    with pytest.raises(EOFError):
        here.recv()
