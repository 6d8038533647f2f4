"""Connect to a Ray cluster, or start a local one that ends with this process."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from forge_ray.config.scaling import Scaling
from forge_ray.errors import ClusterError, ConfigError
from forge_ray.machine.hardware import available_memory, cpus, gpu_named, main_memory
from forge_ray.machine.offline import SERVE, SWITCHES, THREADS, set_offline_switches
from forge_ray.machine.proxies import bypass
from forge_ray.machine.quiet import quiet_libraries
from forge_ray.machine.ray_internals import IN_JOB, on_loopback, without_usage_reports
from forge_ray.machine.ray_private import current_cluster, make_token_private, session_folder
from forge_ray.machine.signals import handlers_kept
from forge_ray.store.files import Store
from forge_ray.store.home import settle

# Slots of a local Ray, at least: a training worker, the tasks that read its rows, and a replica share the cores of a laptop.
LOCAL_CPUS = 4
SHARED_MEMORY = Path("/dev/shm")
LITTLE_SHARED_MEMORY = 512 << 20  # bytes; a block of rows has up to 128 MiB, and several are in work
OBJECT_STORE_SHARE = 0.3  # of the memory, as Ray itself takes
STORE_ON_DISK, SMALLEST_STORE = 2 << 30, 80 << 20  # bytes; Ray refuses less than 75 MiB


def in_ray_job() -> bool:
    """Whether this process is the driver of a Ray job: its current folder is a copy that is deleted when the job ends."""
    return IN_JOB in os.environ


def connect(address: str | None = None, show_logs: bool = True) -> None:
    """Connect to the cluster at `address`, else at RAY_ADDRESS (set inside a job), else start a local Ray that ends with
    this process."""
    set_offline_switches()
    quiet_libraries()
    settle()
    bypass(address or os.environ.get("RAY_ADDRESS", ""))
    import ray

    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address == "auto":
        address = current_cluster() or address
    if address:
        try:
            with handlers_kept():
                ray.init(
                    address=address,
                    runtime_env={"env_vars": SWITCHES | THREADS | {name: os.environ[name] for name in SERVE}},
                    log_to_driver=show_logs,
                    logging_level=logging.WARNING,
                )
        except ConnectionError as error:
            raise ConfigError(
                f"no Ray cluster answers at {address!r}: {error}",
                hint="`auto` on one of its nodes, HOST:6379 from elsewhere; `ray status` says whether it runs; a cluster"
                " with a token (Ray's default) also wants RAY_AUTH_MODE=token here",
            ) from None
    else:
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # replicas log to their files
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away; it is a process
        temp_dir = session_folder()
        without_usage_reports()
        make_token_private()
        try:
            with on_loopback(), handlers_kept():
                ray.init(
                    address="local",
                    _temp_dir=temp_dir,
                    **local_resources(cpus(), available_memory(), free_shared_memory()),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except Exception as error:  # Ray gives up after 30 s, and says so with a bare Exception
            load = f"{cpus()} CPUs for this process and the machine at load {os.getloadavg()[0]:.0f}"
            raise ClusterError(
                f"Ray did not start on this machine: {error}",
                hint=f"`forge doctor` looks at the home folder, disk and shared memory; Ray's logs are in {temp_dir}"
                f"/session_latest/logs; {load}: if that is why, try again when it is quieter",
            ) from error


def local_resources(usable_cpus: int, memory: int, shared_memory: int) -> dict[str, Any]:
    """Arguments of `ray.init` for what a local Ray has, where Ray would count the CPUs and the memory of the whole machine,
    or of the root control group. `memory`, `shared_memory`: bytes.

    The store of objects lies in shared memory, and takes less where that is small. Below `LITTLE_SHARED_MEMORY`, as in a
    container with Docker's 64 MiB, it lies on the disk, in the session's folder: slower, and nothing fails."""
    store = int(memory * OBJECT_STORE_SHARE)
    store = min(store, int(shared_memory * 0.9) if shared_memory >= LITTLE_SHARED_MEMORY else STORE_ON_DISK)
    store = max(store, SMALLEST_STORE)
    return {"num_cpus": max(LOCAL_CPUS, usable_cpus), "_memory": max(memory - store, 0), "object_store_memory": store}


def free_shared_memory(folder: Path = SHARED_MEMORY) -> int:
    """Bytes that are free in shared memory; 0 where the system has none as a folder (macOS)."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def open_store(uri: str | None) -> Store:
    """The store at `uri`, else at FORGE_STORE, else in `.forge` of the current folder. Inside a Ray job a relative path
    would be lost with the job, so it is refused."""
    uri = uri or os.environ.get("FORGE_STORE") or ".forge"
    if in_ray_job() and "://" not in uri and not os.path.isabs(os.path.expanduser(uri)):
        raise ConfigError(
            f"store {uri!r} is relative, and a Ray job's folder is deleted when it ends",
            hint="give a shared place: --store /mnt/forge or s3://bucket/forge, or set FORGE_STORE",
        )
    return Store(uri)


def memory_per_worker(scaling: Scaling) -> int | None:
    """Bytes of memory that one training worker has on the node that offers most: its GPU's memory, or its share of the
    node's main memory. None where it cannot be determined. Ray must be connected, unless the run uses no Ray."""
    if not scaling.max_workers:
        return _own_gpu() if scaling.gpus_per_worker else main_memory()
    import ray

    here, nodes = ray.util.get_node_ip_address(), [node for node in ray.nodes() if node["Alive"]]
    sizes: list[int] = []
    for node in nodes:
        has = node["Resources"]
        is_here = node["NodeManagerAddress"] == here
        wants = {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker}
        fits = min(int(has.get(kind, 0) / amount) for kind, amount in wants.items() if amount)
        if not fits:
            continue
        if scaling.gpus_per_worker:
            named = [gpu_named(name.partition(":")[2]) for name in has if name.startswith("accelerator_type:")]
            own = _own_gpu() if is_here else None
            memories = [own] if own else [gpu.memory for gpu in named if gpu]
            sizes += [int(memory * scaling.gpus_per_worker) for memory in memories]
            if not sizes:
                return None  # the memory of a card that is not in the table is not known
        else:
            whole = main_memory() if is_here else int(has.get("memory", 0) + has.get("object_store_memory", 0))
            sizes.append(whole // min(fits, scaling.max_workers))
    return max(sizes, default=None)


def has_gpu() -> bool:
    """Whether torch finds a GPU that it can use on this machine."""
    import torch

    return torch.cuda.is_available()


def _own_gpu() -> int | None:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
