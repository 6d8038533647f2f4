"""The hardware of this machine: precision, GPUs, CPUs, memory (imports no torch)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forge_ray.errors import ConfigError
from forge_ray.machine import cgroup

CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, from its data sheet: `memory` in bytes, `flops` per second in bf16 on dense matrices, `bandwidth`
    of the memory in bytes per second."""

    memory: int
    flops: float
    bandwidth: float


# Part of the name that torch or Ray report → the largest GPU of that name; the first match counts. From data sheets.
GPUS = {
    "B200": Gpu(192 * 10**9, 2250e12, 8e12),
    "H200": Gpu(141 * 10**9, 989e12, 4.8e12),
    "H100": Gpu(94 * 10**9, 989e12, 3.35e12),
    "A100": Gpu(80 * 10**9, 312e12, 2.039e12),
    "L40S": Gpu(48 * 10**9, 362e12, 864e9),
    "L40": Gpu(48 * 10**9, 181e12, 864e9),
    "A10G": Gpu(24 * 10**9, 70e12, 600e9),
    "L4": Gpu(24 * 10**9, 121e12, 300e9),
}
# x86 instruction sets with bf16 arithmetic, and their name on Arm: without one, bf16 on a CPU is slower than fp32
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def resolve_precision(precision: str, use_gpu: bool) -> Literal["bf16", "fp32"]:
    """`auto` becomes bf16 on a GPU or a CPU with bf16 arithmetic, else fp32; `bf16` and `fp32` stay."""
    match precision:
        case "bf16":
            return "bf16"
        case "fp32":
            return "fp32"
        case "auto":
            return "bf16" if use_gpu or BF16_FLAGS & cpu_flags() else "fp32"
        case _:
            raise ConfigError(f"precision={precision!r} is not one of auto, bf16, fp32", hint="use auto")


def cpu_flags() -> frozenset[str]:
    """Feature flags of the first core; empty where the system does not report them (not Linux)."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def gpu_named(name: str) -> Gpu | None:
    """The GPU of this name; None if it is not in the table."""
    return next((gpu for part, gpu in GPUS.items() if part in name.upper()), None)


def main_memory() -> int:
    """Bytes of main memory, or the limit of this process's control groups if it is lower."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup.memory_limit()
    return installed if limit is None else min(installed, limit)


def available_memory(meminfo: Path = MEMINFO) -> int:
    """Bytes of main memory that no other program holds, or the limit of this process's control groups if it is lower."""
    try:
        values = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return min(main_memory(), int(values["MemAvailable"].split()[0]) << 10)
    except (OSError, ValueError, LookupError):  # not Linux
        return main_memory()


def cpus() -> int:
    """CPUs that this process may use, at least 1: those that it is bound to, or the quota of its control groups if that is
    lower. Part of a CPU does not count."""
    limit = cgroup.cpu_limit()
    return max(1, bound_cpus() if limit is None else min(bound_cpus(), int(limit)))


def bound_cpus() -> int:
    """CPUs that the scheduler may choose for this process (`taskset`, cpuset)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
