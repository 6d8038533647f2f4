"""Folders of exactly the listed files: nothing beside them, no links, no name that leads out.

Whoever can write files of a store can add one: libraries open what lies in a folder, by names and patterns of their own, and
no digest covers what no manifest lists. So a folder is opened only where it holds its listed files and nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Collection
from pathlib import Path

from forge_ray.errors import StoreError
from forge_ray.file_names import relative_path
from forge_ray.records import FileEntry

REPLACE_LINK = "put the file itself in its place"
NFS_REMOVED = re.compile(r"\.nfs[0-9a-f]+")  # an NFS client's name for a removed file that a process still reads


def path_inside(folder: Path, relative: str) -> Path:
    """Where a file that a manifest names lies below `folder`. Raises `StoreError` for a name that could lead out of it, and
    for one that passes a link."""
    path = folder
    for part in relative_path(relative).split("/"):
        path = path / part
        if path.is_symlink():
            raise StoreError(f"{path} is a link; a published folder holds files alone", hint=REPLACE_LINK)
    return path


def copy_file(folder: Path, relative: str, target: Path) -> None:
    """Copy one listed file of `folder` to the same name below `target`; neither side follows a link."""
    copy = path_inside(target, relative)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path_inside(folder, relative), copy)


def link_file(folder: Path, relative: str, target: Path) -> None:
    """Give one listed file of `folder` the same name below `target` too: a hard link, or a copy where the file system has
    none. Published files are never written to, so both names keep the same bytes. Neither side follows a symbolic link."""
    name = path_inside(target, relative)
    name.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path_inside(folder, relative), name, follow_symlinks=False)
    except OSError:
        copy_file(folder, relative, target)


def others(folder: Path, names: Collection[str]) -> list[Path]:
    """What lies in `folder` and is not one of `names` as a regular file: unlisted files, links, devices, pipes, sockets.
    Empty folders are not among them."""
    unlisted = []
    for place, folders, files in os.walk(folder, onerror=_unreadable):
        for name in [*folders, *files]:
            path = Path(place, name)
            mode = path.lstat().st_mode
            is_listed = stat.S_ISREG(mode) and (path.relative_to(folder).as_posix() in names or NFS_REMOVED.fullmatch(name))
            if not (stat.S_ISDIR(mode) or is_listed):
                unlisted.append(path)
    return sorted(unlisted)


def _unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise StoreError(f"{error.filename} cannot be listed: {error.strerror}", hint="check the folder's permissions")


def refuse_others(folder: Path, names: Collection[str]) -> None:
    """Raise `StoreError` for the first thing in `folder` that is not one of `names`."""
    for path in others(folder, names):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise StoreError(f"{path} is a link; a published folder holds files alone", hint=REPLACE_LINK)
        what = "is not listed in its manifest" if stat.S_ISREG(mode) else "is not a regular file"
        raise StoreError(f"{path} {what}; a published folder holds exactly the listed files", hint=f"remove it: rm '{path}'")


def require_same(manifest: str, listed: tuple[FileEntry, ...], files: tuple[FileEntry, ...]) -> None:
    """Raise `StoreError` unless a manifest lists exactly the files of its record."""
    one, other = ({entry.path: entry for entry in entries} for entries in (listed, files))
    names = one.keys() | other.keys()
    if different := sorted(name for name in names if one.get(name) != other.get(name)):
        raise StoreError(
            f"{manifest} does not list the files of its record: {different[0]} differs ({len(different)} of {len(names)})",
            hint="restore the folder from a backup, or import or build it again",
        )
