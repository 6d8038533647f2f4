"""The environment of a run: the environment lock and the identity of the code.

A lock is canonical JSON, stored once as `environments/<sha256>.json`: every installed distribution, the interpreter, the
hardware, the number of threads and the variables that affect results. Two runs with equal locks, code, data and settings
compute equal weights.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from forge_ray.errors import StoreError
from forge_ray.machine.hardware import CPUINFO, cpu_flags
from forge_ray.records import canonical_json, hex_of
from forge_ray.store import paths
from forge_ray.store.files import Store

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "pyarrow", "numpy", "tokenizers", "safetensors")
DRIVER = Path("/proc/driver/nvidia/version")
# Instruction sets by which torch, oneDNN and MKL choose a kernel: each kernel adds in its own order.
KERNEL_FLAGS = frozenset(
    {
        *("sse4_2", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
        *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
        *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16", "svei8mm"),
    }
)
# Environment variables that can change the result of a sum, or the order of a set.
SWITCHES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_NUM_THREADS",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_NUM_THREADS",
    "PYTHONHASHSEED",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
GIT_S = 5.0
PACKAGE = Path(__file__).parents[1]  # all of forge_ray, not this package alone


@functools.cache
def installed() -> dict[str, dict[str, str]]:
    """Distribution → version and sha256 of its RECORD, the list of its files with digests; "" if it has none."""
    packages = {}
    own = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # once imported, Ray puts its bundled copies of packages, in folders below `own`, first on the path
    path = [entry for entry in sys.path if not any(str(parent) in own for parent in Path(entry).parents)]
    for item in distributions(path=path):
        name = item.metadata["Name"]
        if name and name.lower() not in packages:  # the first on the path is the one that is imported
            listed = item.read_text("RECORD")
            packages[name.lower()] = {
                "version": item.version,
                "record": hashlib.sha256(listed.encode()).hexdigest() if listed else "",
            }
    return dict(sorted(packages.items()))


def hardware() -> dict[str, Any]:
    """The kind of this machine's hardware as far as it affects results, not its amount."""
    import torch

    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_flags": sorted(KERNEL_FLAGS & cpu_flags()),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "gpus": [],
    }
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
        version = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
        facts |= {
            "gpus": sorted(names),
            "driver": _driver(),
            "cuda": torch.version.cuda or "",
            "cudnn": str(torch.backends.cudnn.version() or ""),
            "nccl": ".".join(str(part) for part in version),
        }
    return facts


def _cpu_name() -> str:
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    named = re.search(r"^(?:model name|CPU part)\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor()


def _driver() -> str:
    try:
        match = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER.read_text())
    except OSError:
        return ""
    return match[0] if match else ""


def lock() -> dict[str, Any]:
    """The lock of this process as it is now; call it after the number of threads has been set."""
    import torch

    return {
        "format": 1,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.system(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "packages": installed(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "torch": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "switches": {name: os.environ[name] for name in SWITCHES if name in os.environ},
    }


def keep(store: Store) -> str:
    """Write this process's lock to the store unless it is there; returns its digest."""
    data = canonical_json(lock())
    hexadecimal = hashlib.sha256(data).hexdigest()
    store.write_once(_path(hexadecimal), data)
    return f"sha256:{hexadecimal}"


def read(store: Store, digest: str) -> dict[str, Any]:
    """A stored lock; empty where there is none, as for runs that are older than locks. Raises `StoreError` if it does not
    match its digest."""
    path = _path(hex_of(digest))
    if not digest or not store.exists(path):
        return {}
    data = store.read(path)
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        raise StoreError(
            f"{path} does not match the digest in its name: it was altered", hint="restore the file from a backup"
        )
    value: dict[str, Any] = json.loads(data)
    return value


def _path(hexadecimal: str) -> str:
    return paths.environment(hexadecimal)


def versions(locked: dict[str, Any] | None = None) -> dict[str, str]:
    """Versions of the packages that affect results, from a lock, or else of this process."""
    packages = locked["packages"] if locked else installed()
    python = locked["python"].rpartition(" ")[2] if locked else platform.python_version()
    machine = locked["hardware"]["machine"] if locked else platform.machine()
    names = {name: packages.get(name, {}).get("version", "absent") for name in PACKAGES}
    return {"python": python, "machine": machine, **names}


@functools.cache
def code_digest() -> str:
    """A digest of the paths and bytes of forge_ray's modules."""
    root = PACKAGE
    hasher = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        hasher.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return "sha256:" + hasher.hexdigest()


@functools.cache
def code_commit(root: Path = PACKAGE) -> str:
    """The git commit of this code, with `-dirty` appended if it was modified; "" if it is not a checkout."""
    try:
        _git(root, "ls-files", "--error-unmatch", "__init__.py")  # else the checkout is of another project that contains it
        return _git(root, "rev-parse", "HEAD") + ("-dirty" if _git(root, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-c", "core.fsmonitor=false", *words],  # so that no setting of the checkout starts a program
        cwd=folder,
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        capture_output=True,
        text=True,
        timeout=GIT_S,
        check=True,
    ).stdout.strip()
