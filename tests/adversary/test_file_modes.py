"""Files of the store are their owner's, or their group's where it shares the store; `forge doctor` fails for others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forge_ray.doctor.finding import Surroundings
from forge_ray.doctor.stored import modes
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit

WRITER = """
import os, pickle, sys
from pathlib import Path
os.umask(int(sys.argv[2], 8))
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
store = pickle.loads(pickle.dumps(Store(sys.argv[1])))
with Catalog.open(store):
    pass
store.write("records/models/a.json", b"{}")
with store.staged_dir("models/m") as folder:
    (folder / "inner").mkdir()
    (folder / "inner" / "weights").write_bytes(b"x")
"""


def written(root: Path, umask: str = "022", **environ: str) -> dict[str, set[int]]:
    """Modes of folders and of files after a process with this umask has written to the store."""
    subprocess.run([sys.executable, "-c", WRITER, str(root), umask], env=os.environ | environ, check=True, timeout=120)
    paths = [root, *root.rglob("*")]
    return {
        "folders": {path.stat().st_mode & 0o7777 for path in paths if path.is_dir()},
        "files": {path.stat().st_mode & 0o7777 for path in paths if path.is_file()},
    }


def test_files_of_a_store_are_private_to_their_owner(tmp_path: Path) -> None:
    assert written(tmp_path / "store") == {"folders": {0o700}, "files": {0o600}}


def test_a_group_that_shares_a_store_reads_it(tmp_path: Path) -> None:
    assert written(tmp_path / "store", FORGE_GROUP="1") == {"folders": {0o2750}, "files": {0o640}}


def test_a_store_that_a_group_writes_to_stays_so(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o2770)
    assert written(tmp_path / "store", "002") == {"folders": {0o2770}, "files": {0o660}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "store"))
    for name in ("events", "records/models", "audit", "erasures", "evals", "keys", "models"):
        store.write(f"{name}/a.json", b"{}")
    return store


@pytest.mark.parametrize(
    "name", ["events", "records", "records/models", "audit", "audit/a.json", "erasures", "evals", "keys", "models", "."]
)
def test_doctor_fails_on_what_others_can_write_to(name: str, store: Store) -> None:
    path = Path(store.root, name)
    path.chmod(0o777)
    findings = [finding for finding in modes(Surroundings(environ={}), store) if finding.status == "fail"]
    assert [finding.fix for finding in findings] == [f"chmod o-w {path}"]


def test_doctor_says_the_command_for_a_store_that_others_can_read(store: Store, tmp_path: Path) -> None:
    def fixes() -> list[tuple[str, str]]:
        return [(finding.status, finding.fix) for finding in modes(Surroundings(environ={}), store)]

    assert fixes() == [("ok", "")]
    for path in (Path(store.root), *Path(store.root).rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    Path(store.root, "keys/a.json").chmod(0o600)
    assert fixes() == [("warn", f"chmod -R go-rwx {store.root}")]
    subprocess.run(["chmod", "-R", "go-rwx", store.root], check=True)
    assert fixes() == [("ok", "")]
