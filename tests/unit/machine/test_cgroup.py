"""Limits of control groups: a container's, a job's below the root, of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from forge_ray.machine import cgroup, hardware

pytestmark = pytest.mark.unit
GIB = 1 << 30


class Host:
    """A made-up /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"

    def membership(self, *lines: str) -> None:
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self/cgroup").write_text("".join(f"{line}\n" for line in lines))

    def write(self, path: str, value: str) -> None:
        target = self.cgroups / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"{value}\n")

    def limits(self) -> tuple[float | None, int | None]:
        return cgroup.cpu_limit(self.proc, self.cgroups), cgroup.memory_limit(self.proc, self.cgroups)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_no_limit(host: Host) -> None:
    assert host.limits() == (None, None)  # not Linux
    host.membership("3:cpuset:/", "2:cpu,cpuacct:/", "1:memory:/", "0::/")
    host.write("cpu.max", "max 100000")
    host.write("memory.max", "max")
    host.write("cpu,cpuacct/cpu.cfs_quota_us", "-1")
    host.write("cpu,cpuacct/cpu.cfs_period_us", "100000")
    assert host.limits() == (None, None)


def test_a_container_of_version_2(host: Host) -> None:
    """It sees its own group as the root."""
    host.membership("0::/")
    host.write("cpu.max", "200000 100000")
    host.write("memory.max", str(8 * GIB))
    assert host.limits() == (2.0, 8 * GIB)


def test_a_container_of_version_1_with_the_paths_of_its_host(host: Host) -> None:
    host.membership("4:memory:/docker/0123abcd", "2:cpu,cpuacct:/docker/0123abcd", "0::/system.slice/containerd")
    host.write("cpu/cpu.cfs_quota_us", "150000")
    host.write("cpu/cpu.cfs_period_us", "100000")
    host.write("memory/memory.limit_in_bytes", str(3 * GIB))
    assert host.limits() == (1.5, 3 * GIB)


@pytest.mark.parametrize("lowest", ["job", "step"])
def test_the_lowest_limit_on_the_way_up_counts(lowest: str, host: Host) -> None:
    """A job of Slurm: the root has no limit, and Ray reads the root alone."""
    host.membership("0::/slurm/job_7/step_0")
    quotas, sizes = {"job": "400000", "step": "800000"}, {"job": 2, "step": 4}
    if lowest == "step":
        quotas, sizes = {"job": "max", "step": "400000"}, {"job": 4, "step": 2}
    for name, folder in (("job", "slurm/job_7"), ("step", "slurm/job_7/step_0")):
        host.write(f"{folder}/cpu.max", f"{quotas[name]} 100000")
        host.write(f"{folder}/memory.max", str(sizes[name] * GIB))
    host.write("slurm/job_8/cpu.max", "100000 100000")  # of another job
    assert host.limits() == (4.0, 2 * GIB)


def test_a_path_cannot_lead_out_of_the_groups(host: Host) -> None:
    host.membership("0::/../elsewhere")
    (host.cgroups.parent / "elsewhere").mkdir()
    (host.cgroups.parent / "elsewhere/cpu.max").write_text("100000 100000")
    assert host.limits() == (None, None)


@pytest.mark.parametrize(("bound", "quota", "usable"), [
    (96, 2.0, 2), (96, 1.5, 1), (96, 0.5, 1), (2, 8.0, 2), (3, None, 3)
])  # fmt: skip
def test_cpus_are_the_fewer_of_quota_and_affinity(
    bound: int, quota: float | None, usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "bound_cpus", lambda: bound)
    monkeypatch.setattr(cgroup, "cpu_limit", lambda: quota)
    assert hardware.cpus() == usable


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux binds processes to CPUs")
def test_a_process_bound_to_one_cpu_has_one() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert hardware.bound_cpus() == hardware.cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert hardware.bound_cpus() == len(before)


def test_memory_that_others_hold_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = hardware.main_memory()
    (tmp_path / "meminfo").write_text("MemTotal:       99999999 kB\nMemAvailable:    1024 kB\n")
    assert hardware.available_memory(tmp_path / "meminfo") == 1 << 20 < installed
    assert hardware.available_memory(tmp_path / "absent") == installed
    monkeypatch.setattr(cgroup, "memory_limit", lambda: 4096)
    assert hardware.available_memory(tmp_path / "meminfo") == hardware.main_memory() == 4096
    monkeypatch.setattr(cgroup, "memory_limit", lambda: 1 << 62)  # what version 1 writes for no limit
    assert hardware.main_memory() >= installed
