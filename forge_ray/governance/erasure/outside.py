"""Places of this machine outside the store where rows or weights can lie: the cache of a remote store, scratch folders that
a killed process left, objects that Ray spilled to disk. Those of other machines are not reached."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from forge_ray.machine import sessions
from forge_ray.store import paths
from forge_ray.store.files import Store
from forge_ray.store.home import cache_folder
from forge_ray.store.owner import is_alive
from forge_ray.store.scratch import abandoned


@dataclass
class OutsidePlaces:
    """`removed`: folders that were deleted; `left`: folder → why it was not."""

    removed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def clear(store: Store, purged: Iterable[str]) -> OutsidePlaces:
    """Delete what lies there of the store and of processes that ended. `purged`: files that were deleted from the store."""
    places = OutsidePlaces()
    for folder in cached(store, purged):
        _remove(folder, places)
    ended, unclear = abandoned()
    for folder in ended:
        _remove(folder, places)
    places.left |= {str(folder): "a scratch folder whose process is unknown" for folder in unclear}
    for spill in sessions.spilled(store):
        if spill.is_running:
            places.left[str(spill.folder)] = "objects that a running Ray session of this store spilled; they go when it ends"
        elif spill.is_of_store:
            _remove(spill.folder, places)
        else:
            places.left[str(spill.folder)] = "objects that a Ray session spilled which may be of another program"
    return places


def cached(store: Store, purged: Iterable[str]) -> list[Path]:
    """Copies of folders of a remote store in this user's cache that hold deleted files, and downloads that were cut off."""
    if store.is_local:
        return []
    cache = cache_folder()
    names = {hashlib.sha256(f"{store.uri}/{folder}".encode()).hexdigest()[:16] for path in purged for folder in _above(path)}
    copies = [cache / name for name in sorted(names) if (cache / name).exists()]
    partial = [path for path in cache.glob(".partial-*") if path.name.split("-")[1] in names or is_alive(path.name) is False]
    return [*copies, *sorted(partial)]


def _above(path: str) -> Iterable[str]:
    parts = path.split("/")
    return ("/".join(parts[:number]) for number in range(1, len(parts)))


def purged_files(store: Store) -> list[str]:
    """Every file that erasures have deleted from the store, from their lists."""
    lists = [path for path in store.list(paths.erasure(), recursive=True) if path.endswith("/purged.json")]
    return [entry["path"] for path in lists for entry in store.read_json(path)["files"]]


def _remove(place: Path, places: OutsidePlaces) -> None:
    try:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    except OSError as error:
        places.left[str(place)] = f"it could not be deleted: {error.strerror}"
    else:
        places.removed.append(str(place))
