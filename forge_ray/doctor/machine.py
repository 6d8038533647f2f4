"""Machine checks: versions, system, memory, disk, compiler, limits, GPUs, clocks."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from forge_ray.doctor.finding import Finding, Status
from forge_ray.errors import first_line
from forge_ray.machine import supported
from forge_ray.store.files import Store

DISTRIBUTION = "forge-ray"
CHECKED = ("ray", "torch", "transformers", "deepspeed", "peft")
GIB = supported.GIB
KERNEL_SHARE = 1 / 16  # of the installed memory, which Linux reserves and does not report
FREE_DISK, LITTLE_FREE_DISK = 20 * GIB, 2 * GIB
OPEN_FILES, FEW_OPEN_FILES = 65536, 4096
SKEW_S, WRONG_S = 1.0, 60.0


def versions(required: Mapping[str, str], installed: Mapping[str, str]) -> Iterator[Finding]:
    """`required`: name → specifiers of pyproject.toml; `installed`: name → version."""
    from packaging.specifiers import SpecifierSet

    for name, specifiers in required.items():
        version, rule = installed.get(name, ""), f"{name} {specifiers}"
        fix = supported.PYTHON_HINT if name == "python" else f"pip install '{name}{specifiers}'"
        if not version:
            yield Finding("version", "fail", f"{name} is not installed", rule, fix)
        elif not SpecifierSet(specifiers).contains(version.partition("+")[0], prereleases=True):
            yield Finding("version", "fail", f"{name} {version}", rule, fix)
        else:
            yield Finding("version", "ok", f"{name} {version}", rule)


def required_versions() -> dict[str, str]:
    from packaging.requirements import Requirement

    about = metadata.metadata(DISTRIBUTION)
    required = {"python": supported.PYTHON_SPECIFIER}
    for text in about.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        if requirement.name in CHECKED and requirement.marker is None:
            required[requirement.name] = str(requirement.specifier)
    return required


def installed_versions() -> dict[str, str]:
    installed = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in CHECKED:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def system(here: supported.Machine) -> Finding:
    """The systems for which torch and other dependencies have wheels."""
    problem = supported.system_problem(here)
    if problem:
        return Finding("system", "fail", problem.message, supported.SYSTEM_RULE, problem.hint)
    return Finding("system", "ok", str(here), supported.SYSTEM_RULE)


def installed_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory(installed: int, usable: int) -> Finding:
    """`usable` is less than `installed` where the cgroup of a container limits it."""
    minimum = supported.MEMORY
    rule = f"{minimum / GIB:.0f} GiB of memory: half for the quick start's training, half for Ray and the system"
    limited = usable < installed
    amount = f"{usable / GIB:.1f} GiB"
    if limited:
        amount += f", the limit of this container (cgroup); the machine has {installed / GIB:.1f} GiB"
    if usable >= minimum * (1 - KERNEL_SHARE):
        return Finding("memory", "ok", amount, rule)
    fix = "use a machine with more memory"
    if limited and installed >= minimum * (1 - KERNEL_SHARE):
        fix = "docker run --memory=8g   # Kubernetes: resources.limits.memory: 8Gi"
    return Finding("memory", "fail" if usable < supported.LITTLE_MEMORY else "warn", amount, rule, fix)


def compiler(environ: Mapping[str, str], headers: Sequence[Path], use_gpu: bool) -> Finding:
    """A missing compiler is a warning, because only runs with train.compile need one."""
    needs = "a C compiler and Python.h" if use_gpu else "a C++20 compiler, Python.h and openssl"
    rule = f"train.compile (torch.compile) needs {needs} on every worker; other runs do not"
    problem = supported.compiler_problem(environ, headers, use_gpu)
    if problem:
        return Finding("compiler", "warn", problem.message, rule, problem.hint)
    return Finding("compiler", "ok", f"{supported.compiler(environ, use_gpu)} compiles Python.h", rule)


def disk(store: Store, free: int | None) -> Finding:
    rule = f"{FREE_DISK // GIB} GiB free on the disk of the store"
    if free is None:
        return Finding("disk", "ok", f"{store.place} is not on this machine", rule)
    status: Status = "fail" if free < LITTLE_FREE_DISK else "warn" if free < FREE_DISK else "ok"
    observed = f"{free / GIB:.1f} GiB free at {store.place}"
    return Finding("disk", status, observed, rule, "" if status == "ok" else "forge data clean")


def open_files(limit: int | None = None) -> Finding:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    rule = f"ulimit -n of {OPEN_FILES} or more"
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return Finding("open files", "ok", "unlimited" if soft == resource.RLIM_INFINITY else str(soft), rule)
    return Finding("open files", "fail" if soft < FEW_OPEN_FILES else "warn", str(soft), rule, f"ulimit -n {OPEN_FILES}")


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def gpus() -> Finding:
    """Multiply two matrices on each GPU, and check that NCCL is available."""
    import torch

    rule = "each GPU computes correctly, and NCCL is available"
    if not has_gpu():
        return Finding("GPU", "ok", "none: training and serving on the CPU", rule)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    for index, name in enumerate(names):
        try:
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            if float((ones @ ones).sum()) != 64.0**3:
                return Finding("GPU", "fail", f"{index}: {name} computes wrong results", rule, f"nvidia-smi -q -i {index}")
        except RuntimeError as error:
            observed = f"{index}: {name}: {first_line(error)[:100]}"
            return Finding("GPU", "fail", observed, rule, f"nvidia-smi -q -i {index}")
    if not torch.distributed.is_nccl_available():
        return Finding("GPU", "fail", f"{', '.join(names)}; torch without NCCL", rule, "pip install torch==2.13.0")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Finding("GPU", "ok", f"{', '.join(names)}; NCCL {nccl}", rule)


def clocks(offsets: Mapping[str, float]) -> Iterator[Finding]:
    """`offsets`: node → seconds by which its clock is ahead of this machine's."""
    rule = f"clocks of all nodes within {SKEW_S:.0f} s: events are ordered by them"
    for node, offset in sorted(offsets.items()):
        status: Status = "fail" if abs(offset) > WRONG_S else "warn" if abs(offset) > SKEW_S else "ok"
        fix = "" if status == "ok" else f"ssh {node} sudo chronyc makestep"
        yield Finding("clock", status, f"{node}: {offset:+.2f} s", rule, fix)


def clock_offsets(address: str) -> dict[str, float]:
    """Clock offset of each node, measured by a task on it; the times there and back are assumed to be equal."""
    from forge_ray.machine.cluster import connect

    connect(address)
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    offsets = {}
    ask: Any = ray.remote(num_cpus=0)(time.time)
    for node in ray.nodes():
        if node["Alive"]:
            task = ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            ray.get(task.remote())  # so that the start of the worker is not measured
            before = time.time()
            there = ray.get(task.remote())
            offsets[node["NodeManagerAddress"]] = there - (before + time.time()) / 2
    return offsets
