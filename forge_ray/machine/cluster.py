"""Join the Ray cluster that is there, or start one in this process's name."""

from __future__ import annotations

import logging
import os

from forge_ray.config.train import Scaling
from forge_ray.errors import ClusterError, ConfigError
from forge_ray.machine.hardware import gpu_named, main_memory
from forge_ray.machine.offline import SWITCHES, set_offline_switches
from forge_ray.machine.quiet import quiet_libraries
from forge_ray.machine.ray_internals import IN_JOB, on_loopback, without_usage_reports
from forge_ray.store.files import Store

LOCAL_CPUS = 4  # logical: a laptop's workers, data tasks and replicas share the cores


def in_ray_job() -> bool:
    """Inside `ray job submit`: the current folder is a copy that goes away with the job."""
    return IN_JOB in os.environ


def connect(address: str | None = None, show_logs: bool = True) -> None:
    """`address`, else RAY_ADDRESS (set inside a job), else a local Ray that ends with this process."""
    set_offline_switches()
    quiet_libraries()
    import ray

    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(
                address=address,
                runtime_env={"env_vars": dict(SWITCHES)},
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
        without_usage_reports()
        try:
            with on_loopback():
                ray.init(
                    address="local",
                    num_cpus=max(LOCAL_CPUS, os.cpu_count() or 1),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except Exception as error:  # Ray gives up after 30 s, and says so with a bare Exception
            raise ClusterError(
                f"Ray did not start on this machine: {error}",
                hint=f"its {os.cpu_count()} cores are at load {os.getloadavg()[0]:.0f}: try again when it is quieter; Ray's"
                " own words are in /tmp/ray/session_latest/logs; `forge doctor` looks at disk and shared memory",
            ) from error
    quiet_data()


def quiet_data() -> None:
    """One line per stage is ours; Ray Data's own bars and plans go to its log files."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # after the import, which sets it


def open_store(uri: str | None) -> Store:
    """`uri`, else FORGE_STORE, else `.forge` here; inside a Ray job a relative place would be lost, so it is refused."""
    uri = uri or os.environ.get("FORGE_STORE") or ".forge"
    if in_ray_job() and "://" not in uri and not os.path.isabs(os.path.expanduser(uri)):
        raise ConfigError(
            f"store {uri!r} is relative, and a Ray job's folder is deleted when it ends",
            hint="give a shared place: --store /mnt/forge or s3://bucket/forge, or set FORGE_STORE",
        )
    return Store(uri)


def room_of_a_worker(scaling: Scaling) -> int | None:
    """Bytes of one training worker, on the node with most of them: its GPU's, or its share of the node's main memory. None
    where nobody can tell. Ray must be connected unless the run does without."""
    if not scaling.max_workers:
        return _own_gpu() if scaling.gpus_per_worker else main_memory()
    import ray

    here, nodes = ray.util.get_node_ip_address(), [node for node in ray.nodes() if node["Alive"]]
    rooms: list[int] = []
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
            rooms += [
                int(size * scaling.gpus_per_worker) for size in ([own] if own else [gpu.memory for gpu in named if gpu])
            ]
            if not rooms:
                return None  # a card that nobody knows may have any room
        else:
            whole = main_memory() if is_here else int(has.get("memory", 0) + has.get("object_store_memory", 0))
            rooms.append(whole // min(fits, scaling.max_workers))
    return max(rooms, default=None)


def _own_gpu() -> int | None:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
