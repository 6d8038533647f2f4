"""Scratch folders of this machine, outside the store: their names say which process they are of, so that what a killed one
left is found."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forge_ray.store.owner import is_alive, owner_mark

PREFIX = "forge-"
KINDS = ("stage", "save", "run", "reshard", "adapter", "adapters", "merged")  # what rows or weights pass through


def scratch_folder(kind: str) -> Path:
    """A new folder for rows or weights on their way, private to this user; its maker removes it."""
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-{owner_mark()}-"))


@contextmanager
def scratch(kind: str) -> Iterator[Path]:
    """A scratch folder that goes with the block."""
    folder = scratch_folder(kind)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def abandoned() -> tuple[list[Path], list[Path]]:
    """Scratch folders of this user whose processes have ended, and those whose process is unknown."""
    folder = Path(tempfile.gettempdir())
    own = sorted(path for kind in KINDS for path in folder.glob(f"{PREFIX}{kind}-*") if _is_own(path))
    return [path for path in own if is_alive(path.name) is False], [path for path in own if is_alive(path.name) is None]


def _is_own(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid() and path.is_dir() and not path.is_symlink()
    except OSError:
        return False
