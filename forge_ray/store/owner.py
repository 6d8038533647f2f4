"""Which process half-written files are of: their names say it, so that what a killed process left is not taken for what a
living one is writing."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path

MARK = re.compile(r"~(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.(?P<started>\d*)~")


def owner_mark() -> str:
    """Part of a file name that says which process made it: machine and start of the system, process id, its start."""
    return f"~{_host()}.{os.getpid()}.{started(os.getpid())}~"


def is_alive(name: str) -> bool | None:
    """Whether the process that a name was marked by is running; None where that is unknown, for it ran on another
    machine, before this one was started again, or in a version that did not mark names."""
    mark = MARK.search(name)
    if mark is None or mark["host"] != _host():
        return None
    return started(int(mark["pid"])) == mark["started"] != ""


def boot() -> str:
    """Tells containers and restarts apart that have the same host name; "" where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def started(pid: int) -> str:
    """When the process was started, in the kernel's ticks; "" where there is no such process. Numbers are used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]  # what is left of an ended process until its parent has asked


def _host() -> str:
    return hashlib.sha256(f"{platform.node()}/{boot()}".encode()).hexdigest()[:8]
