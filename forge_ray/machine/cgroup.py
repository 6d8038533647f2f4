"""The limits of the control groups that this process is in: its own and every one around it.

A job of Slurm or systemd has a group of its own below the root; a container sees its own as the root, or sees the path that
the host has for it and finds only the root. So every folder on the way up is read, and the lowest limit counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def memory_limit(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes of main memory that the groups allow; None without a limit. Version 1 writes a huge number for none."""
    limits = []
    for folder in _groups("memory", proc, cgroups):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # absent, or `max`
                limits.append(int((folder / name).read_text()))
    return min(limits, default=None)


def cpu_limit(proc: Path = PROC, cgroups: Path = CGROUPS) -> float | None:
    """CPUs whose time the groups allow, such as 1.5; None without a limit."""
    limits = []
    for folder in _groups("cpu", proc, cgroups):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            limits.append(int(quota) / int(period))  # a quota of `max` is none
        with suppress(OSError, ValueError):
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            limits += [int(quota) / int(period)] if int(quota) > 0 else []  # -1 is none
    return min(limits, default=None)


def _groups(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """The folders of this process's groups for a controller, of both versions, with those around them."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2; `unified` where version 1 has the controllers
            roots = (cgroups, cgroups / "unified")
        elif controller in controllers.split(","):
            roots = (cgroups / controllers, cgroups / controller)
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        for root in roots:
            yield from (root / part for part in (inside, *inside.parents) if ".." not in part.parts)
