"""Removal of a folder to free disk space: the event that says so, and why something is no longer there.

The subject of a removal event is the path of the folder. The record of what lay there stays.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow.fs as pafs

from forge_ray.errors import NotFound
from forge_ray.records import Event
from forge_ray.store import signing
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import MANIFEST, Store, fsync_dir
from forge_ray.store.owner import owner_mark
from forge_ray.store.standing import Standing

ASIDE = ".removed-"
NAMED = 100  # paths that an event lists
_ASIDE = re.compile(re.escape(ASIDE) + r"(?P<name>.+?)-~")


def removal(paths: tuple[str, ...], num_bytes: int, why: str) -> Event:
    """The event for what was removed together; its subject is the first path."""
    data = {"action": "removed", "bytes": num_bytes, "why": why, "by": signing.who()}
    more = {"num_paths": len(paths), "paths": [original(path) for path in paths[:NAMED]]} if len(paths) > 1 else {}
    return Event(kind="removal", subject=original(paths[0]), data=data | more)


def original(path: str) -> str:
    """The path under which a folder lay before its removal was begun; any other path as it is."""
    place = PurePosixPath(path)
    moved = _ASIDE.match(place.name)
    return str(place.with_name(moved["name"])) if moved else path


def why_absent(standing: Standing, path: str) -> str:
    """When, by whom and why a folder was removed; "" where it is there, or no event that counts says so."""
    if standing.store.exists(path):
        return ""
    events = standing.events("removal", path)
    return f"removed on {events[-1].at[:10]} by {events[-1].data['by']}: {events[-1].data['why']}" if events else ""


def require(catalog: Catalog, *folders: str) -> None:
    """Raise `NotFound` for the first of the folders that was removed."""
    for folder in folders:
        if reason := why_absent(catalog.standing, folder):
            raise NotFound(f"{folder} is not in the store any more ({reason})", hint=remedy(folder))


def remedy(folder: str) -> str:
    """How the content of a removed folder can be had again."""
    top, _, rest = folder.partition("/")
    run = rest.partition("/")[0]
    return {
        "datasets": "`forge data prepare` builds it again from its sources",
        "models": "import it or train it again, or restore it from a backup",
        "runs": f"`forge reproduce {run} --keep` trains the same weights again while its dataset and base model are there",
        "evals": "restore it from a backup",
    }.get(top, "restore it from a backup")


@dataclass(frozen=True)
class Aside:
    """A folder or file that was taken out of sight. `path`: where it lay; `place`: where it is now; `manifest`: the bytes of
    its manifest, on an object store."""

    path: str
    place: str
    manifest: bytes | None = None


def set_aside(store: Store, path: str) -> Aside:
    """Take a folder or file out of sight in one step, so that a process killed later leaves a whole store. On an object
    store, which has no rename, its manifest is deleted instead. Where this fails, everything lies as before."""
    if not store.is_local:
        name = f"{path}/{MANIFEST}"
        aside = Aside(path, path, store.read(name) if store.exists(name) else None)
        try:
            store.delete(name)
        except OSError:  # the object may be deleted all the same
            put_back(store, aside)
            raise
        return aside
    source = store.local(path)
    if source.name.startswith("."):
        return Aside(path, path)  # half-built: no reader looks at it
    target = source.with_name(f"{ASIDE}{source.name}-{owner_mark()}")
    aside = Aside(path, str(PurePosixPath(path).with_name(target.name)))
    os.rename(source, target)
    try:
        fsync_dir(target.parent)
    except OSError:
        put_back(store, aside)
        raise
    return aside


def put_back(store: Store, aside: Aside) -> None:
    """Undo `set_aside`."""
    if aside.place != aside.path:
        os.rename(store.local(aside.place), store.local(aside.path))
    if aside.manifest is not None:
        store.write(f"{aside.path}/{MANIFEST}", aside.manifest)


def delete_aside(store: Store, aside: Aside) -> None:
    """Delete what was set aside, its manifest first: what is left after a kill is never taken for a whole folder."""
    if not store.is_local:
        is_folder = store.filesystem.get_file_info(store.path(aside.place)).type == pafs.FileType.Directory
        return store.delete_dir(aside.place) if is_folder else store.delete(aside.place)
    place = store.local(aside.place)
    if place.is_dir() and not place.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place / MANIFEST)
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
