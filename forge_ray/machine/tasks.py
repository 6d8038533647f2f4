"""Work in pieces as tasks of Ray: as many at once as there are cores, each result as it is there.

No pipeline of Ray Data: what a piece makes goes to the store, so no rows pass between tasks, and Ray Data (2.60) gives each
pipeline one task at a time for its first second and looks at those that have ended every tenth of a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from forge_ray.errors import ClusterError, first_cause, first_line
from forge_ray.machine.hardware import cpus
from forge_ray.machine.ray_internals import started_here

P = TypeVar("P")
R = TypeVar("R")

RETRIES = 8  # of a piece whose process or machine was lost; one that ends every process it is given must not go on for ever
LONGEST_END_S = 60.0  # that an error waits for what still runs
COUNTED_FOR_S = 1.0  # how long the number of a cluster's CPUs is believed


def in_tasks(work: Callable[[P], R], pieces: Iterable[P], take: Callable[[R], None], at_once: int | None = None) -> None:
    """Give `take` the result of `work` for every piece, in the order in which they are done; needs an initialised Ray.
    `at_once`: tasks at the same time, where their memory allows no more.

    Raises what `work` or `take` raises, once no task is left that runs or a minute later, and `ClusterError` for a piece
    that was lost `RETRIES` times more than once, or that Ray cannot run."""
    import ray

    # one at a time share what they have read (`lru_cache`), where they are in one process
    spread = "DEFAULT" if at_once == 1 else "SPREAD"
    task: Any = ray.remote(_apply).options(name=_name(work), num_cpus=1, max_retries=RETRIES, scheduling_strategy=spread)
    shared, waiting, slots = ray.put(work), iter(pieces), _slots(at_once)
    running: list[Any] = []

    def begin() -> None:
        free = slots() - len(running)
        running.extend(task.remote(shared, piece) for piece in islice(waiting, max(free, 0)))

    try:
        begin()
        while running:
            ray.wait(running, num_returns=1)
            ended, running[:] = ray.wait(running, num_returns=len(running), timeout=0)
            begin()
            for reference in ended:
                take(_result(reference, work))
    except Exception:
        if running:  # they may write where the caller is about to begin again
            ray.wait(running, num_returns=len(running), timeout=LONGEST_END_S)
        raise


def _apply(work: Callable[[P], R], piece: P) -> R:
    return work(piece)


def _result(reference: Any, work: Callable[[P], R]) -> R:
    import ray

    try:
        result: R = ray.get(reference)
        return result
    except ray.exceptions.RayTaskError as error:
        raise first_cause(error) from error
    except ray.exceptions.RayError as error:
        lost = isinstance(error, ray.exceptions.WorkerCrashedError | ray.exceptions.NodeDiedError)
        what = f"was lost {RETRIES + 1} times, with the process that did it" if lost else f"did not end: {first_line(error)}"
        raise ClusterError(
            f"a piece of work ({_name(work)}) {what}",
            hint="the kernel's log says whether memory ran out, Ray's logs how the process ended; finished pieces are kept,"
            " and the same command goes on from them",
        ) from error


def _slots(at_once: int | None) -> Callable[[], int]:
    """How many tasks to have at once. Where this process started Ray one a core, for it may have more slots than that, and a
    task is a process that takes as long again beside another; in a cluster twice its CPUs, so that none waits, and an
    autoscaler sees what is wanted."""
    import ray

    if at_once or started_here():
        number = at_once or max(min(int(ray.cluster_resources().get("CPU", 1)), cpus()), 1)
        return lambda: number
    counted, until = 1, 0.0

    def in_cluster() -> int:
        nonlocal counted, until
        if time.monotonic() >= until:
            counted, until = int(ray.cluster_resources().get("CPU", 1)), time.monotonic() + COUNTED_FOR_S
        return max(2 * counted, 1)

    return in_cluster


def _name(work: Callable[[Any], Any]) -> str:
    while isinstance(work, partial):
        work = work.func
    return getattr(work, "__name__", type(work).__name__)
