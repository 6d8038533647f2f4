"""Ray's sessions and its token belong to one user, whatever modes Ray itself sets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from forge_ray.errors import ClusterError
from forge_ray.machine import ray_private

pytestmark = pytest.mark.unit
NAME = f"forge-{os.getuid()}"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_sessions_lie_in_a_folder_of_this_user_alone(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = temporary / "tmp" / NAME
    assert ray_private.session_folder() == str(folder / "ray")
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    ray_private.session_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("RAY_TMPDIR", str(folder))  # as the scripts of cluster/bare set it
    assert ray_private.session_folder() == str(folder / "ray")


def test_a_folder_that_another_user_made_first_is_refused(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = temporary / "tmp" / NAME
    (temporary / "elsewhere").mkdir()
    folder.parent.mkdir()
    folder.symlink_to(temporary / "elsewhere")
    with pytest.raises(ClusterError, match="is not a folder of this user") as caught:
        ray_private.session_folder()
    assert "RAY_TMPDIR" in caught.value.hint
    folder.unlink()
    folder.mkdir()
    monkeypatch.setattr(ray_private.os, "getuid", lambda: 4711)
    (temporary / "tmp" / "forge-4711").mkdir()
    with pytest.raises(ClusterError, match="is not a folder of this user"):
        ray_private.session_folder()


def test_the_token_is_private_before_ray_looks_for_it(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = temporary / "home/.ray/auth_token"
    ray_private.make_token_private()
    token = path.read_text()
    assert len(token) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["auth_token"]
    path.chmod(0o644)  # as Ray writes it
    ray_private.make_token_private()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == token
    path.unlink()
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "x")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            ray_private.make_token_private()
        assert not path.exists()


def test_ray_reads_the_token_where_it_was_made(temporary: Path) -> None:
    """Ray's own name of the file, which a new release might change."""
    from ray._private.authentication.authentication_token_setup import _get_default_token_path

    ray_private.make_token_private()
    assert _get_default_token_path().is_file()


def test_the_cluster_of_the_scripts_is_found_unless_others_could_have_named_it(temporary: Path) -> None:
    assert ray_private.current_cluster() == ""
    folder = temporary / "tmp" / NAME
    (folder / "ray").mkdir(parents=True)
    folder.chmod(0o700)
    (folder / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert ray_private.current_cluster() == "10.0.0.1:6379"
    folder.chmod(0o770)
    assert ray_private.current_cluster() == ""
