"""Can this machine carry a run: versions, system, memory, disk, compiler, start-up files, limits, GPUs, clocks."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from forge_ray.doctor.finding import Finding, Status, Surroundings
from forge_ray.machine import supported
from forge_ray.store.files import Store

DISTRIBUTION = "forge-ray"
CHECKED = ("ray", "torch", "transformers", "deepspeed", "peft")
GIB = supported.GIB
KERNEL_SHARE = 1 / 16  # what Linux keeps of the installed memory for itself, and does not count
ROOM, LITTLE_ROOM = 20 * GIB, 2 * GIB
SHM = 2 * GIB
OPEN_FILES, FEW_OPEN_FILES = 65536, 4096
SKEW_S, WRONG_S = 1.0, 60.0
# Lines of .pth files that are known to run code, whole
KNOWN_PTH = {
    "distutils-precedence.pth": re.compile(
        r"import os; var = 'SETUPTOOLS_USE_DISTUTILS'; enabled = os\.environ\.get\(var, 'local'\) == 'local';"
        r" enabled and __import__\('_distutils_hack'\)(\.add_shim\(\))?;?"
    ),
    "_virtualenv.pth": re.compile(r"import _virtualenv"),
    "a1_coverage.pth": re.compile(r"import sys; exec\('try: import coverage; coverage\.process_startup\(\)[^']*'\)"),
}
EDITABLE = re.compile(r"import (__editable___\w+_finder); \1\.install\(\)")
STARTUP = ("sitecustomize.py", "usercustomize.py")


def versions(required: Mapping[str, str], installed: Mapping[str, str]) -> Iterator[Finding]:
    """`required`: name → specifiers of pyproject.toml; `installed`: name → version."""
    from packaging.specifiers import SpecifierSet

    for name, specifiers in required.items():
        version, rule = installed.get(name, ""), f"{name} {specifiers}"
        mend = supported.PYTHON_HINT if name == "python" else f"pip install '{name}{specifiers}'"
        if not version:
            yield Finding("version", "fail", f"{name} is not installed", rule, mend)
        elif not SpecifierSet(specifiers).contains(version.partition("+")[0], prereleases=True):
            yield Finding("version", "fail", f"{name} {version}", rule, mend)
        else:
            yield Finding("version", "ok", f"{name} {version}", rule)


def required_versions() -> dict[str, str]:
    from packaging.requirements import Requirement

    about = metadata.metadata(DISTRIBUTION)
    found = {"python": supported.PYTHON_SPECIFIER}
    for text in about.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        if requirement.name in CHECKED and requirement.marker is None:
            found[requirement.name] = str(requirement.specifier)
    return found


def installed_versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in CHECKED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def system(here: supported.Machine) -> Finding:
    """The wheels of torch and others are built for these systems alone."""
    problem = supported.system_problem(here)
    if problem:
        return Finding("system", "fail", problem.message, supported.SYSTEM_RULE, problem.hint)
    return Finding("system", "ok", str(here), supported.SYSTEM_RULE)


def installed_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory(installed: int, usable: int) -> Finding:
    """`usable` is less than `installed` where a container may not take all of it."""
    minimum = supported.MEMORY
    rule = f"{minimum / GIB:.0f} GiB of memory: the quick start's training takes half of it, Ray and the system the rest"
    limited = usable < installed
    amount = f"{usable / GIB:.1f} GiB"
    if limited:
        amount += f", the limit of this container (cgroup); the machine has {installed / GIB:.1f} GiB"
    if usable >= minimum * (1 - KERNEL_SHARE):
        return Finding("memory", "ok", amount, rule)
    mend = "use a machine with more memory"
    if limited and installed >= minimum * (1 - KERNEL_SHARE):
        mend = "docker run --memory=8g   # Kubernetes: resources.limits.memory: 8Gi"
    return Finding("memory", "fail" if usable < supported.LITTLE_MEMORY else "warn", amount, rule, mend)


def compiler(environ: Mapping[str, str], headers: Sequence[Path], use_gpu: bool) -> Finding:
    """A run without train.compile trains without one, so its absence is a warning."""
    needs = "a C compiler and Python.h" if use_gpu else "a C++20 compiler, Python.h and openssl"
    rule = f"train.compile (torch.compile) needs {needs} on every worker; other runs do without"
    problem = supported.compiler_problem(environ, headers, use_gpu)
    if problem:
        return Finding("compiler", "warn", problem.message, rule, problem.hint)
    return Finding("compiler", "ok", f"{supported.compiler(environ, use_gpu)} compiles Python.h", rule)


def startup_files(around: Surroundings) -> Finding:
    """Python runs the `import` lines of .pth files, and sitecustomize, in every process before anything of ours."""
    rule = "no file that Python runs at its start but known ones: a stolen package's usual way in"
    known: list[Path] = []
    strange: list[Path] = []
    for folder in around.site:
        for path in sorted(folder.glob("*.pth")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            code = [line.strip() for line in lines if line.startswith(("import ", "import\t"))]
            if not code:
                continue
            pattern = KNOWN_PTH.get(path.name, EDITABLE)
            (known if all(pattern.fullmatch(line) for line in code) else strange).append(path)
        strange += [folder / name for name in STARTUP if (folder / name).is_file()]
    if strange:
        shown = ", ".join(map(str, strange))
        return Finding("start-up files", "fail", shown, rule, f"cat {strange[0]}; pip show -f OWNER; rm {strange[0]}")
    return Finding("start-up files", "ok", f"{', '.join(path.name for path in known) or 'none'}: known", rule)


def disk(store: Store, free: int | None) -> Finding:
    rule = f"{ROOM // GIB} GiB free where the store lies"
    if free is None:
        return Finding("disk", "ok", f"{store.place} is not of this machine", rule)
    status: Status = "fail" if free < LITTLE_ROOM else "warn" if free < ROOM else "ok"
    found = f"{free / GIB:.1f} GiB free at {store.place}"
    return Finding("disk", status, found, rule, "" if status == "ok" else "forge data clean")


def shared_memory(around: Surroundings) -> Finding:
    """Ray's object store and the workers' collectives live there; containers get 64 MiB unless told."""
    rule = f"{around.shm} of {SHM // GIB} GiB or more"
    if not around.shm.is_dir():
        return Finding("shared memory", "fail", f"no {around.shm}", rule, f"mount -t tmpfs -o size=4g shm {around.shm}")
    size = shutil.disk_usage(around.shm).total
    if size < SHM:
        mend = f"mount -o remount,size=4g {around.shm}   # of a container: docker run --shm-size=4g"
        return Finding("shared memory", "warn", f"{size / GIB:.2f} GiB", rule, mend)
    return Finding("shared memory", "ok", f"{size / GIB:.1f} GiB", rule)


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
    """Each GPU multiplies two matrices; several of them need NCCL."""
    import torch

    rule = "each GPU computes, and NCCL is there to join them"
    if not has_gpu():
        return Finding("GPU", "ok", "none: training and serving on the CPU", rule)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    for index, name in enumerate(names):
        try:
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            if float((ones @ ones).sum()) != 64.0**3:
                return Finding("GPU", "fail", f"{index}: {name} computes wrongly", rule, f"nvidia-smi -q -i {index}")
        except RuntimeError as error:
            found = f"{index}: {name}: {str(error).splitlines()[0][:100]}"
            return Finding("GPU", "fail", found, rule, f"nvidia-smi -q -i {index}")
    if not torch.distributed.is_nccl_available():
        return Finding("GPU", "fail", f"{', '.join(names)}; torch without NCCL", rule, "pip install torch==2.13.0")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Finding("GPU", "ok", f"{', '.join(names)}; NCCL {nccl}", rule)


def clocks(offsets: Mapping[str, float]) -> Iterator[Finding]:
    """`offsets`: node → seconds that its clock is ahead of this one's."""
    rule = f"clocks of all nodes within {SKEW_S:.0f} s: events are ordered by them"
    for node, offset in sorted(offsets.items()):
        status: Status = "fail" if abs(offset) > WRONG_S else "warn" if abs(offset) > SKEW_S else "ok"
        mend = "" if status == "ok" else f"ssh {node} sudo chronyc makestep"
        yield Finding("clock", status, f"{node}: {offset:+.2f} s", rule, mend)


def clock_offsets(address: str) -> dict[str, float]:
    """Asks one task on each node of the cluster; the halves of the way are taken as equal."""
    from forge_ray.machine.cluster import connect

    connect(address)
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    found = {}
    ask: Any = ray.remote(num_cpus=0)(time.time)
    for node in ray.nodes():
        if node["Alive"]:
            task = ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            ray.get(task.remote())  # the worker's start is no part of the way
            before = time.time()
            there = ray.get(task.remote())
            found[node["NodeManagerAddress"]] = there - (before + time.time()) / 2
    return found
