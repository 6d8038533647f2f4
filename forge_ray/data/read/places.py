"""Single files of a source: regular ones, their names, and what lies next to them."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import quote

import pyarrow.fs as pafs

from forge_ray.data.read.lines import filesystem_of, is_inside
from forge_ray.errors import ConfigError, DataError
from forge_ray.store.uris import has_secret

KINDS_OF_FILES = {
    0: "is a link to nothing",
    stat.S_IFIFO: "is a pipe, not a regular file",
    stat.S_IFSOCK: "is a socket, not a regular file",
    stat.S_IFCHR: "is a device, not a regular file",
    stat.S_IFBLK: "is a device, not a regular file",
}


def require_regular(path: str, folder: str) -> None:
    """Refuse what is not a regular file of the folder: rows come from elsewhere, and a link among them from anywhere."""
    target = os.path.realpath(path)
    if not is_inside(path, folder):
        raise DataError(
            f"data.sources: {display_name(path)!r} is a link to {target!r},"
            f" which is not in the folder of its source ({folder})",
            hint=f"name {target} itself as a source, or put a copy in place of the link",
        )
    kind = stat.S_IFMT(os.stat(path).st_mode) if os.path.exists(path) else 0
    if kind != stat.S_IFREG:
        what = KINDS_OF_FILES.get(kind, "is not a regular file")
        raise DataError(f"data.sources: {display_name(path)!r} {what}", hint="name regular files, or match fewer files")


def refuse_secrets(uri: str) -> None:
    if has_secret(uri):
        raise ConfigError(
            "data.sources: a URI carries a user name or password, and sources are recorded with the dataset",
            hint="set them in the environment, for S3 as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )


def display_name(path: str) -> str:
    return path.removeprefix(str(Path.cwd()) + "/")


def inside(folder: str, name: str) -> str:
    """The path of a file in a folder, which may be a URI with options."""
    place, mark, options = folder.partition("?") if "://" in folder else (folder, "", "")
    return f"{place.rstrip('/')}/{quote(name) if '://' in folder else name}{mark}{options}"


def is_file(folder: str, name: str) -> bool:
    filesystem, inner = filesystem_of(inside(folder, name))
    return bool(filesystem.get_file_info(inner).type == pafs.FileType.File)
