"""Who trains a run: one driver at a time, and a number for each start of its workers.

    runs/<id>/driver.json              the lease: which process drives the run; touched while it lives
    runs/<id>/attempts/000003.json     one per start of the worker group, never rewritten; its number is a fence

A second driver is refused while the first one lives. Should a driver that was thought dead come back (a paused machine, a
lost network), its workers find that a younger attempt exists, and stop before they publish anything.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forge_ray.errors import PolicyError, TrainingError
from forge_ray.machine.environment import code_commit, code_digest
from forge_ray.records import canonical_json, utc_now
from forge_ray.store import lease, paths
from forge_ray.store.erased import refuse_erased
from forge_ray.store.files import Store
from forge_ray.store.walk import folders

DRIVER = "driver.json"
HEARTBEAT_S = 5.0
LEASE_S = 60.0  # without a sign of life for so long, a driver of another machine counts as dead


def start(store: Store, run: str, world_size: int, first_step: int, environments: Sequence[str] = ()) -> int:
    """Put a new attempt on record, with what it is computed with; returns its number, from 1. Two that start at once get
    different numbers. `environments`: digests of the workers' locks by rank, "" for those whose machine is named already."""
    number = newest(store, run)
    while True:
        number += 1
        value = {
            "number": number,
            "at": utc_now(),
            "host": platform.node(),
            "pid": os.getpid(),
            "world_size": world_size,
            "first_step": first_step,
            "environments": list(dict.fromkeys(item for item in environments if item)),
            "code_digest": code_digest(),
            "code_commit": code_commit(),
        }
        if store.create(_path(run, number), canonical_json(value)):
            return number


def newest(store: Store, run: str) -> int:
    """The number of the last attempt, 0 before the first."""
    return max((int(Path(path).stem) for path in store.list(paths.run(run, "attempts"))), default=0)


def read(store: Store, run: str) -> list[dict[str, Any]]:
    return [store.read_json(path) for path in store.list(paths.run(run, "attempts"))]


def check_newest(store: Store, run: str, number: int) -> None:
    """Raise `TrainingError` when a younger attempt of the run has started: this one must not write any more."""
    if store.exists(_path(run, number + 1)):
        other = store.read_json(_path(run, number + 1))
        raise TrainingError(
            f"attempt {number} of {run} was overtaken by attempt {other['number']} on {other['host']} (pid {other['pid']},"
            f" {other['at']})",
            hint="nothing is lost: the other attempt goes on from the last checkpoint; stop whichever you do not want",
        )


def _path(run: str, number: int) -> str:
    return paths.attempt(run, number)


def check_may_publish(store: Store, run: str, dataset: str, *versions: str, number: int | None = None) -> None:
    """Raise `TrainingError` where nothing of the run may be published any more: an erasure has withdrawn its dataset or one
    of the versions that its weights depend on, or (with `number`) a younger attempt has started."""
    if number is not None:
        check_newest(store, run, number)
    try:
        for version in versions or ("",):
            refuse_erased(store, run, dataset, version)
    except PolicyError as error:
        raise TrainingError(error.message, hint=error.hint) from None


def drivers(store: Store) -> dict[str, str]:
    """Folder → in words why it counts as being trained now, for the runs of the store and of its scratch stores."""
    living = {}
    scratch = [f"{folder}/{paths.run()}" for folder in folders(store, paths.work("reproduce"))]
    for run in (run for place in (paths.run(), *scratch) for run in folders(store, place)):
        path = f"{run}/{DRIVER}"
        if (holder := lease.read(store, path)) and (sign := lease.sign_of_life(store, path, holder, LEASE_S)):
            living[run] = f"{lease.in_words(holder)}, {sign}"
    return living


@contextmanager
def driving(store: Store, run: str) -> Iterator[None]:
    """Hold the run's lease; raises `TrainingError` while another living driver holds it."""
    path, own = paths.run(run, DRIVER), lease.new_lease()
    if holder := lease.take(store, path, own, LEASE_S):
        raise TrainingError(
            f"{run} is being trained by another driver: {holder}",
            hint="wait for it, or stop it and start again; `forge runs list` shows its state",
        )
    with lease.held(store, path, own, HEARTBEAT_S):  # the fence is what keeps order, not the lease
        yield
