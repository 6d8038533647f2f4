"""Checks of what a container gives a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray.doctor import hosts
from forge_ray.doctor.finding import Surroundings
from forge_ray.store.home import REPLACED

pytestmark = pytest.mark.unit


def around(folder: Path, **environ: str) -> Surroundings:
    return Surroundings(environ, folder, folder, folder)


def test_the_home_folder(tmp_path: Path) -> None:
    """The variable is named, with what is used instead."""
    assert hosts.home_folder(around(tmp_path, HOME=str(tmp_path))).status == "ok"
    replaced = hosts.home_folder(around(tmp_path, HOME="/tmp/forge-7/home", **{REPLACED: "/"}))
    assert replaced.status == "warn"
    assert replaced.observed.startswith("HOME=/, which user id ")
    assert "/tmp/forge-7/home is used, which is lost with this container" in replaced.observed
    assert replaced.fix.startswith("export HOME=")
    unset = hosts.home_folder(around(tmp_path, HOME="/tmp/forge-7/home", **{REPLACED: ""}))
    assert unset.observed.startswith("HOME is not set, and the system knows none")
    (tmp_path / "file").touch()
    nowhere = hosts.home_folder(around(tmp_path, HOME=str(tmp_path / "file/home")))
    assert nowhere.status == "fail"
    assert nowhere.observed.startswith(f"HOME={tmp_path}/file/home, which user id")
    assert "(TMPDIR)" in nowhere.observed
    assert hosts.home_folder(around(tmp_path)).observed.startswith("HOME is not set")


@pytest.mark.parametrize(("numbers", "observed"), [
    ((8, 8, 8), "8 usable"),
    ((96, 96, 2), "2 usable; the quota of this container (cgroup) leaves 2 of 96"),
    ((24, 1, 1), "1 usable; this process is bound to 1 of 24 (taskset, cpuset)"),
])  # fmt: skip
def test_cpus(numbers: tuple[int, int, int], observed: str) -> None:
    assert hosts.cpus(*numbers).observed == observed


@pytest.mark.parametrize(("mib", "status", "text"), [
    (64, "warn", "0.06 GiB, 0.06 free: a local Ray keeps its objects on the disk"),
    (1024, "warn", "1.00 GiB, 1.00 free"),
    (4096, "ok", "4.00 GiB, 4.00 free"),
])  # fmt: skip
def test_shared_memory(mib: int, status: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"total": mib << 20, "free": mib << 20})
    monkeypatch.setattr(hosts.shutil, "disk_usage", lambda _: usage)
    finding = hosts.shared_memory(around(tmp_path))
    assert finding.status == status
    assert finding.observed.startswith(text)
    assert status == "ok" or "--shm-size=4g" in finding.fix


def test_shared_memory_that_is_not_there(tmp_path: Path) -> None:
    finding = hosts.shared_memory(around(tmp_path / "absent"))
    assert (finding.status, finding.fix) == ("fail", f"mount -t tmpfs -o size=4g shm {tmp_path}/absent")


def test_proxies(tmp_path: Path) -> None:
    assert hosts.proxies(around(tmp_path)).status == "ok"
    finding = hosts.proxies(around(tmp_path, https_proxy="http://corp:3128", NO_PROXY=".corp"))
    assert finding.status == "warn"
    assert finding.observed.startswith("https_proxy; no_proxy is .corp: forge does without them")
    assert finding.fix.startswith("export no_proxy=127.0.0.1,localhost,::1,HEAD,NODES,.corp NO_PROXY=")
    for excluded in ("127.0.0.1,localhost,::1", "*"):
        assert hosts.proxies(around(tmp_path, HTTP_PROXY="http://corp:3128", no_proxy=excluded)).status == "ok"
