"""The store: all of an object or none, nothing outside its root, and every bit as it was written."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path

import pytest

from forge_ray.errors import ConfigError, NotFound, StoreError
from forge_ray.store.files import MANIFEST, Store, verify_files

pytestmark = pytest.mark.unit


@pytest.fixture
def place(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "a store"))


def everything(store: Store) -> list[str]:
    root = Path(store.root)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def publish(store: Store, relative: str, files: dict[str, bytes]) -> None:
    with store.staged_dir(relative) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def test_write_and_read(place: Store) -> None:
    place.write("records/a.json", b'{"a":1}')
    place.write("records/a.json", b'{"a":2}')
    assert place.read_json("records/a.json") == {"a": 2}
    assert place.exists("records/a.json")
    assert not place.exists("records/b.json")
    assert everything(place) == ["records", "records/a.json"]


def test_absent_and_torn_files_are_named(place: Store) -> None:
    with pytest.raises(NotFound, match=r"'records/a\.json' is not in the store .*a store\nhint: check --store"):
        place.read("records/a.json")
    place.write("records/a.json", b'{"a":')
    with pytest.raises(StoreError, match=r"'records/a\.json' in .* is not JSON \(5 bytes\)"):
        place.read_json("records/a.json")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_keeps_the_old_content_and_leaves_no_temporary_file(
    place: Store, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    place.write("a.json", b"old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, call, crash)
        with pytest.raises(KeyboardInterrupt):
            place.write("a.json", b"new")
        with pytest.raises(KeyboardInterrupt):
            place.write("b.json", b"new")
    assert place.read("a.json") == b"old"
    assert everything(place) == ["a.json"]


def test_files_are_as_readable_as_any_other(place: Store) -> None:
    """A store is shared: `mkstemp` would leave files that only their writer reads."""
    before = os.umask(0o022)
    try:
        place.write("records/a.json", b"1")
        publish(place, "models/mv_x", {"a": b"1"})
    finally:
        os.umask(before)
    for name in ("records/a.json", "models/mv_x/a", f"models/mv_x/{MANIFEST}"):
        assert stat.S_IMODE(place.local(name).stat().st_mode) == 0o644
    assert stat.S_IMODE(place.local("models/mv_x").stat().st_mode) == 0o755


def test_write_once_refuses_other_content(place: Store) -> None:
    place.write_once("a.json", b"1")
    place.write_once("a.json", b"1")
    with pytest.raises(StoreError, match=r"'a\.json' exists with other content; records are immutable"):
        place.write_once("a.json", b"2")
    assert place.read("a.json") == b"1"


@pytest.mark.parametrize("relative", ["", ".", "/", "/etc/passwd", "..", "../a", "a/../b", "a/../../b", "a/.."])
def test_paths_outside_the_store_are_refused(place: Store, relative: str) -> None:
    for call in (place.path, place.read, place.exists, place.list, place.delete_dir, place.local):
        with pytest.raises(StoreError, match="is not a path inside the store"):
            call(relative)
    with pytest.raises(StoreError):
        place.write(relative, b"1")


def test_list_is_sorted_and_omits_hidden_files(place: Store) -> None:
    for name in ("b/2", "b/10", "b/c/1", "a/1", "b/.tmp-1"):
        place.write(name, b"")
    assert place.list("b") == ["b/10", "b/2"]
    assert place.list("b", recursive=True) == ["b/10", "b/2", "b/c/1"]
    assert place.list("none") == []


def test_a_published_folder_has_a_manifest_and_verifies(place: Store) -> None:
    publish(place, "models/mv_x", {"config.json": b"{}", "deep/weights": b"\x00\x01"})
    assert place.is_published("models/mv_x")
    assert [(entry.path, entry.size) for entry in place.files("models/mv_x")] == [("config.json", 2), ("deep/weights", 2)]
    folder = place.fetch_dir("models/mv_x")
    assert (folder / "deep/weights").read_bytes() == b"\x00\x01"
    assert os.listdir(place.local("models")) == ["mv_x"]


def test_publishing_again_replaces_the_folder(place: Store) -> None:
    publish(place, "models/mv_x", {"a": b"1", "b": b"1"})
    publish(place, "models/mv_x", {"a": b"2"})
    assert [entry.path for entry in place.files("models/mv_x")] == ["a"]
    assert (place.fetch_dir("models/mv_x") / "a").read_bytes() == b"2"
    assert os.listdir(place.local("models")) == ["mv_x"]


def test_an_error_publishes_nothing(place: Store) -> None:
    def fail() -> None:
        with place.staged_dir("models/mv_x") as folder:
            (folder / "a").write_bytes(b"1")
            assert not place.exists("models/mv_x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not place.is_published("models/mv_x")
    assert everything(place) == ["models"]
    publish(place, "models/mv_x", {"a": b"old"})
    with pytest.raises(RuntimeError):
        fail_after_old(place)
    assert (place.fetch_dir("models/mv_x") / "a").read_bytes() == b"old"


def fail_after_old(place: Store) -> None:
    with place.staged_dir("models/mv_x") as folder:
        (folder / "a").write_bytes(b"new")
        raise RuntimeError


def test_move_dir_keeps_what_is_published(place: Store) -> None:
    publish(place, "runs/.one", {"a": b"1"})
    publish(place, "runs/.two", {"a": b"2"})
    place.move_dir("runs/.one", "runs/run_x")
    place.move_dir("runs/.two", "runs/run_x")
    assert (place.fetch_dir("runs/run_x") / "a").read_bytes() == b"1"


def test_move_dir_replaces_a_torn_folder(place: Store) -> None:
    place.write("runs/run_x/half", b"1")
    publish(place, "runs/.one", {"a": b"1"})
    place.move_dir("runs/.one", "runs/run_x")
    assert sorted(os.listdir(place.local("runs/run_x"))) == [MANIFEST, "a"]


@pytest.mark.parametrize("damage", ["bit", "cut", "longer", "gone"])
def test_verify_finds_damage(place: Store, damage: str) -> None:
    data = bytes(range(256)) * 10_000
    publish(place, "models/mv_x", {"weights": data})
    path = place.local("models/mv_x/weights")
    flipped = bytearray(data)
    flipped[1_500_000] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"bit": bytes(flipped), "cut": data[:-1], "longer": data + b"\x00"}[damage])
    expected = "sha256" if damage == "bit" else "its manifest says 2560000"
    with pytest.raises(StoreError, match=f"weights has .*{expected}"):
        place.fetch_dir("models/mv_x")
    with pytest.raises(StoreError):
        verify_files(place.local("models/mv_x"), place.files("models/mv_x"))


def test_pickles_to_its_uri(place: Store) -> None:
    place.write("a", b"1")
    copy = pickle.loads(pickle.dumps(place))
    assert copy == place
    assert hash(copy) == hash(place)
    assert copy.read("a") == b"1"
    assert len(pickle.dumps(place)) < 300


def test_a_folder_and_its_uri_are_the_same_place(tmp_path: Path) -> None:
    Store(str(tmp_path)).write("a", b"1")
    by_uri = Store(f"file://{tmp_path}")
    assert by_uri.is_local
    assert by_uri.read("a") == b"1"
    assert Store(str(tmp_path) + "/").read("a") == b"1"


def test_relative_folders_are_fixed_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(".forge")
    monkeypatch.chdir("/")
    store.write("a", b"1")
    assert (tmp_path / ".forge/a").read_bytes() == b"1"


def test_an_unusable_uri_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"store 'nothing://here' cannot be opened: .*\nhint: give a folder, or a URI"):
        Store("nothing://here")


def test_credentials_are_never_shown() -> None:
    store = Store("s3://user:secret@bucket/folder?endpoint_override=localhost:1&scheme=http&region=none")
    assert store.root == "bucket/folder"
    assert "bucket/folder" in repr(store)
    assert "secret" not in repr(store)
    with pytest.raises(StoreError) as error:
        store.local("a")
    assert "secret" not in str(error.value)
