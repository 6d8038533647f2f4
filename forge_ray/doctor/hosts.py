"""Checks of what a container gives a process: a home folder, a name of its user, CPUs, shared memory, proxies."""

from __future__ import annotations

import os
import shutil

from forge_ray.doctor.finding import Finding, Status, Surroundings
from forge_ray.machine.cluster import LITTLE_SHARED_MEMORY, LOCAL_CPUS
from forge_ray.machine.proxies import LOOPBACK
from forge_ray.store.home import REPLACED, can_hold_files, private_folder

GIB = 1 << 30
SHM = 2 * GIB
GIVE_HOME = "export HOME=/path/of/this/user   # Kubernetes: env HOME, on a volume (emptyDir) that this user can write to"


def home_folder(around: Surroundings) -> Finding:
    """OpenShift's containers run as a user id without a name, whose HOME is `/`."""
    rule = "HOME is a folder that this user can write to: caches, Ray's token and what is noted of stores are in it"
    before, now = around.environ.get(REPLACED), around.environ.get("HOME", "")
    if before is None and can_hold_files(now):
        return Finding("home", "ok", now, rule)
    named = now if before is None else before
    home = f"HOME={named}" if named else "HOME is not set"
    if before is None:
        observed = f"{home}, which user id {os.getuid()} cannot write to, nor make {private_folder()} (TMPDIR)"
        return Finding("home", "fail", observed, rule, GIVE_HOME)
    why = f"which user id {os.getuid()} cannot write to" if before else "and the system knows none"
    observed = f"{home}, {why}; {now} is used, which is lost with this container"
    return Finding("home", "warn", observed, rule, GIVE_HOME)


def cpus(installed: int, bound: int, usable: int) -> Finding:
    """`bound`: CPUs that the scheduler may choose; `usable`: whole ones that the quota leaves of them."""
    rule = f"{LOCAL_CPUS} CPUs for the quick start and tests; fewer are shared, and are slower"
    parts = [f"{usable} usable"]
    if bound < installed:
        parts.append(f"this process is bound to {bound} of {installed} (taskset, cpuset)")
    if usable < bound:
        parts.append(f"the quota of this container (cgroup) leaves {usable} of {bound}")
    return Finding("CPUs", "ok", "; ".join(parts), rule)


def shared_memory(around: Surroundings) -> Finding:
    """Ray's object store and NCCL use it; containers have 64 MiB by default."""
    rule = f"{around.shm} of {SHM // GIB} GiB or more"
    if not around.shm.is_dir():
        return Finding("shared memory", "fail", f"no {around.shm}", rule, f"mount -t tmpfs -o size=4g shm {around.shm}")
    usage = shutil.disk_usage(around.shm)
    amount = f"{usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} free"
    if usage.total >= SHM:
        return Finding("shared memory", "ok", amount, rule)
    if usage.free < LITTLE_SHARED_MEMORY:
        amount += ": a local Ray keeps its objects on the disk, which is slower; several GPUs in one run may fail (NCCL)"
    fix = (
        f"mount -o remount,size=4g {around.shm}   # docker run --shm-size=4g; Kubernetes: an emptyDir with medium: Memory"
        f" at {around.shm}"
    )
    return Finding("shared memory", "warn", amount, rule, fix)


def proxies(around: Surroundings) -> Finding:
    """Proxies in the environment, which programs other than forge_ray use for addresses of the cluster too."""
    rule = "no proxy between this host and the cluster: no_proxy names loopback and every node"
    named = sorted(name for name in around.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy"))
    if not named:
        return Finding("proxies", "ok", "none in the environment", rule)
    excluded = {name.lower(): value for name, value in around.environ.items()}.get("no_proxy", "")
    local = not {"*", LOOPBACK[0]}.isdisjoint(host.strip() for host in excluded.split(","))
    status: Status = "ok" if local else "warn"
    observed = f"{', '.join(named)}; no_proxy is {excluded or 'not set'}"
    if not local:
        observed += ": forge does without them for this host and the cluster, `ray job` and other programs do not"
    hosts = ",".join(filter(None, [*LOOPBACK, "HEAD", "NODES", excluded]))
    fix = "" if local else f"export no_proxy={hosts} NO_PROXY={hosts}"
    return Finding("proxies", status, observed, rule, fix)
