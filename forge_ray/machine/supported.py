"""The machines that forge_ray supports: Python, system, C library, memory and, for `train.compile`, a compiler.

The limits are defined in this module only. It uses only the standard library and the syntax of Python 3.8:
`forge_ray.__main__` calls it before it imports anything that an unsupported machine could not import.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GIB = 1 << 30
PYTHON, PYTHON_TOO_NEW = (3, 11), (3, 15)
PYTHON_SPECIFIER = ">={}.{},<{}.{}".format(*PYTHON, *PYTHON_TOO_NEW)  # as requires-python in pyproject.toml
GLIBC = (2, 31)  # llguidance's wheels; torch's want 2.28
LINUX_MACHINES = ("x86_64", "aarch64")
MACOS, MACOS_MACHINE = (14, 0), "arm64"  # torch's wheels
MEMORY, LITTLE_MEMORY = 8 * GIB, 6 * GIB  # the quick start's training takes 3.6 GiB, and Ray and the system the rest
PYTHON_RULE = "Python {}.{} to {}.{}".format(*PYTHON, PYTHON_TOO_NEW[0], PYTHON_TOO_NEW[1] - 1)
SYSTEM_RULE = "Linux on {} with glibc {}.{} or later, or macOS {} or later on {}".format(
    " or ".join(LINUX_MACHINES), *GLIBC, MACOS[0], MACOS_MACHINE
)
PYTHON_HINT = "install forge_ray into an environment of one of them, for example: python{}.{} -m venv .venv".format(*PYTHON)
LINUX_HINT = "use Debian 11, Ubuntu 20.04, RHEL 9 or a later release of them, or a container with one of them"
NAMES = {"win32": "Windows"}


class Problem(NamedTuple):
    """What this machine lacks, and the remedy."""

    message: str
    hint: str


@dataclass(frozen=True)
class Machine:
    """A machine: `system` as in `sys.platform`; `glibc` is "" with another C library, `macos` is "" on other systems."""

    python: tuple[int, ...]
    system: str
    machine: str
    glibc: str = ""
    macos: str = ""

    def __str__(self) -> str:
        if self.system == "darwin":
            return f"macOS {self.macos} on {self.machine}"
        if self.system == "linux":
            return f"Linux on {self.machine}, {f'glibc {self.glibc}' if self.glibc else 'no glibc'}"
        return f"{NAMES.get(self.system, self.system)} on {self.machine}"


def this_machine() -> Machine:
    return Machine(tuple(sys.version_info[:3]), sys.platform, platform.machine(), _glibc(), platform.mac_ver()[0])


def _glibc() -> str:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, OSError, ValueError):  # not glibc: the function or the name is missing
        return ""
    return version if name == "glibc" else ""


def unsupported(here: Machine) -> Problem | None:
    """The first requirement that the machine does not meet."""
    return python_problem(here.python) or system_problem(here)


def python_problem(version: Sequence[int]) -> Problem | None:
    if PYTHON <= tuple(version[:2]) < PYTHON_TOO_NEW:
        return None
    return Problem(f"forge_ray needs {PYTHON_RULE}, and this is Python {'.'.join(map(str, version))}", PYTHON_HINT)


def system_problem(here: Machine) -> Problem | None:
    if here.system == "linux":
        if here.machine not in LINUX_MACHINES:
            return Problem(f"forge_ray does not run on {here}", f"use {SYSTEM_RULE}")
        if not here.glibc:
            return Problem("forge_ray needs glibc, which this Linux does not have (Alpine and others use musl)", LINUX_HINT)
        if _numbers(here.glibc) < GLIBC:
            return Problem("forge_ray needs glibc {}.{} or later, and this is {}".format(*GLIBC, here.glibc), LINUX_HINT)
        return None
    if here.system == "darwin":
        if here.machine != MACOS_MACHINE:
            message = f"forge_ray needs a Mac with Apple silicon, and this is a Python for {here.machine}"
            return Problem(message, f"use a Python for {MACOS_MACHINE}; Macs with an Intel CPU are not supported")
        if _numbers(here.macos) < MACOS:
            return Problem(f"forge_ray needs macOS {MACOS[0]} or later, and this is {here.macos}", "update macOS")
        return None
    return Problem(f"forge_ray does not run on {here}", f"use {SYSTEM_RULE}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def header_folders() -> tuple[Path, ...]:
    """The folders in which torch and Triton look for Python.h."""
    paths = {sysconfig.get_path("include"), sysconfig.get_path("include", scheme="posix_prefix")}
    return tuple(sorted(Path(path) for path in paths))


def compiler(environ: Mapping[str, str], use_gpu: bool) -> str:
    """The program that torch.compile calls: a C++ compiler on a CPU; on a GPU Triton's, which is one for C."""
    if use_gpu:
        return environ.get("CC") or ("gcc" if shutil.which("gcc", path=environ.get("PATH", "")) else "clang")
    return environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def compiler_problem(environ: Mapping[str, str], headers: Sequence[Path], use_gpu: bool) -> Problem | None:
    """What torch.compile needs and this machine lacks. The code that torch compiles includes Python.h, so that is tried.

    torch 2.13: `cpp_builder.cpp_compiler_search` (CXX, else g++), `codecache.CppPythonBindingsCodeCache` (Python.h) and
    `codecache._precompile_header` (openssl); on a GPU `triton/runtime/build.py`.
    """
    path, program = environ.get("PATH", ""), compiler(environ, use_gpu)
    variable, language = ("CC", "C") if use_gpu else ("CXX", "C++")
    if not shutil.which(program, path=path):
        if environ.get(variable):
            return Problem(f"{variable}={program} is not a program", f"unset {variable}")
        if not use_gpu and shutil.which("c++", path=path):
            return Problem(f"torch looks only for {program}, and this machine only has c++", "export CXX=c++")
        names = "gcc or clang" if use_gpu else program
        return Problem(f"there is no {language} compiler ({names})", install_hint())
    if not any((folder / "Python.h").is_file() for folder in headers):
        return Problem(f"there is no Python.h in {' or '.join(map(str, headers))}", install_hint())
    if not use_gpu and not shutil.which("openssl", path=path):
        return Problem("there is no program openssl, which torch calls when it compiles", install_hint())
    failure = _compile(program, ["-x", "c"] if use_gpu else ["-x", "c++", "-std=c++20"], headers, environ)
    return Problem(f"{program} does not compile Python.h: {failure}", install_hint()) if failure else None


def _compile(program: str, options: list[str], headers: Sequence[Path], environ: Mapping[str, str]) -> str:
    """The first error of the compiler; "" if there is none."""
    import subprocess

    words = [program, *options, "-fsyntax-only", *(f"-I{folder}" for folder in headers), "-"]
    source = "#include <Python.h>\n"
    try:
        done = subprocess.run(
            words, input=source, capture_output=True, encoding="utf-8", errors="replace", env=dict(environ), check=False
        )
    except OSError as error:
        return str(error)
    if not done.returncode:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), "; ".join(lines[:1]) or f"exit status {done.returncode}")[:200]


def install_hint() -> str:
    """The commands that install a compiler and the headers of this Python."""
    if sys.platform == "darwin":
        return "xcode-select --install"
    python = "python{}.{}".format(*sys.version_info[:2])
    return f"Debian: apt-get install g++ openssl {python}-dev; RHEL: dnf install gcc-c++ openssl {python}-devel"
