"""Each private name of Ray that machine/ray_internals.py uses exists, with the expected signature."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest

from forge_ray.machine import ray_internals

pytestmark = pytest.mark.unit

PACKAGE = Path(ray_internals.__file__).parents[1]
PRIVATE = re.compile(r"^ray\.(.*\.)?(_|core\.generated)|^ray\..*\._")


def test_no_other_file_imports_a_private_name_of_ray() -> None:
    importers = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            if any(PRIVATE.match(name) for name in names):
                importers.append(path.relative_to(PACKAGE).as_posix())
    assert set(importers) == {"machine/ray_internals.py"}


def test_marker_of_a_job() -> None:
    from ray._private.runtime_env import constants

    assert constants.RAY_JOB_CONFIG_JSON_ENV_VAR == ray_internals.IN_JOB


def test_the_snapshot_of_ray_train() -> None:
    from ray.train.v2._internal import constants

    assert constants.CHECKPOINT_MANAGER_SNAPSHOT_FILENAME == ray_internals.RAY_SNAPSHOT


def test_the_handler_of_sigint() -> None:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    assert list(inspect.signature(DataParallelTrainer._register_sigint_handler).parameters) == ["self", "controller"]
    assert "self._register_sigint_handler(" in inspect.getsource(DataParallelTrainer._initialize_and_run_controller)


def test_the_folders_of_spilled_objects() -> None:
    from ray._private import ray_constants

    assert ray_constants.DEFAULT_OBJECT_PREFIX == ray_internals.SPILLED


def test_the_folder_of_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import worker
    from ray._private.node import Node

    assert hasattr(worker, "_global_node")
    assert list(inspect.signature(Node.get_session_dir_path).parameters) == ["self"]
    assert list(inspect.signature(Node.is_head).parameters) == ["self"]
    monkeypatch.setattr(worker, "_global_node", None)  # as in a process that belongs to no cluster
    assert ray_internals.session_folder() is None


def test_the_process_for_usage_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.node import Node

    names = list(inspect.signature(Node.start_api_server).parameters)
    assert names == ["self", "include_dashboard", "raise_on_failure"]
    started: list[Any] = []
    monkeypatch.setattr(Node, "start_api_server", lambda self, **options: started.append(options))
    ray_internals.without_usage_reports()
    ray_internals.without_usage_reports()  # once is enough
    start: Any = Node.start_api_server
    start(None, include_dashboard=False, raise_on_failure=False)
    assert started == []
    start(None, include_dashboard=True, raise_on_failure=False)
    assert started == [{"include_dashboard": True, "raise_on_failure": False}]


def test_a_node_asks_for_its_api_server_by_that_name() -> None:
    from ray._private.node import Node

    assert "self.start_api_server(" in inspect.getsource(Node)


def test_loopback_while_it_starts_and_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants, services, worker

    assert ray_constants.RAY_API_SERVER_ADDRESS_ENVIRONMENT_VARIABLE == "RAY_API_SERVER_ADDRESS"
    monkeypatch.setattr(worker, "_global_node", None)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    before = dict(os.environ)
    with ray_internals.on_loopback():
        assert services.get_node_ip_address() == "127.0.0.1"
        assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:9"
        assert os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] == "0"
    assert ray_constants.ENABLE_RAY_CLUSTER is True
    assert dict(os.environ) == before


def test_orphaned_groups_alone_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private.state import GlobalState
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group

    assert callable(GlobalState._connect_and_get_accessor)
    own_job, other, size = b"\1\0\0\0", b"\2\0\0\0", ray.PlacementGroupID.size()
    groups = [
        Group(placement_group_id=b"a" * size, creator_job_id=own_job, creator_actor_dead=True, state=Group.CREATED),
        Group(placement_group_id=b"b" * size, creator_job_id=own_job, creator_actor_dead=False, state=Group.CREATED),
        Group(placement_group_id=b"c" * size, creator_job_id=own_job, creator_actor_dead=True, state=Group.REMOVED),
        Group(placement_group_id=b"d" * size, creator_job_id=other, creator_actor_dead=True, state=Group.CREATED),
    ]

    class Accessor:
        def get_placement_group_table(self) -> list[bytes]:
            return [group.SerializeToString() for group in groups]

    class Context:
        def get_job_id(self) -> str:
            return own_job.hex()

    removed: list[bytes] = []
    monkeypatch.setattr(GlobalState, "_connect_and_get_accessor", lambda self: Accessor())
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    module = importlib.import_module("ray.util.placement_group")  # `ray.util` has a function of that name
    monkeypatch.setattr(module, "remove_placement_group", lambda group: removed.append(group.id.binary()))
    ray_internals.remove_orphaned_groups()
    assert removed == [b"a" * size]


def test_the_accessor_has_the_table() -> None:
    from ray._raylet import GlobalStateAccessor

    assert callable(GlobalStateAccessor.get_placement_group_table)


def test_hooks_around_a_group_of_torch_workers() -> None:
    from ray.train.torch import TorchConfig

    from forge_ray.train.process_group import Meeting, ProcessGroup

    backend, set_ranks = ray_internals.torch_backend()
    assert TorchConfig(backend="gloo").backend_cls is backend
    assert ProcessGroup(backend="gloo").backend_cls is Meeting
    assert issubclass(Meeting, backend)
    assert list(inspect.signature(backend.on_start).parameters) == ["self", "worker_group", "backend_config"]
    assert not inspect.signature(set_ranks).parameters


def test_serve_asks_a_replica_for_its_app_by_that_name() -> None:
    from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD

    from forge_ray.serve.replica import Replica

    assert hasattr(Replica, SERVE_BUILD_ASGI_APP_METHOD)


def test_a_replica_listens_on_its_nodes_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private import replica

    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in inspect.getsource(replica)
    bound: list[str] = []
    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda server, bind: bound.append(bind) or 7)
    ray_internals.replica_port_on("10.0.0.2")
    assert replica.add_port_to_grpc_server(None, "[::]:0") == 7
    replica.add_port_to_grpc_server(None, "[::]:9000")
    assert bound == ["10.0.0.2:0", "[::]:9000"]


def test_the_files_that_a_job_takes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same that Ray puts into its archive, of which the sum of the sizes is known before."""
    import zipfile

    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import create_package

    folder = tmp_path / "work"
    for name in ("run.yaml", "rows/a.jsonl", "rows/b.txt", ".git/x", ".venv/y", "sub/deep/c.bin", "sub/keep", ".forge/z"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".gitignore").write_text("*.jsonl\n")
    (folder / "sub/.rayignore").write_text("deep/\n")
    files = ray_internals.packaged_files(folder, [".forge"])
    assert files == {name: (folder / name).stat().st_size for name in files}
    excludes = [*ray_constants.get_runtime_env_default_excludes(), ".forge"]
    create_package(str(folder), tmp_path / "package.zip", include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        assert set(files) == {"run.yaml", "rows/b.txt", ".gitignore", "sub/keep", "sub/.rayignore"}
        assert set(files) <= set(package.namelist())
        assert sum(item.file_size for item in package.infolist()) == sum(files.values())
        assert all(item.compress_type == zipfile.ZIP_STORED for item in package.infolist())
    assert ray_internals.ignore_file_of(folder, "rows/a.jsonl") == ".gitignore"
    assert ray_internals.ignore_file_of(folder, "sub/deep/c.bin") == "sub/.rayignore"
    assert ray_internals.ignore_file_of(folder, "run.yaml") == ""
    monkeypatch.setenv(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "1")
    assert "rows/a.jsonl" in ray_internals.packaged_files(folder, [])
    assert ray_internals.ignore_file_of(folder, "rows/a.jsonl") == ""


def test_the_largest_folder_of_a_job() -> None:
    assert ray_internals.package_limit() == 100 << 20
