"""Which folders of a store a process is using: marks in `work/uses/`, and files that processes of this machine hold open.

A mark's name says which process made it. It is written before the process looks for the folder, and `forge store prune`
looks at the marks before and after it moves a folder.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from forge_ray.errors import ForgeError
from forge_ray.records import canonical_json
from forge_ray.store import paths
from forge_ray.store.files import Store
from forge_ray.store.owner import is_alive, owner_mark

USES = paths.work("uses")
UNKNOWN_S = 7 * 86400.0  # a mark of another machine counts for so long


@contextmanager
def using(store: Store, what: str, *folders: str) -> Iterator[None]:
    """Mark folders of the store as in use, for `what`, until the block ends."""
    path = f"{USES}/{owner_mark()}-{uuid.uuid4().hex}.json"
    store.write(path, canonical_json({"what": what, "pid": os.getpid(), "folders": list(folders)}))
    try:
        yield
    finally:
        store.delete(path)


def is_living(store: Store, path: str, unknown_s: float = UNKNOWN_S) -> bool:
    """Whether the process that marked a path is running; one of another machine counts as running until the path has not
    been written for `unknown_s` seconds."""
    alive = is_alive(path)
    if alive is None:
        info = store.filesystem.get_file_info(store.path(path))
        return info.mtime_ns is not None and time.time() - info.mtime_ns / 1e9 < unknown_s
    return alive


def marked(store: Store) -> dict[str, str]:
    """Folder → by what it is in use, from the marks of processes that run."""
    folders: dict[str, str] = {}
    for path in store.list(USES):
        if not is_living(store, path):
            continue
        with contextlib.suppress(ForgeError, LookupError, TypeError):
            mark = store.read_json(path)
            folders |= dict.fromkeys(mark["folders"], f"in use: {mark['what']}, pid {mark['pid']}")
    return folders


def opened(store: Store) -> dict[str, str]:
    """File → which process holds it open or mapped, for processes of this machine whose files this user may see."""
    if not store.is_local:
        return {}
    root, files = f"{os.path.realpath(store.root)}/", {}
    for process in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if process.isdecimal() and int(process) != os.getpid():
            with contextlib.suppress(OSError):
                for name in _open_files(f"/proc/{process}", root):
                    files[name.removeprefix(root)] = f"in use: open in pid {process}"
    return files


def _open_files(process: str, root: str) -> Iterator[str]:
    for link in os.listdir(f"{process}/fd"):
        with contextlib.suppress(OSError):
            if (name := os.readlink(f"{process}/fd/{link}")).startswith(root):
                yield name
    maps = Path(process, "maps").read_text(errors="replace")
    for line in maps.splitlines() if root in maps else ():
        if root in line:
            yield root + line.partition(root)[2]


def above(path: str) -> list[str]:
    """A path and every folder that it lies in."""
    place = PurePosixPath(path)
    return [str(place), *(str(parent) for parent in place.parents if str(parent) != ".")]
