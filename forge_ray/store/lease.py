"""Leases: small files that a living process renews, so that every machine that reads the store can see that it lives.

A lease names its holder, and its age is the time since it was last written. On the machine of the holder the process itself
says whether it lives; elsewhere the age does. A machine that is cut off looks like one that has crashed, so a lease is a
hint: whoever relies on order needs a fence of its own (`train/attempts.py`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from forge_ray.errors import NotFound, StoreError
from forge_ray.records import Frozen, canonical_json, utc_now
from forge_ray.store.files import Store
from forge_ray.store.owner import boot, started


class Lease(Frozen):
    """The holder of a lease. `started`: the start of its process in the kernel's ticks; `at`: when it took the lease, by its
    own clock."""

    token: str
    host: str
    boot: str
    pid: int
    started: str
    at: str


def new_lease() -> Lease:
    """A lease of this process that is not written yet."""
    return Lease(
        token=uuid.uuid4().hex,
        host=platform.node(),
        boot=boot(),
        pid=os.getpid(),
        started=started(os.getpid()),
        at=utc_now(),
    )


def read(store: Store, path: str) -> Lease | None:
    """The lease at `path`; None where there is none, or what is there cannot be read as one."""
    try:
        return Lease.model_validate(store.read_json(path))
    except (NotFound, StoreError, ValidationError):
        return None


def write(store: Store, path: str, lease: Lease) -> None:
    store.write(path, canonical_json(lease.model_dump(mode="json")))


def take(store: Store, path: str, lease: Lease, valid_s: float) -> str:
    """Write the lease, unless another holder lives: then the return value says who in words; "" where it is written."""
    if store.create(path, canonical_json(lease.model_dump(mode="json"))):
        return ""
    other = read(store, path)
    if other and (sign := sign_of_life(store, path, other, valid_s)):
        return f"{in_words(other)}, {sign}"
    write(store, path, lease)
    return ""


@contextmanager
def held(store: Store, path: str, lease: Lease, every_s: float) -> Iterator[None]:
    """Renew a lease that this process has taken, every `every_s` seconds in a thread, until the block ends: then it is
    deleted. Once another holder's is read in its place, it is neither renewed nor deleted."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(every_s):
            with contextlib.suppress(OSError, NotFound, StoreError):  # an outage of the store does not end the holder
                if not is_held(store, path, lease):
                    return
                write(store, path, lease)

    threading.Thread(target=renew, name="forge-lease", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        release(store, path, lease)


def release(store: Store, path: str, lease: Lease) -> None:
    """Delete the lease, unless another holder has taken it over."""
    if is_held(store, path, lease):
        store.delete(path)


def is_held(store: Store, path: str, lease: Lease) -> bool:
    holder = read(store, path)
    return holder is not None and holder.token == lease.token


def sign_of_life(store: Store, path: str, holder: Lease, valid_s: float) -> str:
    """In words why the holder of the lease at `path` counts as living; "" where it is dead, or was not seen for `valid_s`
    seconds on another machine."""
    is_running = runs_here(holder)
    if is_running is not None:
        return "which is running" if is_running else ""
    seconds = age_s(store, path)
    return last_seen(seconds) if seconds < valid_s else ""


def runs_here(holder: Lease) -> bool | None:
    """Whether the process of the holder runs on this machine; None for one of another machine, or from before this one was
    started again."""
    if holder.host != platform.node() or holder.boot != boot():
        return None
    return started(holder.pid) == holder.started != ""


def in_words(holder: Lease) -> str:
    return f"pid {holder.pid} on {holder.host}, since {holder.at}"


def last_seen(seconds: float) -> str:
    return f"last seen {seconds:.0f} s ago"


def age_s(store: Store, path: str, may_write: bool = True) -> float:
    """Seconds since the lease was written, never negative. By the clock of the store, which a small file asks for, because
    the clocks of two machines may differ; by this machine's where the store may not be written."""
    now = _now_of(store, path.rsplit("/", 1)[0]) if may_write else None
    written = store.filesystem.get_file_info(store.path(path)).mtime_ns
    return max(0.0, float((now or time.time_ns()) - (written or 0)) / 1e9)


def _now_of(store: Store, folder: str) -> int | None:
    """The clock of the store in ns since 1970; None where this process may not write there."""
    probe = f"{folder}/.clock-{uuid.uuid4().hex}"
    try:
        store.write(probe, b"")
        now: int | None = store.filesystem.get_file_info(store.path(probe)).mtime_ns
        store.delete(probe)
    except OSError:
        return None
    return now
