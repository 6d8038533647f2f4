"""Whether Ray has what a stage asks for, before the stage waits for it.

On a Ray that this process started, what is more than there is will never come, so it is refused at once. On a cluster it may
be busy, or its autoscaler may add machines: a placement group asks for it, and a line every `SAY_EVERY_S` seconds says what
is missing and who holds it, until it is there or `FORGE_WAIT_S` is over.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from forge_ray.errors import ClusterError, ConfigError
from forge_ray.machine.hardware import cpus
from forge_ray.machine.ray_internals import started_here

SAY_EVERY_S = 10.0
SHORTEST_WAIT_S = 1.0  # Ray counts whole seconds, and does not look at all in 0 of them
WAIT_VARIABLE = "FORGE_WAIT_S"
WAIT_S = 1800.0


@dataclass(frozen=True)
class Demand:
    """`count` times (CPUs, GPUs), each time on one machine. `settings`: which to lower, for the hint."""

    what: str
    count: int
    cpus: float
    gpus: float
    settings: str

    @property
    def each(self) -> dict[str, float]:
        return {kind: amount for kind, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}

    def __str__(self) -> str:
        return f"{self.what} needs {f'{self.count} × ' if self.count > 1 else ''}{_words(self.each)}"


def refuse_oversized(demand: Demand) -> None:
    """`ConfigError` where this process started its Ray and that has less in all. Ray must be connected."""
    import ray

    if not started_here():
        return
    total = _amounts(ray.cluster_resources())
    if _fits(total, demand.each) >= demand.count:
        return
    slots = f" (slots; {cpus()} cores)" if total["CPU"] != cpus() else ""
    raise ConfigError(
        f"{demand}, and this machine has {total['CPU']:g} CPU{slots} and {total['GPU']:g} GPU",
        hint=f"lower {demand.settings}, or name a cluster that has it: RAY_ADDRESS=HOST:6379",
    )


def wait_for(demand: Demand) -> None:
    """Return when Ray can place the demand now. Raises `ConfigError` as `refuse_oversized`, and `ClusterError` where it
    cannot after `FORGE_WAIT_S` seconds. Ray must be connected."""
    from ray.util import placement_group, remove_placement_group

    refuse_oversized(demand)
    if not demand.each or not demand.count:
        return
    most = wait_limit()
    began = time.monotonic()
    group: Any = placement_group([demand.each] * demand.count)
    try:
        while not group.wait(min(SAY_EVERY_S, max(most - (time.monotonic() - began), SHORTEST_WAIT_S))):
            waited = time.monotonic() - began
            state = missing(demand)
            if waited >= most:
                raise ClusterError(
                    f"{state}; waited {waited:.0f} s ({WAIT_VARIABLE}={most:g})",
                    hint=f"free or add resources (`ray status` shows them), lower {demand.settings}, or set"
                    f" {WAIT_VARIABLE} to more seconds; the same command resumes",
                )
            print(f"  waiting   {state}; {waited:.0f} of at most {most:g} s", file=sys.stderr, flush=True)
    finally:
        remove_placement_group(group)


def wait_limit() -> float:
    """Seconds that a stage waits for resources of a cluster."""
    text = os.environ.get(WAIT_VARIABLE, "")
    try:
        seconds = float(text) if text else WAIT_S
    except ValueError:
        seconds = -1.0
    if not (0 <= seconds < math.inf):
        raise ConfigError(f"{WAIT_VARIABLE}={text!r} is not a number of seconds", hint=f"for example {WAIT_VARIABLE}=3600")
    return seconds


def is_short(demand: Demand) -> bool:
    """Whether less is free in the whole cluster than one of the demand takes. Ray must be connected."""
    import ray

    return _fits(_amounts(ray.available_resources()), demand.each) < 1


def missing(demand: Demand) -> str:
    """In words: what is asked for, what the cluster has, what of it is free, and who holds the rest as far as Ray says."""
    import ray

    total, free = _amounts(ray.cluster_resources()), _amounts(ray.available_resources())
    parts = [f"{free[kind]:g} of {total[kind]:g} {kind} are free" for kind in demand.each]
    held = "; ".join(_holders(demand.each))
    return f"{demand}; in the cluster {' and '.join(parts)}{f'; held: {held}' if held else ''}"


def _holders(kinds: Mapping[str, float]) -> Iterator[str]:
    """Placement groups that hold a resource of these kinds. What tasks and actors outside of them hold, Ray does not say
    without a dashboard."""
    from ray.util import placement_group_table

    for identifier, group in sorted(placement_group_table().items()):
        held = _amounts({})
        for bundle in group["bundles"].values():
            held = {kind: held[kind] + bundle.get(kind, 0.0) for kind in held}
        if group["state"] == "CREATED" and any(held[kind] for kind in kinds):
            yield f"{_words(held)} by placement group {group['name'] or identifier[:12]}"


def _fits(has: Mapping[str, float], each: Mapping[str, float]) -> float:
    """How often `each` fits into what a machine has."""
    return min((math.floor(has[kind] / amount + 1e-9) for kind, amount in each.items()), default=math.inf)


def _amounts(resources: Mapping[str, float]) -> dict[str, float]:
    return {kind: float(resources.get(kind, 0.0)) for kind in ("CPU", "GPU")}


def _words(amounts: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in amounts.items() if amount)
