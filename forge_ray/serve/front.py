"""A replica's HTTP with everything in front of it, in the order that is safe (no ray)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace

from forge_ray.inference.engine import EngineHealth
from forge_ray.serve.access import AsgiApp, Granted, guarded
from forge_ray.serve.http import build_http
from forge_ray.serve.keys import ApiKey
from forge_ray.serve.ledger import Ledger
from forge_ray.serve.limits import LimitVerdict, admission, bounded
from forge_ray.serve.served import Served


def front(
    served: Served,
    keys: Callable[[], Mapping[str, ApiKey]] | None,
    take: Callable[..., Awaitable[LimitVerdict]],
    settle: Callable[..., Awaitable[None]],
    replica: str,
    health: Callable[[], Iterable[EngineHealth]],
    ledger: Ledger | None,
) -> AsgiApp:
    """The ASGI app of a replica. `served.admit` is asked too, once the caller's grants and limits are passed.

    `keys`: sha256 → key as it is now; None where none is needed. `take` and `settle`: see `limits.admission`.
    """
    admit = admission(take, settle, replica, served.metrics, ledger, served.admit)
    directory = served.directory if keys is None else Granted(served.directory)
    app = build_http(replace(served, directory=directory, admit=admit))
    app = bounded(app, health, served.config.limits.max_queued_requests, served.metrics)
    return guarded(app, keys, served.metrics, {"x-forge-deployment": served.deployment})
