"""Errors of connecting to a cluster that does not answer, and of a local Ray that does not start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge_ray.errors import ClusterError, ConfigError
from forge_ray.machine.cluster import LITTLE_SHARED_MEMORY, connect, free_shared_memory, local_resources

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("address", "raised", "expected", "message", "hint"),
    [
        (
            None,
            Exception("The current node timed out during startup."),
            ClusterError,
            "timed out during startup",
            "if that is why",
        ),
        (
            "10.0.0.1:6379",
            ConnectionError("refused"),
            ConfigError,
            "no Ray cluster answers at '10.0.0.1:6379': refused",
            "token",
        ),
    ],
)
def test_a_ray_that_does_not_answer(
    address: str | None,
    raised: Exception,
    expected: type[Exception],
    message: str,
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    def init(**_: Any) -> None:
        raise raised

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(expected, match=message) as caught:
        connect(address)
    assert hint in caught.value.hint


GIB, MIB = 1 << 30, 1 << 20


@pytest.mark.parametrize(("cpus", "memory", "shared", "slots", "store"), [
    (96, 256 * GIB, 128 * GIB, 96, int(256 * GIB * 0.3)),
    (2, 8 * GIB, 4 * GIB, 4, int(8 * GIB * 0.3)),  # the quick start needs four slots
    (8, 64 * GIB, 2 * GIB, 8, int(2 * GIB * 0.9)),  # stays in shared memory
    (8, 64 * GIB, 64 * MIB, 8, 2 * GIB),  # Docker's 64 MiB: on the disk
    (8, 4 * GIB, 0, 8, int(4 * GIB * 0.3)),
    (1, 128 * MIB, 64 * MIB, 4, 80 * MIB),  # Ray refuses less than 75 MiB
])  # fmt: skip
def test_resources_of_a_local_ray(cpus: int, memory: int, shared: int, slots: int, store: int) -> None:
    """What this process has, not what the machine has."""
    resources = local_resources(cpus, memory, shared)
    assert resources == {"num_cpus": slots, "object_store_memory": store, "_memory": memory - store}


@pytest.mark.parametrize("shared", [0, 64 * MIB, LITTLE_SHARED_MEMORY, 3 * GIB, 64 * GIB])
def test_ray_accepts_the_store_of_objects(shared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own choice of its place: shared memory where the store fits, else the folder of the session."""
    from ray._private import services

    store = local_resources(2, 16 * GIB, shared)["object_store_memory"]
    monkeypatch.setattr(services.ray._private.utils, "get_shared_memory_bytes", lambda: shared)
    monkeypatch.setattr(services.ray._common.utils, "get_system_memory", lambda: 16 * GIB)
    place, _, size = services.determine_plasma_store_config(store, str(tmp_path))
    assert (place, size) == ("/dev/shm" if shared >= LITTLE_SHARED_MEMORY else str(tmp_path), store)


def test_a_local_ray_is_started_with_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    from forge_ray.machine import cluster

    arguments: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **settings: arguments.update(settings))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "cpus", lambda: 7)
    monkeypatch.setattr(cluster, "available_memory", lambda: 10 * GIB)
    monkeypatch.setattr(cluster, "free_shared_memory", lambda: 64 * MIB)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect()
    assert local_resources(7, 10 * GIB, 64 * MIB).items() <= arguments.items()
    assert free_shared_memory(tmp_path / "absent") == 0
