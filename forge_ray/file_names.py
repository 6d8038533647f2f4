"""Names of files as others wrote them."""

from __future__ import annotations

import re

from forge_ray.errors import StoreError


def relative_path(path: str) -> str:
    """`path` itself, if it names one file below whatever folder it is joined with, on every system; else `StoreError`.
    Whatever was written by somebody else is held to this before it is joined with a folder."""
    parts = path.split("/")
    if set(parts) & {"", ".", ".."} or "\\" in path or not path.isprintable() or re.match("[A-Za-z]:", path):
        raise StoreError(
            f"{path!r} does not name a file below a folder: a manifest names files by relative paths with `/`, without"
            " empty parts, `.` or `..`, backslashes, drive letters and control characters",
            hint="the manifest or record was changed, or written by another tool: restore it from a backup",
        )
    return path
