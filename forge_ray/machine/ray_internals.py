"""Every private name of Ray that forge_ray uses, and why no public one would do.

Ray is pinned to one minor version. `tests/unit/machine/test_ray_internals.py` has a test for each of these names, which
fails if another version of Ray lacks the name or has changed its signature: run it first when raising the pin. Ray is
imported only when a function here is called.

Two kinds of private names are elsewhere: `__serve_build_asgi_app__` is the name of a method (`serve/replica.py`), and
`doctor/closed.py` searches for the command lines of Ray's processes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Set in the driver of `ray job submit`; Ray has no public way to ask. ray/_private/runtime_env/constants.py
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Where Ray Train keeps its view of a run's checkpoints, in the run's folder. ray/train/v2/_internal/constants.py
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
# How the folders begin, in a session's folder, to which Ray writes objects that memory has no place for.
# ray/_private/ray_constants.py, DEFAULT_OBJECT_PREFIX
SPILLED = "ray_spilled_objects"


def without_usage_reports() -> None:
    """Start local clusters of this process without the process for usage reports. Without a dashboard, Ray 2.60 starts the
    dashboard's process only for these reports, so nothing else is lost.

    Upstream: `ray.init` has no switch for it, and the process sends requests to the cloud metadata addresses before it reads
    RAY_USAGE_STATS_ENABLED.
    """
    from ray._private.node import Node

    start = Node.start_api_server
    if getattr(start, "asks_nobody", False):
        return

    def start_api_server(self: Any, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        if include_dashboard is not False:
            start(self, include_dashboard=include_dashboard, raise_on_failure=raise_on_failure)

    start_api_server.asks_nobody = True  # type: ignore[attr-defined]
    setattr(Node, "start_api_server", start_api_server)  # noqa: B010 (mypy forbids the plain assignment to a method)


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Start Ray on the address 127.0.0.1, so that its ports are closed to the network and it queries no name server. Its
    processes are given an unreachable dashboard, because there is none: Ray Train (2.60) would otherwise ask the
    dashboard of another cluster on this machine whether its controller is alive, and end the run because that one does
    not know it.

    Upstream: no public argument of `ray.init` sets the address of a local cluster. Ray uses loopback on Windows and macOS,
    where `ENABLE_RAY_CLUSTER` is false; the environment variable for it is read when ray is imported, which is too early.
    """
    from ray._private import ray_constants

    own = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    before = {name: os.environ.get(name) for name in own}
    several, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    os.environ.update(own)
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = several
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def remove_orphaned_groups() -> None:
    """Release the CPUs and GPUs that a dead controller still holds.

    Its placement group outlives it. The actor of Ray Train that should remove the group asks the dashboard which actors are
    alive; without a dashboard it waits forever, and the tasks that read rows for the next worker group get no CPU.

    Upstream: the public `ray.util.placement_group_table` has neither the creator of a group nor whether that actor is dead.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group  # type: ignore[attr-defined]
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for raw in state._connect_and_get_accessor().get_placement_group_table():
        group = Group.FromString(raw)
        ours = group.creator_job_id.hex() == ray.get_runtime_context().get_job_id()
        if ours and group.creator_actor_dead and group.state != Group.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def leave_sigint(trainer: Any) -> None:
    """Let SIGINT reach this process while a trainer of Ray Train runs, as it does everywhere else.

    Upstream: `fit` installs a handler of its own and never restores the one before. On SIGINT it waits without a limit for
    its controller, and ends with exit code 0.
    """

    def register_nothing(controller: Any) -> None:
        """The controller ends with this process."""

    trainer._register_sigint_handler = register_nothing


def session_folder() -> Path | None:
    """The folder of the Ray session that this process belongs to, where it is on this machine; None without Ray.

    Upstream: `ray.init` returns it to the process that starts or joins the cluster, and nothing returns it later.
    """
    if "ray" not in sys.modules:
        return None
    import ray

    node = ray._private.worker._global_node if ray.is_initialized() else None
    return Path(node.get_session_dir_path()) if node is not None else None


def started_here() -> bool:
    """Whether this process started the Ray that it is connected to: it is of one machine, and ends with this process.

    Upstream: `ray.init` says nothing of it later.
    """
    import ray

    node = ray._private.worker._global_node if ray.is_initialized() else None
    return node is not None and node.is_head()


def packaged_files(folder: Path, excludes: Sequence[str]) -> dict[str, int]:
    """The files that Ray would send as a job's working folder: path relative to it → bytes.

    Upstream: the public client packs and sends in one call, and a file that it leaves out is missing on the cluster.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    root, sizes = folder.absolute(), dict[str, int]()

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size

    left_out = _get_excludes(root, [*ray_constants.get_runtime_env_default_excludes(), *excludes])
    _dir_travel(root, [left_out], note, include_gitignore=_reads_gitignore())
    return sizes


def ignore_file_of(folder: Path, path: str) -> str:
    """The .gitignore or .rayignore by which Ray leaves out one of the folder's files, relative to it; "" if none."""
    from ray._private.runtime_env.packaging import _get_ignore_file

    inside = Path(path)
    for parent in reversed(inside.parents):
        for name in (".gitignore", ".rayignore") if _reads_gitignore() else (".rayignore",):
            match = _get_ignore_file(folder / parent, name)
            between = [inside, *(part for part in inside.parents if parent in part.parents)]
            if match and any(match(folder / part) for part in between):
                return (parent / name).as_posix()
    return ""


def _reads_gitignore() -> bool:
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE

    return os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"


def package_limit() -> int:
    """Bytes of a job's working folder that the dashboard of a cluster accepts."""
    from ray._private import ray_constants

    return int(ray_constants.DASHBOARD_CLIENT_MAX_SIZE)


def torch_backend() -> tuple[Any, Any]:
    """Ray Train's hooks around a group of torch workers, and the function that sets the rank of each.

    Upstream: `TorchConfig` always opens a TCP store, even for a single worker.
    """
    from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

    return _TorchBackend, _set_torch_distributed_env_vars


def replica_port_on(address: str) -> None:
    """Let the replica that this process is about to become listen on its node's address alone, with the port by which other
    deployments call it: 127.0.0.1 for a local Ray, so that it is closed to the network.

    Upstream: Serve binds it to every interface (`[::]:0`) and has no setting for it. Callers use the node's address.
    """
    from ray.serve._private import replica

    add: Any = replica.add_port_to_grpc_server  # type: ignore[attr-defined]
    host = f"[{address}]" if ":" in address else address

    def add_port(server: Any, bind: str) -> Any:
        return add(server, f"{host}:0" if bind == "[::]:0" else bind)

    setattr(replica, "add_port_to_grpc_server", add_port)  # noqa: B010 (mypy forbids the plain assignment to a function)
