"""Each limit of supported machines from both sides, and the error message on an unsupported machine."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forge_ray import __main__ as entry
from forge_ray import __version__
from forge_ray.config.base import parse
from forge_ray.config.scaling import Scaling
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError
from forge_ray.machine import supported
from forge_ray.machine.supported import Machine, Problem, compiler_problem, unsupported

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
LINUX = Machine((3, 11, 7), "linux", "x86_64", glibc="2.36")
MAC = Machine((3, 11, 7), "darwin", "arm64", macos="14.0")
OLD = sorted(
    path for version in ("3.8", "3.9", "3.10") for path in Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
)


def lacks(here: Machine) -> str:
    """What is wrong with the machine; "" where nothing is. Each problem has a hint, on one line of ASCII."""
    problem = unsupported(here)
    if problem is None:
        return ""
    assert problem.hint
    assert all(text.isascii() and "\n" not in text for text in problem)
    return problem.message


@pytest.mark.parametrize(("version", "is_supported"), [
    ((2, 7, 18), False),
    ((3, 8, 18), False),
    ((3, 10, 99), False),
    ((3, 11, 0), True),
    ((3, 14, 9), True),
    ((3, 15, 0), False),
    ((4, 0, 0), False),
])  # fmt: skip
def test_python(version: tuple[int, ...], is_supported: bool) -> None:
    text = ".".join(map(str, version))
    message = "" if is_supported else f"forge_ray needs Python 3.11 to 3.14, and this is Python {text}"
    assert lacks(replace(LINUX, python=version)) == message


@pytest.mark.parametrize(("here", "message"), [
    (LINUX, ""),
    (replace(LINUX, machine="aarch64"), ""),
    (replace(LINUX, machine="armv7l"), "forge_ray does not run on Linux on armv7l, glibc 2.36"),
    (replace(LINUX, glibc="2.31"), ""),
    (replace(LINUX, glibc="2.31.9000"), ""),
    (replace(LINUX, glibc="2.30"), "forge_ray needs glibc 2.31 or later, and this is 2.30"),
    (replace(LINUX, glibc="2.4"), "forge_ray needs glibc 2.31 or later, and this is 2.4"),
    (replace(LINUX, glibc=""), "forge_ray needs glibc, which this Linux does not have (Alpine and others use musl)"),
    (MAC, ""),
    (replace(MAC, macos="26.1"), ""),
    (replace(MAC, macos="13.7.8"), "forge_ray needs macOS 14 or later, and this is 13.7.8"),
    (replace(MAC, machine="x86_64"), "forge_ray needs a Mac with Apple silicon, and this is a Python for x86_64"),
    (Machine((3, 11, 7), "win32", "AMD64"), "forge_ray does not run on Windows on AMD64"),
    (Machine((3, 11, 7), "freebsd14", "amd64"), "forge_ray does not run on freebsd14 on amd64"),
])  # fmt: skip
def test_systems(here: Machine, message: str) -> None:
    assert lacks(here) == message


def test_this_machine_is_supported_and_named() -> None:
    here = supported.this_machine()
    assert lacks(here) == ""
    assert here.python == sys.version_info[:3]
    assert str(LINUX) == "Linux on x86_64, glibc 2.36"
    assert str(MAC) == "macOS 14.0 on arm64"


def test_a_c_library_without_a_name_is_not_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_name(_: str) -> str:
        raise ValueError("unrecognized configuration name")

    for confstr in (lambda _: "", lambda _: None, lambda _: "musl 1.2.5", no_such_name):
        monkeypatch.setattr(os, "confstr", confstr)
        assert supported._glibc() == ""
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.39")
    assert supported._glibc() == "2.39"


def test_the_installation_states_the_same_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == supported.PYTHON_SPECIFIER
    assert project["scripts"] == {"forge": "forge_ray.__main__:main", "forge-ray": "forge_ray.__main__:main"}


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("name", ["__init__", "__main__", "errors", "machine/__init__", "machine/supported"])
def test_modules_for_old_pythons_keep_to_their_syntax(name: str) -> None:
    ast.parse((ROOT / f"forge_ray/{name}.py").read_text(), feature_version=(3, 8))


def test_the_check_imports_the_standard_library_alone() -> None:
    tree = ast.parse((ROOT / "forge_ray/machine/supported.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_the_module_is_the_command() -> None:
    words = [sys.executable, "-m", "forge_ray", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"forge, version {__version__}\n", "")


def test_unsupported_machine_gets_a_two_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "this_machine", lambda: replace(LINUX, glibc="2.28"))
    with pytest.raises(SystemExit) as end:
        entry.main()
    assert end.value.code == 2
    assert capsys.readouterr() == (
        "",
        f"error: forge_ray needs glibc 2.31 or later, and this is 2.28\nhint: {supported.LINUX_HINT}\n",
    )


@pytest.mark.skipif(not OLD, reason="no older Python here")
def test_older_pythons_get_a_two_line_error() -> None:
    for python in OLD:
        words = [str(python), "-B", "-m", "forge_ray", "quickstart"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        error, hint = done.stderr.splitlines()
        assert error.startswith("error: forge_ray needs Python 3.11 to 3.14, and this is Python 3.")
        assert hint == f"hint: {supported.PYTHON_HINT}"


# ---------------------------------------------------------------- the compiler


def program(folder: Path, name: str, text: str = "exit 0") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_the_compiler_is_what_torch_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux this is CXX, or else only g++, together with Python.h and openssl."""
    monkeypatch.setattr(sys, "platform", "linux")
    programs, headers = tmp_path / "bin", tmp_path / "include"
    headers.mkdir()

    def problem(**environ: str) -> Problem | None:
        return compiler_problem({"PATH": str(programs), **environ}, (headers,), use_gpu=False)

    hint = supported.install_hint()
    assert problem() == ("there is no C++ compiler (g++)", hint)
    program(programs, "c++")
    assert problem() == ("torch looks only for g++, and this machine only has c++", "export CXX=c++")
    assert problem(CXX="c++") == (f"there is no Python.h in {headers}", hint)
    program(programs, "g++")
    assert problem(CXX="icpc") == ("CXX=icpc is not a program", "unset CXX")
    (headers / "Python.h").touch()
    assert problem() == ("there is no program openssl, which torch calls when it compiles", hint)
    program(programs, "openssl")
    assert problem() is None
    program(programs, "g++", "echo \"g++: error: unrecognized command line option '-std=c++20'\" >&2; exit 1")
    assert problem() == (
        "g++ does not compile Python.h: g++: error: unrecognized command line option '-std=c++20'",
        hint,
    )
    program(programs, "g++", "exit 3")
    assert problem() == ("g++ does not compile Python.h: exit status 3", hint)
    (programs / "g++").write_bytes(b"no program at all")
    assert "Exec format error" in str(problem())


def test_on_a_gpu_triton_calls_a_compiler_for_c(tmp_path: Path) -> None:
    programs, headers = tmp_path / "bin", tmp_path / "include"
    headers.mkdir()
    (headers / "Python.h").touch()

    def problem(**environ: str) -> Problem | None:
        return compiler_problem({"PATH": str(programs), **environ}, (headers,), use_gpu=True)

    program(programs, "g++")
    assert problem() == ("there is no C compiler (gcc or clang)", supported.install_hint())
    assert problem(CC="icc") == ("CC=icc is not a program", "unset CC")
    program(programs, "clang")
    assert problem() is None
    program(programs, "gcc", "echo 'gcc: fatal error: no' >&2; exit 1")
    assert problem() == ("gcc does not compile Python.h: gcc: fatal error: no", supported.install_hint())
    assert problem(CC="clang") is None


def test_compiled_training_is_refused_where_it_cannot_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before the start if all workers are on this machine; on several machines the workers check it."""
    import ray

    from forge_ray.train import preflight

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    def refused(num_workers: int, compiled: bool = True) -> str:
        values = {"engine": "torch", "zero_stage": 0, "compile": compiled, "scaling": {"num_workers": num_workers}}
        values["guards"] = {"refuse_impossible": False}  # --force: there is no compiler all the same
        config: Any = SimpleNamespace(train=parse(TrainConfig, values))
        nothing: Any = None
        try:
            preflight.refuse_impossible(config, nothing, "fp32", nothing, nothing, "run_1")
        except ConfigError as error:
            return str(error)
        return ""

    assert "train.compile=true cannot work on" in refused(0)
    assert refused(0).endswith(
        f"there is no C++ compiler (g++)\nhint: {supported.install_hint()}; or set train.compile=false"
    )
    assert refused(0, compiled=False) == ""
    nodes = [{"Alive": True, "NodeManagerAddress": "here"}, {"Alive": False, "NodeManagerAddress": "gone"}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "here")
    assert "there is no C++ compiler" in refused(2)
    nodes.append({"Alive": True, "NodeManagerAddress": "there"})
    assert refused(2) == ""
    assert not preflight._workers_are_here(Scaling(num_workers=2))
