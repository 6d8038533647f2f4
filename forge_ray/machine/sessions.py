"""Ray's session folders on this machine, and the objects that Ray wrote there when its memory was full.

Such objects can be batches of tokens. A process that works for a store leaves a note in the folder of its session, by which
what a killed session left is distinguished from that of other programs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from forge_ray.machine.ray_internals import SPILLED, session_folder
from forge_ray.store.files import Store

NOTES = "forge_ray-stores"


@dataclass(frozen=True)
class SpillFolder:
    """A folder of spilled objects: whether its session runs, and whether it worked for the store."""

    folder: Path
    is_running: bool
    is_of_store: bool


def note(store: Store) -> None:
    """Write into this process's session folder that it works for the store, if it is on this machine."""
    folder = session_folder()
    with contextlib.suppress(OSError):  # of another user, or of a session on another machine
        if folder is not None and folder.is_dir():
            (folder / NOTES).mkdir(exist_ok=True)
            (folder / NOTES / _name(store)).touch()


def spilled(store: Store) -> Iterator[SpillFolder]:
    """The folders with spilled objects of this user's sessions."""
    commands = _commands()
    for session in _sessions():
        for folder in sorted(session.glob(f"{SPILLED}*")):
            if any(folder.iterdir()):
                name = re.compile(re.escape(session.name) + r"(?![\w-])")  # no longer name that begins with it
                is_running = any(map(name.search, commands))
                yield SpillFolder(folder, is_running, (session / NOTES / _name(store)).exists())


def _sessions() -> list[Path]:
    current = session_folder()
    roots = {current.parent} if current else set()
    roots |= {Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")}
    folders = [path for root in roots if root.is_dir() for path in root.glob("session_*") if not path.is_symlink()]
    return sorted(path for path in folders if path.is_dir() and path.stat().st_uid == os.getuid())


def _commands() -> list[str]:
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands.append(path.read_bytes().decode(errors="replace"))
    return commands


def _name(store: Store) -> str:
    return hashlib.sha256(store.uri.encode()).hexdigest()[:16]
