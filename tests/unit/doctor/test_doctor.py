"""Every check of `forge doctor`, on a correct environment and on one with a single defect."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from forge_ray.cli.main import cli
from forge_ray.doctor import closed, machine, startup, stored
from forge_ray.doctor.examine import lines
from forge_ray.doctor.finding import Finding, Surroundings
from forge_ray.machine import hardware, supported
from forge_ray.machine.offline import SWITCHES
from forge_ray.records import Deployment, ModelVersion, files_digest
from forge_ray.release import promotion
from forge_ray.store import audit_log
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit
NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)


@pytest.fixture
def around(tmp_path: Path) -> Callable[..., Surroundings]:
    """Surroundings with a private token; the arguments are environment variables."""
    token = tmp_path / ".ray/auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    token.chmod(0o600)
    (tmp_path / "site").mkdir()
    (tmp_path / "ray_bootstrap_config.yaml").write_text("{}")

    def make(**environ: str) -> Surroundings:
        return Surroundings(dict(environ), tmp_path, tmp_path / "proc", tmp_path, (tmp_path / "site",), NOW)

    return make


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """With one published version."""
    new_store = Store(str(tmp_path / "store"))
    with Catalog.open(new_store) as catalog, new_store.staged_dir("models/.new") as folder:
        (folder / "model.safetensors").write_bytes(b"weights")
    files = new_store.files("models/.new")
    version = ModelVersion(
        name="a", status="imported", weights="full", files=files, files_digest=files_digest(files), licence="MIT"
    ).sealed()
    new_store.move_dir("models/.new", f"models/{version.id}")
    with Catalog.open(new_store) as catalog:
        catalog.put(version)
        promotion.promote(catalog, version.id, "prod")
    return new_store


def worst_of(findings: Any) -> tuple[str, str]:
    """Status and text of the worst finding. Every finding must have a rule and, unless it is ok, a fix."""
    results = [findings] if isinstance(findings, Finding) else list(findings)
    assert all(item.rule and (item.fix or item.status == "ok") for item in results)
    worst = max(results, key=lambda item: ("ok", "warn", "fail").index(item.status))
    return worst.status, f"{worst.observed} | {worst.fix}"


def test_the_token(around: Callable[..., Surroundings], tmp_path: Path) -> None:
    token = tmp_path / ".ray/auth_token"
    assert worst_of(closed.ray_token(around()))[0] == "ok"
    assert worst_of(closed.ray_token(around(RAY_AUTH_MODE="disabled"))) == (
        "fail",
        "RAY_AUTH_MODE=disabled: anyone who reaches a port of Ray can run code | export RAY_AUTH_MODE=token",
    )
    assert worst_of(closed.ray_token(around(RAY_AUTH_TOKEN="x")))[0] == "warn"
    token.chmod(0o644)
    assert worst_of(closed.ray_token(around())) == ("fail", f"{token} has mode 644 | chmod 600 {token}")
    token.write_text("")
    assert "is empty" in worst_of(closed.ray_token(around()))[1]
    assert "no token at" in worst_of(closed.ray_token(around(RAY_AUTH_TOKEN_PATH="/nowhere")))[1]


def certificate(folder: Path, days: int) -> dict[str, str]:
    """A key and a certificate of its own that is valid for `days` from NOW."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ray")])
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=400))
        .not_valid_after(NOW + datetime.timedelta(days=days))
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    (folder / "key.pem").chmod(0o600)
    files = {"RAY_TLS_SERVER_CERT": "cert.pem", "RAY_TLS_SERVER_KEY": "key.pem", "RAY_TLS_CA_CERT": "cert.pem"}
    return {"RAY_USE_TLS": "1"} | {name: str(folder / file) for name, file in files.items()}


def test_tls(around: Callable[..., Surroundings], tmp_path: Path) -> None:
    assert worst_of(closed.ray_tls(around()))[0] == "ok"
    status, text = worst_of(closed.ray_tls(around(), "10.0.0.1:6379"))
    assert (status, "to 10.0.0.1:6379 unencrypted" in text) == ("warn", True)
    assert "is not a file" in worst_of(closed.ray_tls(around(RAY_USE_TLS="1")))[1]
    for days, status in ((31, "ok"), (29, "warn"), (-1, "fail")):
        assert worst_of(closed.ray_tls(around(**certificate(tmp_path, days))))[0] == status
    files = certificate(tmp_path, 90)
    (tmp_path / "key.pem").chmod(0o640)
    assert worst_of(closed.ray_tls(around(**files)))[1].endswith(f"chmod 600 {tmp_path}/key.pem")
    (tmp_path / "other").mkdir()
    other = certificate(tmp_path / "other", 90)
    files["RAY_TLS_SERVER_KEY"] = other["RAY_TLS_SERVER_KEY"]
    assert "is not the key of" in worst_of(closed.ray_tls(around(**files)))[1]
    (tmp_path / "cert.pem").write_text("nonsense")
    assert "cannot be read" in worst_of(closed.ray_tls(around(**files)))[1]


def test_listening_sockets_are_read_from_the_system_itself() -> None:
    with socket.socket() as own, socket.socket(socket.AF_INET6) as six:
        own.bind(("0.0.0.0", 0))
        six.bind(("::1", 0))
        for each in (own, six):
            each.listen()
        this = os.fsdecode(Path("/proc/self/cmdline").read_bytes().partition(b"\0")[0])
        sockets = closed.listening(Path("/proc"), roles=((this, "raylet"),))
        here = {(item.address, item.port) for item in sockets}
        assert {("0.0.0.0", own.getsockname()[1]), ("::1", six.getsockname()[1])} <= here


def at(role: str, address: str = "0.0.0.0", port: int = 1, token: bool = True) -> closed.Listening:
    return closed.Listening(role, address, port, token)


@pytest.mark.parametrize(("sockets", "status", "text"), [
    ([], "ok", "no Ray"),
    ([at("dashboard", "127.0.0.1"), at("raylet", "::1")], "ok", "all on loopback"),
    ([at("dashboard")], "fail", "dashboard 0.0.0.0:1 exposes the Jobs API to every interface"),
    ([at("dashboard", "10.0.0.1")], "warn", "to the network"),
    ([at("dashboard", "10.0.0.1", token=False)], "fail", "to the network"),
    ([at("raylet", "::"), at("GCS")], "ok", "2 ports of Ray on the network, all of which require the token"),
    ([at("client server", token=False)], "fail", "no token is required"),
    ([at("metrics", port=44217)], "warn", "dport 44217 drop"),
    ([at("endpoint", port=8000), at("raylet")], "fail", "open accepts requests from every interface without a key"),
    ([at("endpoint", port=8001), at("raylet")], "ok", "1 ports of Ray"),
])  # fmt: skip
def test_listening_addresses(sockets: list[closed.Listening], status: str, text: str) -> None:
    worst = worst_of(closed.bind_addresses(sockets, {8000: "open"}))
    assert worst[0] == status
    assert text in worst[1]


def test_each_switch_is_checked(around: Callable[..., Surroundings]) -> None:
    assert [item.status for item in closed.switches(around())] == ["ok"] * len(SWITCHES)
    for name in SWITCHES:
        (bad,) = [item for item in closed.switches(around(**{name: "no"})) if item.status == "fail"]
        assert bad.fix == f"export {name}={SWITCHES[name]}"
    assert {"VLLM_NO_USAGE_STATS", "MLFLOW_DISABLE_TELEMETRY", "RAY_USAGE_STATS_REPORT_URL"} <= SWITCHES.keys()


def test_cloud_metadata_requests(around: Callable[..., Surroundings], tmp_path: Path) -> None:
    assert worst_of(closed.cloud_question(around()))[0] == "ok"
    (tmp_path / "ray_bootstrap_config.yaml").unlink()
    assert worst_of(closed.cloud_question(around()))[0] == "warn"


OWN_FINDER = "__editable___forge_ray_0_1_0_finder"


@pytest.mark.parametrize(("name", "text", "status"), [
    ("paths.pth", "/opt/lib\n", "ok"),
    ("distutils-precedence.pth", "import os; var = 'SETUPTOOLS_USE_DISTUTILS'; enabled = os.environ.get(var, 'local') =="
     " 'local'; enabled and __import__('_distutils_hack').add_shim(); ", "ok"),
    ("distutils-precedence.pth", "import os; os.system('curl x')", "fail"),
    ("__editable__.forge.pth", "import __editable___forge_finder; __editable___forge_finder.install()", "fail"),
    ("__editable__.x.pth", "import __editable___x_finder; __editable___x_finder.install(); import evil", "fail"),
    ("__editable__.forge_ray-1.pth", f"import {OWN_FINDER}; {OWN_FINDER}.install()", "fail"),  # whose module is not there
    ("litellm_init.pth", "import os, subprocess, sys; subprocess.Popen([sys.executable])", "fail"),
    ("sitecustomize.py", "", "fail"),
    ("usercustomize.pyc", "", "fail"),
    ("sitecustomize.so", "", "fail"),
    ("sitecustomize.cpython-311-x86_64-linux-gnu.so", "", "fail"),
    ("usercustomize.abi3.so", "", "fail"),
    ("sitecustomize", None, "fail"),  # a package
    ("sitecustomize_notes.txt", "", "ok"),
])  # fmt: skip
def test_startup_files(
    around: Callable[..., Surroundings], tmp_path: Path, name: str, text: str | None, status: str
) -> None:
    path = tmp_path / "site" / name
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
    worst = worst_of(startup.startup_files(around()))
    assert worst[0] == status
    assert (name in worst[1]) == (status == "fail" or name == "distutils-precedence.pth")


def test_own_editable_installation_is_known_as_it_was_installed(around: Callable[..., Surroundings], tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "__editable__.forge_ray-0.1.0.pth").write_text(f"import {OWN_FINDER}; {OWN_FINDER}.install()")
    finder = site / f"{OWN_FINDER}.py"
    finder.write_text("MAPPING = {}")
    digest = base64.urlsafe_b64encode(hashlib.sha256(finder.read_bytes()).digest()).rstrip(b"=").decode()
    (site / "forge_ray-0.1.0.dist-info").mkdir()
    (site / "forge_ray-0.1.0.dist-info" / "RECORD").write_text(f"{finder.name},sha256={digest},12\n")
    assert worst_of(startup.startup_files(around()))[0] == "ok"
    finder.write_text("import evil")
    assert worst_of(startup.startup_files(around()))[0] == "fail"
    finder.write_text("MAPPING = {}")
    (site / OWN_FINDER).mkdir()  # a package comes before a module
    assert worst_of(startup.startup_files(around()))[0] == "fail"


def test_sitecustomize_of_other_folders_is_looked_for(around: Callable[..., Surroundings], tmp_path: Path) -> None:
    for name in ("named", "path"):
        (tmp_path / name).mkdir()
    (tmp_path / "site" / "more.pth").write_text(f"# comment\n{tmp_path / 'named'}\n/nowhere\n")
    path = {"PYTHONPATH": f"/nowhere:{tmp_path / 'path'}"}
    assert worst_of(startup.startup_files(around(**path)))[0] == "ok"
    for name in ("named", "path"):
        custom = tmp_path / name / "sitecustomize.py"
        custom.write_text("")
        assert str(custom) in worst_of(startup.startup_files(around(**path)))[1]
        custom.unlink()


def test_sessions_of_ray_that_others_can_enter(around: Callable[..., Surroundings], monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        tmp = Path(folder)
        tmp.chmod(0o755)
        here = replace(around(), tmp=tmp)
        assert worst_of(closed.session_folders(here))[0] == "ok"
        private = tmp / f"forge-{os.getuid()}"
        for root in (private, tmp):
            (root / "ray" / "session_1" / "logs").mkdir(parents=True)
            for path in (root / "ray", root / "ray" / "session_1"):
                path.chmod(0o777)  # as Ray does
        (tmp / "ray" / "session_latest").symlink_to(tmp / "ray" / "session_1")
        private.chmod(0o700)
        open_one = tmp / "ray" / "session_1"
        status, text = worst_of(closed.session_folders(here))
        assert (status, f"{open_one} has mode 777" in text) == ("fail", True)
        assert f"chmod 700 {tmp / 'ray'}" in text
        (tmp / "ray").chmod(0o700)
        assert worst_of(closed.session_folders(here)) == ("ok", "2 of this user, closed to others | ")
        private.chmod(0o755)
        assert worst_of(closed.session_folders(here))[0] == "fail"


def test_versions() -> None:
    required = machine.required_versions()
    assert required.keys() == {"python", *machine.CHECKED}
    assert worst_of(machine.versions(required, machine.installed_versions()))[0] == "ok"
    assert worst_of(machine.versions({"ray": ">=2.60,<2.61"}, {"ray": "2.61.0"})) == (
        "fail",
        "ray 2.61.0 | pip install 'ray>=2.60,<2.61'",
    )
    assert worst_of(machine.versions({"python": required["python"]}, {"python": "3.10.13"})) == (
        "fail",
        f"python 3.10.13 | {supported.PYTHON_HINT}",
    )
    assert "not installed" in worst_of(machine.versions({"peft": ">=0.21"}, {}))[1]
    assert worst_of(machine.versions({"torch": ">=2.13,<2.14"}, {"torch": "2.13.0+cu130"}))[0] == "ok"


def test_the_system() -> None:
    debian = supported.Machine((3, 11, 7), "linux", "x86_64", glibc="2.31")
    assert worst_of(machine.system(debian)) == ("ok", "Linux on x86_64, glibc 2.31 | ")
    assert worst_of(machine.system(supported.Machine((3, 11, 7), "linux", "x86_64", glibc="2.30"))) == (
        "fail",
        f"forge_ray needs glibc 2.31 or later, and this is 2.30 | {supported.LINUX_HINT}",
    )


def gib(number: float) -> int:
    return int(number * (1 << 30))


@pytest.mark.parametrize(("installed", "usable", "status", "text"), [
    (8, 8, "ok", "8.0 GiB | "),
    (7.5, 7.5, "ok", "7.5 GiB | "),  # of 8 GiB the kernel keeps some
    (7.4, 7.4, "warn", "7.4 GiB | use a machine with more memory"),
    (6, 6, "warn", "6.0 GiB | use a machine with more memory"),
    (5.9, 5.9, "fail", "5.9 GiB | use a machine with more memory"),
    (64, 8, "ok", "8.0 GiB, the limit of this container (cgroup); the machine has 64.0 GiB | "),
    (64, 4, "fail", "the machine has 64.0 GiB | docker run --memory=8g   # Kubernetes: resources.limits.memory: 8Gi"),
    (6.5, 4, "fail", "the machine has 6.5 GiB | use a machine with more memory"),
])  # fmt: skip
def test_memory(installed: float, usable: float, status: str, text: str) -> None:
    worst = worst_of(machine.memory(gib(installed), gib(usable)))
    assert worst[0] == status
    assert worst[1].endswith(text)


@pytest.mark.parametrize("file", ["memory.max", "memory.limit_in_bytes"])  # cgroup v2 and v1
def test_a_cgroup_limits_memory(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / file).write_text(f"{gib(1)}\n")
    monkeypatch.setattr(hardware, "MEMORY_LIMITS", (tmp_path / "absent", tmp_path / file))
    finding = machine.memory(machine.installed_memory(), hardware.main_memory())
    assert (finding.status, finding.observed.partition(";")[0]) == ("fail", "1.0 GiB, the limit of this container (cgroup)")


def test_the_compiler(tmp_path: Path) -> None:
    status, text = worst_of(machine.compiler({"PATH": str(tmp_path)}, (tmp_path,), use_gpu=False))
    assert (status, text) == ("warn", f"there is no C++ compiler (g++) | {supported.install_hint()}")
    for use_gpu, needs in ((False, "a C++20 compiler, Python.h and openssl"), (True, "a C compiler and Python.h")):
        finding = machine.compiler({"PATH": str(tmp_path)}, (tmp_path,), use_gpu)
        assert finding.rule == f"train.compile (torch.compile) needs {needs} on every worker; other runs do not"


def test_disk_limits_and_clocks(
    around: Callable[..., Surroundings], store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for free, status in ((30, "ok"), (10, "warn"), (1, "fail")):
        assert worst_of(machine.disk(store, free << 30))[0] == status
    assert worst_of(machine.disk(store, None))[0] == "ok"
    for limit, status in ((1 << 20, "ok"), (1 << 15, "warn"), (1024, "fail"), (-1, "ok")):
        assert worst_of(machine.open_files(limit))[0] == status
    usage = type("Usage", (), {"total": 64 << 20})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    assert worst_of(machine.shared_memory(around())) == (
        "warn",
        f"0.06 GiB | mount -o remount,size=4g {tmp_path}   # in a container: docker run --shm-size=4g",
    )
    usage.total = 8 << 30
    assert worst_of(machine.shared_memory(around()))[0] == "ok"
    for offset, status in ((0.2, "ok"), (-3.0, "warn"), (90.0, "fail")):
        assert worst_of(machine.clocks({"10.0.0.2": offset, "10.0.0.1": 0.0}))[0] == status


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert worst_of(machine.gpus())[0] == "ok"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    broken = RuntimeError("CUDA error: uncorrectable ECC error")

    def ones(*_: object, **__: object) -> None:
        raise broken

    monkeypatch.setattr(torch, "ones", ones)
    assert worst_of(machine.gpus()) == ("fail", "0: H100: CUDA error: uncorrectable ECC error | nvidia-smi -q -i 0")
    whole = torch.full((64, 64), 1.0)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: whole)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert "torch without NCCL" in worst_of(machine.gpus())[1]
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    assert worst_of(machine.gpus()) == ("ok", "H100; NCCL 2.28.9 | ")
    whole[0, 0] = 2.0
    assert "computes wrong results" in worst_of(machine.gpus())[1]


def test_file_modes(around: Callable[..., Surroundings], store: Store, tmp_path: Path) -> None:
    store.write("keys/subject.key", b"k" * 32)
    key = store.local("keys/subject.key")
    key.chmod(0o600)
    assert worst_of(stored.modes(around(), store)) == ("ok", f"{store.place}: not writable by everyone, 1 keys private | ")
    key.chmod(0o644)
    assert worst_of(stored.modes(around(), store)) == ("fail", f"{key} has mode 644 | chmod 600 {key}")
    key.chmod(0o400)
    signer = tmp_path / "signer.pem"
    assert worst_of(stored.modes(around(FORGE_SIGNER=str(signer)), store))[1].endswith("unset FORGE_SIGNER")
    signer.write_text("")
    signer.chmod(0o660)
    assert worst_of(stored.modes(around(FORGE_SIGNER=str(signer)), store))[1].endswith(f"chmod 600 {signer}")
    assert worst_of(stored.modes(around(FORGE_CHECKPOINT_KEY=str(signer)), store))[1].endswith(f"chmod 600 {signer}")
    absent = worst_of(stored.modes(around(FORGE_CHECKPOINT_KEY="/nowhere"), store))
    assert absent == ("fail", "FORGE_CHECKPOINT_KEY=/nowhere is not a file | unset FORGE_CHECKPOINT_KEY")
    models = store.local("models")
    models.chmod(0o777)
    assert worst_of(stored.modes(around(), store)) == (
        "fail",
        f"{models} has mode 777: everyone can write to it | chmod o-w {models}",
    )


def test_deployments_that_the_network_reaches_ask_for_keys(store: Store) -> None:
    assert worst_of(stored.deployments(store))[0] == "ok"
    for host, auth, status in (("127.0.0.1", "none", "ok"), ("0.0.0.0", "auto", "ok"), ("0.0.0.0", "none", "warn")):
        config = {"name": "bot", "models": ["prod"], "host": host, "port": 8000, "auth": auth}
        deployment = Deployment(
            name="bot", model="prod", model_version="mv_1", model_digest="", config=config, config_digest=""
        ).sealed()
        with Catalog.open(store) as catalog:
            catalog.put(deployment)
        assert worst_of(stored.deployments(store))[0] == status
    assert stored.keyless(store) == {8000: "bot"}


def test_store_health(store: Store, tmp_path: Path) -> None:
    assert worst_of(stored.health(store)) == ("ok", "1 records, 1 events; verified 1 folders | ")
    assert "nothing in it" in worst_of(stored.health(Store(str(tmp_path / "new"))))[1]
    assert not (tmp_path / "new").exists()
    (path,) = store.list("records", recursive=True)
    text = store.read(path)
    weights = next(store.local("models").glob("mv_*")) / "model.safetensors"
    weights.write_bytes(b"Weights")
    assert "has sha256" in worst_of(stored.health(store))[1]
    weights.write_bytes(b"weights")
    store.write(path, text.replace(b'"name":"a"', b'"name":"b"'))
    assert "was changed" in worst_of(stored.health(store))[1]
    store.write(path, text[:-5])
    assert "does not parse" in worst_of(stored.health(store))[1]
    store.write("records/models/xx_1.json", b"{}")
    store.write(path, text)
    assert "of an unknown kind" in worst_of(stored.health(store))[1]
    store.delete("records/models/xx_1.json")
    store.write("events/2026~e.json", b"{")
    assert "events/2026~e.json" in worst_of(stored.health(store))[1]
    store.delete("events/2026~e.json")
    assert [finding.status for finding in stored.log(store)] == ["ok"]
    audit_log.publish(store, "events/x~evt_0.json", b"{}", "alias.set", "prod")
    (finding,) = stored.log(store)
    assert (finding.status, "line 3 has no effect" in finding.observed) == ("warn", True)
    store.write(audit_log.LOG, store.read(audit_log.LOG)[1:])
    assert worst_of(stored.log(store))[0] == "fail"


def test_report_and_exit_code(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [
        Finding("ray token", "fail", "~/.ray/auth_token has mode 644", "private", "chmod 600 ~/.ray/auth_token"),
        Finding("open files", "warn", "1024", "ulimit -n of 65536 or more", "ulimit -n 65536"),
        Finding("disk", "ok", "30.0 GiB free", "20 GiB free"),
    ]
    assert lines(findings) == [
        "FAIL  ray token   ~/.ray/auth_token has mode 644",
        "                  rule: private",
        "                  fix:  chmod 600 ~/.ray/auth_token",
        "warn  open files  1024",
        "                  rule: ulimit -n of 65536 or more",
        "                  fix:  ulimit -n 65536",
        "ok    disk        30.0 GiB free",
        "",
        "1 ok, 1 to look at, 1 failed",
    ]
    monkeypatch.setattr("forge_ray.doctor.examine.examine", lambda *_: iter(findings))
    done = CliRunner().invoke(cli, ["doctor", "--store", store.uri, "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["failed"] == 1
    assert json.loads(done.stdout)["findings"][0]["fix"] == "chmod 600 ~/.ray/auth_token"
    monkeypatch.setattr("forge_ray.doctor.examine.examine", lambda *_: iter(findings[1:]))
    done = CliRunner().invoke(cli, ["doctor", "--store", store.uri])
    assert done.exit_code == 0
    assert done.stdout.splitlines() == lines(findings[1:])


def test_examine_runs_every_check(store: Store) -> None:
    from forge_ray.doctor.examine import examine

    checks = {item.check for item in examine(store, Surroundings())}
    assert checks == {
        *(
            "ray token",
            "ray sessions",
            "ray TLS",
            "listening",
            "deployment",
            "file modes",
            "switch",
            "cloud question",
            "start-up files",
            "lock",
            "base model",
        ),
        *(
            "version",
            "system",
            "memory",
            "disk",
            "shared memory",
            "open files",
            "GPU",
            "compiler",
            "store",
            "audit log",
            "tombstones",
        ),
    }
