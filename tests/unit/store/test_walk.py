"""Everything in a store is seen, hidden or not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from forge_ray.store.files import Store
from forge_ray.store.owner import is_alive, owner_mark
from forge_ray.store.scratch import abandoned, scratch, scratch_folder
from forge_ray.store.walk import every_file, folders

pytestmark = pytest.mark.unit


def test_hidden_files_links_and_names_are_seen(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    for path in ("a/.b/c", ".d", "e"):
        file = Path(store.root, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"12")
    os.link(Path(store.root, "e"), Path(store.root, "a/second"))
    Path(store.root, "folder").symlink_to(tmp_path)
    files = {file.path: file for file in every_file(store)}
    assert sorted(files) == [".d", "a/.b/c", "a/second", "e", "folder"]
    assert (files["e"].number, files["e"].num_names) == (files["a/second"].number, 2)
    assert (files["folder"].link, files[".d"].link) == (str(tmp_path), "")
    assert {file.path for file in every_file(store, "a")} == {"a/.b/c", "a/second"}
    assert (folders(store, "a"), folders(store, "nowhere")) == (["a/.b"], [])
    assert list(every_file(store, "nowhere")) == []


def test_files_of_a_remote_store_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "store"))
    store.write("a/b", b"12")
    Path(store.root, "a/.c").write_bytes(b"3")
    monkeypatch.setattr(Store, "is_local", False)
    assert [(file.path, file.size, file.num_names) for file in every_file(store)] == [("a/.c", 1, 1), ("a/b", 2, 1)]


def test_scratch_folder_goes_with_its_block_and_is_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch("save") as folder:
        assert (folder.stat().st_mode & 0o777, is_alive(folder.name)) == (0o700, True)
    assert not folder.exists()
    scratch_folder("run")
    (tmp_path / "forge-config-1").mkdir()  # holds settings alone
    (tmp_path / "forge-run-1").mkdir()
    assert abandoned() == ([], [tmp_path / "forge-run-1"])
    assert owner_mark() == owner_mark()
