"""Everything that lies in a store, hidden or not, whether a manifest or a record tells of it or not."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from forge_ray.store.files import Store


@dataclass(frozen=True)
class StoredFile:
    """One name of a file, relative to the store. `number` and `num_names` are its inode and the names that it has on a local
    store, hard links included; on others 0 and 1. `link`: where a symbolic link leads, which is not followed."""

    path: str
    size: int
    number: tuple[int, int] = (0, 0)
    num_names: int = 1
    link: str = ""
    modified: float = 0.0  # seconds since 1970


def every_file(store: Store, relative: str = "") -> Iterator[StoredFile]:
    """Every file below a folder of the store, folder by folder; of the whole store without one. What is removed meanwhile is
    left out."""
    if store.is_local:
        yield from _local(Path(store.root), Path(store.root, relative))
        return
    place = store.path(relative) if relative else store.root
    selector = pafs.FileSelector(place, allow_not_found=True, recursive=True)
    for info in sorted(store.filesystem.get_file_info(selector), key=lambda info: info.path):
        if info.type == pafs.FileType.File:
            name = info.path.removeprefix(store.root + "/")
            yield StoredFile(name, int(info.size), modified=(info.mtime_ns or 0) / 1e9)


def _local(root: Path, folder: Path) -> Iterator[StoredFile]:
    for place, folders, files in os.walk(folder):
        folders.sort()
        for path in sorted(Path(place, name) for name in [*files, *folders]):
            with contextlib.suppress(FileNotFoundError):
                info = path.lstat()
                if stat.S_ISDIR(info.st_mode):
                    continue
                link = os.readlink(path) if stat.S_ISLNK(info.st_mode) else ""
                number = (info.st_dev, info.st_ino)
                name = path.relative_to(root).as_posix()
                yield StoredFile(name, info.st_size, number, info.st_nlink, link, info.st_mtime)


def folders(store: Store, relative: str) -> list[str]:
    """The folders directly below one, hidden ones too, as paths of the store."""
    selector = pafs.FileSelector(store.path(relative), allow_not_found=True)
    infos = store.filesystem.get_file_info(selector)
    return sorted(info.path.removeprefix(store.root + "/") for info in infos if info.type == pafs.FileType.Directory)
