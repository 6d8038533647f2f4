"""Work in pieces as tasks of Ray: as many at once as there are cores, each result as it is there.

No pipeline of Ray Data: what a piece makes goes to the store, so no rows pass between tasks, and Ray Data (2.60) gives each
pipeline one task at a time for its first second and looks at those that have ended every tenth of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from forge_ray.errors import ClusterError, first_cause
from forge_ray.machine.hardware import cpus

P = TypeVar("P")
R = TypeVar("R")

RETRIES = 8  # of a piece whose process or machine was lost; one that ends every process it is given must not go on for ever


def in_tasks(work: Callable[[P], R], pieces: Iterable[P], take: Callable[[R], None], at_once: int | None = None) -> None:
    """Give `take` the result of `work` for every piece, in the order in which they are done; needs an initialised Ray.
    `at_once`: tasks at the same time, where their memory allows no more.

    Raises what `work` or `take` raises, once no task is left that runs, and `ClusterError` for a piece that was tried
    `RETRIES` times again."""
    import ray

    task: Any = ray.remote(_apply).options(name=_name(work), num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")
    shared, waiting = ray.put(work), iter(pieces)
    running: list[Any] = []

    def begin() -> None:
        free = (at_once or _num_at_once()) - len(running)
        running.extend(task.remote(shared, piece) for piece in islice(waiting, max(free, 0)))

    try:
        begin()
        while running:
            ended, running[:] = ray.wait(running, num_returns=1)
            begin()
            for reference in ended:
                take(_result(reference, work))
    except Exception:
        if running:
            ray.wait(running, num_returns=len(running))  # they may write where the caller is about to begin again
        raise


def _apply(work: Callable[[P], R], piece: P) -> R:
    return work(piece)


def _result(reference: Any, work: Callable[[P], R]) -> R:
    import ray

    try:
        result: R = ray.get(reference)
        return result
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
        raise ClusterError(
            f"a piece of work ({_name(work)}) was lost {RETRIES + 1} times, with the process that did it",
            hint="the kernel's log says whether memory ran out, Ray's logs how the process ended; finished pieces are kept,"
            " and the same command goes on from them",
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise first_cause(error) from error


def _num_at_once() -> int:
    """On this machine alone one task a core, for a local Ray may have more slots and a task is a process that takes as long
    again beside another; in a cluster twice its CPUs, so that none waits, and an autoscaler sees what is wanted."""
    import ray

    slots = int(ray.cluster_resources().get("CPU", 1))
    addresses = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if addresses == {ray.util.get_node_ip_address()}:
        return max(min(slots, cpus()), 1)
    return max(2 * slots, 1)


def _name(work: Callable[[Any], Any]) -> str:
    while isinstance(work, partial):
        work = work.func
    return getattr(work, "__name__", type(work).__name__)
