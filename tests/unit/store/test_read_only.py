"""A store on read-only media can be read: what opens a catalogue for reading writes nothing below the store's root."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from forge_ray.cli.main import cli
from forge_ray.errors import StoreError
from forge_ray.records import Event, ModelVersion, files_digest
from forge_ray.release import promotion
from forge_ray.store import log_check
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit

READING = (
    ("models", "list"),
    ("models", "show", "prod"),
    ("runs", "list"),
    ("data", "list"),
    ("alias", "list"),
    ("alias", "history", "prod"),
    ("keys", "list"),
    ("signers", "list"),
    ("policy", "show"),
    ("lineage", "prod"),
    ("verify", "prod"),
    ("audit", "log"),
    ("audit", "verify"),
    ("catalog", "show"),
    ("store", "du"),
    ("store", "prune"),
)
CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime"})
read_only_root: list[str] = []


def refuse_writes(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: fails as read-only media do where something below `read_only_root` is opened to write, or changed."""
    if not read_only_root or not arguments:
        return
    path = str(arguments[0])
    if event == "open":
        refused = path.startswith(read_only_root[0]) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    else:
        refused = event in CHANGES and path.startswith(read_only_root[0])
    if refused:
        raise OSError(30, "Read-only file system", path)


sys.addaudithook(refuse_writes)


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Everything below `root`: path → (size, time of the last change)."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(root.rglob("*"))}


@contextmanager
def read_only(store: Store) -> Iterator[None]:
    """The store as on read-only media. Native code does not pass the hook: the tree is compared as well."""
    before = tree(Path(store.root))
    read_only_root.append(store.root)
    try:
        yield
    finally:
        read_only_root.clear()
    assert tree(Path(store.root)) == before


def model(name: str) -> ModelVersion:
    return ModelVersion(
        name=name, status="imported", weights="full", files=(), files_digest=files_digest(()), licence="mit"
    ).sealed()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two versions with their files, the second one under the alias `prod`."""
    store = Store(str(tmp_path / "store"))
    with Catalog.open(store) as catalog:
        for version in (model("first"), model("second")):
            with store.staged_dir(f"models/{version.id}"):
                pass
            promotion.promote(catalog, catalog.put(version).id, "prod")
    return store


@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_commands_that_read_write_nothing(arguments: tuple[str, ...], store: Store) -> None:
    with read_only(store):
        outcome = CliRunner().invoke(cli, [*arguments, "--json", "--store", store.uri])
    assert outcome.exit_code == 0, outcome.output


def test_writing_needs_a_writable_store(store: Store) -> None:
    with pytest.raises(OSError, match="Read-only"), read_only(store):
        Catalog.open(store).put(model("third"))


def test_a_catalogue_for_reading_refuses_to_write(store: Store) -> None:
    with read_only(store), Catalog.read_only(store) as catalog:
        for write in (
            lambda: catalog.put(model("third")),
            lambda: catalog.append(Event(kind="run", subject="run_x", data={"state": "running"})),
            lambda: promotion.promote(catalog, "prod", "other"),
        ):
            with pytest.raises(StoreError, match="was opened for reading"):
                write()


def test_reading_an_absent_store_creates_nothing(tmp_path: Path) -> None:
    with Catalog.read_only(Store(str(tmp_path / "absent"))) as catalog:
        assert catalog.all(ModelVersion) == []
    assert list(tmp_path.iterdir()) == []


def test_unwritten_files_of_a_killed_writer_are_restored_by_writers_only(store: Store) -> None:
    path = f"records/models/{model('second').id}.json"
    store.delete(path)
    with read_only(store), Catalog.read_only(store):
        (problem,) = log_check.verify(store).problems
    assert problem == f"{path}, of which the log tells, is not there; the next command that writes restores it"
    with Catalog.open(store):
        assert log_check.verify(store).problems == ()


def test_sync_adds_records_of_other_processes(store: Store, tmp_path: Path) -> None:
    with Catalog.read_only(store) as catalog:
        with Catalog.open(store) as other:
            third = other.put(model("third"))
        assert not catalog.has(third.id)
        catalog.sync()
        assert catalog.has(third.id)
