"""The key that authenticates manifests of checkpoints: who has it, and what is refused by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from forge_ray.errors import ConfigError, PolicyError
from forge_ray.records import canonical_json, digest
from forge_ray.store import paths
from forge_ray.store.files import MANIFEST, Store
from forge_ray.train import checkpoint, manifest_key
from forge_ray.train.manifest_key import VARIABLE, authentication, require_authentic

pytestmark = pytest.mark.unit
REMOTE = "s3://bucket/forge?endpoint_override=127.0.0.1:9&scheme=http&region=eu"
PLACE = "runs/run_a/checkpoints/step-00000002"


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def key_file(path: Path, text: str = "ab" * 32, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_local_store_makes_its_own_key_once(store: Store) -> None:
    key = manifest_key.manifest_key(store)
    path = store.local(paths.CHECKPOINT_KEY)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoints.key"]
    assert manifest_key.manifest_key(Store(store.uri)) == key == path.read_bytes()
    assert manifest_key.manifest_key(Store(f"{store.uri}-2")) != key


def test_a_group_that_shares_the_store_cannot_read_its_key(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_GROUP", "1")
    manifest_key.manifest_key(Store(store.uri))
    assert store.local(paths.CHECKPOINT_KEY).stat().st_mode & 0o777 == 0o600


def test_a_remote_store_needs_a_key_of_its_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="remote store, and FORGE_CHECKPOINT_KEY names no key") as caught:
        manifest_key.manifest_key(Store(REMOTE))
    assert "openssl rand -hex 32" in caught.value.hint
    monkeypatch.setenv(VARIABLE, str(key_file(tmp_path / "key")))
    assert manifest_key.manifest_key(Store(REMOTE)) == b"ab" * 32


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        ("ab" * 32, 0o604, "has mode 604: others than its owner can use it"),
        ("ab" * 32, 0o620, "has mode 620"),
        ("{}", 0o600, "does not hold a key, which is 64 hex digits"),
        ("", 0o600, "does not hold a key"),
    ],
)
def test_a_key_that_others_could_have_read_or_written_is_refused(
    text: str, mode: int, reason: str, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = key_file(store.local(paths.CHECKPOINT_KEY), text, mode)
    with pytest.raises((ConfigError, PolicyError), match=reason):
        manifest_key.manifest_key(store)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises((ConfigError, PolicyError), match=reason):
        manifest_key.manifest_key(store)


def test_a_key_that_another_user_put_into_the_store_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    key_file(store.local(paths.CHECKPOINT_KEY))
    stat = os.fstat

    def of_another(handle: int) -> os.stat_result:
        state = list(stat(handle))
        state[4] = 4711
        return os.stat_result(state)

    monkeypatch.setattr(manifest_key.os, "fstat", of_another)
    with pytest.raises(PolicyError, match="belongs to the user id 4711, not to this account"):
        manifest_key.manifest_key(store)


def test_links_pipes_and_absent_files_are_no_keys(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.local(paths.CHECKPOINT_KEY)
    path.parent.mkdir(parents=True)
    path.symlink_to(key_file(tmp_path / "of another"))  # whose content the attacker knows
    with pytest.raises(ConfigError, match=r"checkpoints\.key cannot be read"):
        manifest_key.manifest_key(store)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(PolicyError, match="others than its owner"):
        manifest_key.manifest_key(store)
    monkeypatch.setenv(VARIABLE, "/nowhere/key")
    with pytest.raises(ConfigError, match="FORGE_CHECKPOINT_KEY names /nowhere/key, which cannot be read"):
        manifest_key.manifest_key(store)


def test_another_key_or_another_value_is_refused_by_name(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = {"files": [], "position": {"step": 2}, "parent": ""}
    tag = authentication(store, value)
    require_authentic(store, PLACE, value, tag)
    for changed, stated in ((value | {"parent": "x"}, tag), (value, "0" * 64), (value, "é")):
        with pytest.raises(PolicyError, match=f"the manifest of {PLACE} was not made with this store's key"):
            require_authentic(store, PLACE, changed, stated)
    for stated in (None, "", 7, []):
        with pytest.raises(PolicyError, match="is not authenticated") as caught:
            require_authentic(store, PLACE, value, stated)
        assert "forge runs authenticate run_a" in caught.value.hint
    monkeypatch.setenv(VARIABLE, str(key_file(tmp_path / "key")))
    with pytest.raises(PolicyError, match="or the key is another one"):
        require_authentic(store, PLACE, value, tag)


def earlier(store: Store, step: int) -> None:
    """A checkpoint as versions before the key wrote it."""
    with store.staged_dir(f"runs/run_a/checkpoints/step-{step:08d}") as folder:
        (folder / "state.pt").write_bytes(b"weights")
    relative = f"runs/run_a/checkpoints/step-{step:08d}/{MANIFEST}"
    position = checkpoint.Position(step, step, "", 1, "run_a", "sha256:c", "ds_a", "sha256:b", "torch", 0, 1)
    value: dict[str, Any] = store.read_json(relative) | {"position": vars(position), "parent": ""}
    store.write(relative, canonical_json(value | {"digest": digest(value)}))


def test_checkpoints_of_earlier_versions_are_used_once_somebody_authenticates_them(store: Store) -> None:
    start = checkpoint.Position(0, 0, "", 1, "run_a", "sha256:c", "ds_a", "sha256:b", "torch", 0, 1)
    for step in (2, 4):
        earlier(store, step)
    with pytest.raises(PolicyError, match="an earlier version wrote it"):
        checkpoint.find(store, start)
    assert checkpoint.authenticate(store, "run_a") == [2, 4]
    assert checkpoint.authenticate(store, "run_a") == []
    whole = checkpoint.find(store, start)
    assert whole is not None
    assert whole.step == 4


def test_a_changed_checkpoint_is_not_authenticated(store: Store) -> None:
    earlier(store, 2)
    store.local(f"{PLACE}/state.pt").write_bytes(b"Weights")
    with pytest.raises(OSError, match="has sha256"):
        checkpoint.authenticate(store, "run_a")
    earlier(store, 2)
    value = store.read_json(f"{PLACE}/{MANIFEST}")
    store.write(f"{PLACE}/{MANIFEST}", canonical_json(value | {"parent": "x"}))
    with pytest.raises(OSError, match="was changed after it was written"):
        checkpoint.authenticate(store, "run_a")


def test_an_unauthentic_checkpoint_does_not_stand_where_one_is_to_be_written(store: Store) -> None:
    earlier(store, 2)
    position = checkpoint.Position(2, 2, "", 1, "run_a", "sha256:c", "ds_a", "sha256:b", "torch", 0, 1)
    assert not checkpoint.stands(store, PLACE, position)
    checkpoint.authenticate(store, "run_a")
    assert checkpoint.stands(store, PLACE, position)
