"""The result of a check, and the surroundings that it examines."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from forge_ray.store.home import home, system_temp

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check: what is (`observed`), what should be (`rule`), and the command that fixes it ("" where
    nothing needs fixing)."""

    check: str
    status: Status
    observed: str
    rule: str
    fix: str = ""


@dataclass(frozen=True)
class Surroundings:
    """What the checks read: the environment of this process, and the folders in which the system describes itself."""

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    home: Path = field(default_factory=home)
    proc: Path = Path("/proc")
    shm: Path = Path("/dev/shm")
    site: tuple[Path, ...] = field(default_factory=lambda: site_folders())
    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    tmp: Path = field(default_factory=system_temp)


def site_folders() -> tuple[Path, ...]:
    """Folders whose .pth files Python reads at its start."""
    names = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    if site.ENABLE_USER_SITE:
        names.add(site.getusersitepackages())
    return tuple(sorted(Path(name) for name in names if Path(name).is_dir() and name != sys.prefix))


def is_private(path: Path) -> bool:
    """Whether group and others have no permission at all."""
    return not path.stat().st_mode & 0o077


def mode_of(path: Path) -> str:
    return f"{path.stat().st_mode & 0o7777:o}"
