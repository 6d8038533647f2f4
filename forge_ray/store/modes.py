"""Permissions of what is written: for its owner alone, unless a group shares the store.

The umask is a process's own, so each process that opens a local store sets it, workers and replicas too: checkpoints and
tables are written by libraries that know no other way.
"""

from __future__ import annotations

import os
from pathlib import Path

OWNER, GROUP = 0o077, 0o007
GROUP_WRITES = 0o020

_at_start: int | None = None  # the umask before the first store was opened


def is_shared(root: Path) -> bool:
    """Whether a group shares the store: its folder has the setgid bit, or FORGE_GROUP=1 is set."""
    try:
        return os.environ.get("FORGE_GROUP") == "1" or bool(root.stat().st_mode & 0o2000)
    except OSError:
        return False


def umask_of(root: Path, at_start: int) -> int:
    """Nothing for others; for a group that shares the store to read, and to write where the umask at the start let it."""
    return GROUP | (at_start & GROUP_WRITES) if is_shared(root) else OWNER


def set_umask(root: Path) -> None:
    """From now on this process creates files and folders with the permissions of this store."""
    global _at_start
    before = os.umask(OWNER)
    if _at_start is None:
        _at_start = before
    os.umask(umask_of(root, _at_start))


def make_root(root: Path) -> None:
    """Create the folder of a store; of one that a group shares, so that what is written in it belongs to that group."""
    if root.is_dir():
        return
    root.mkdir(parents=True, exist_ok=True)
    if is_shared(root):
        root.chmod(root.stat().st_mode | 0o2000)


def publish_mode(folder: Path) -> int:
    """Of a folder that was made private and is complete now; a setgid bit that it inherited stays."""
    mask = os.umask(OWNER)
    os.umask(mask)
    return 0o777 & ~mask | folder.stat().st_mode & 0o2000
