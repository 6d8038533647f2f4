"""What this machine computes in (level 1; imports no torch)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from forge_ray.errors import ConfigError

CPUINFO = Path("/proc/cpuinfo")
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
    """Feature flags of the first core; empty where the system does not tell (not Linux)."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
