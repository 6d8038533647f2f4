"""The lease of an endpoint, as its coordinator keeps it: by it other machines see that the endpoint runs (no ray).

The process that deployed the endpoint may end, so it cannot hold the lease. A coordinator that starts takes it over from the
one before; one that was paused meanwhile finds another's in its place, and stops.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from typing import Literal

from forge_ray.errors import StoreError
from forge_ray.store import lease, paths
from forge_ray.store.endpoint_state import BEAT_S
from forge_ray.store.files import Store
from forge_ray.store.lease import Lease

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EndpointLease:
    """What a coordinator holds. `state`: `none` before the first beat; `overtaken`: another coordinator of the deployment
    has the lease; `unwritable`: the store refused the last beat. `beat_at`: the last try, in seconds of the monotonic clock.
    `is_taken`: whether it was ever written."""

    own: Lease
    state: Literal["none", "held", "overtaken", "unwritable"] = "none"
    beat_at: float = -math.inf
    is_taken: bool = False


def beat(store: Store, deployment: str, held: EndpointLease) -> EndpointLease:
    """Renew the lease where that is due: one write every `BEAT_S` seconds. Where the endpoint may only read the store it has
    no lease, which is logged once, and its state is that of its last event."""
    now, path = time.monotonic(), paths.endpoint(deployment)
    if held.state == "overtaken" or now - held.beat_at < BEAT_S:
        return held
    try:
        holder = lease.read(store, path)
        if held.is_taken and holder is not None and holder.token != held.own.token:
            LOG.warning("%s: %s has the lease of the endpoint, and keeps it", deployment, lease.in_words(holder))
            return replace(held, state="overtaken")
        lease.write(store, path, held.own)
    except (OSError, StoreError) as error:
        if held.state != "unwritable":
            LOG.warning("%s: the lease of the endpoint cannot be written (%s)", deployment, type(error).__name__)
        return replace(held, state="unwritable", beat_at=now)
    return replace(held, state="held", beat_at=now, is_taken=True)


def give_up(store: Store, deployment: str, held: EndpointLease) -> None:
    """Delete the lease, unless another coordinator has it."""
    try:
        lease.release(store, paths.endpoint(deployment), held.own)
    except (OSError, StoreError) as error:
        LOG.warning("%s: the lease of the endpoint cannot be deleted (%s)", deployment, type(error).__name__)
