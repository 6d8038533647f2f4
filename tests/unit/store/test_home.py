"""A user without a home that can be written, or without a name, as OpenShift starts containers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from forge_ray.errors import ClusterError, ConfigError
from forge_ray.store import home, pins

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HOME below a file, which not even root can write to; returns the folder that replaces it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file/home"))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    for name in (home.REPLACED, "XDG_STATE_HOME", "XDG_CACHE_HOME", *home.KEPT.values()):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / f"tmp/forge-{os.getuid()}/home"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = dict(os.environ)
    home.settle()
    for name in set(os.environ) - set(environment):
        monkeypatch.setenv(name, os.environ[name])  # so that it is taken back


def test_a_home_that_can_be_written_or_made_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path, tmp_path / "not/yet/made"):
        monkeypatch.setenv("HOME", str(folder))
        home.settle()
        assert (os.environ["HOME"], home.home()) == (str(folder), folder)
        assert home.REPLACED not in os.environ
        assert home.expanded("~/rows") == folder / "rows"
    assert not (tmp_path / "not").exists()


def test_without_the_variable_the_home_of_the_systems_list_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(home, "_recorded", lambda: str(tmp_path / "real"))
    assert home.home() == tmp_path / "real"
    home.settle()
    assert os.environ["HOME"] == str(tmp_path / "real")
    assert home.REPLACED not in os.environ
    assert home.expanded("~/x") == tmp_path / "real/x"


@pytest.mark.usefixtures("settled")
def test_a_private_folder_replaces_a_home_that_cannot_be_written(no_home: Path, tmp_path: Path) -> None:
    assert os.environ["HOME"] == str(no_home)
    assert os.environ[home.REPLACED] == str(tmp_path / "file/home")
    assert no_home.is_dir()
    assert no_home.parent.stat().st_mode & 0o777 == 0o700
    assert pins.file() == no_home / ".local/state/forge_ray/stores.json"
    assert home.cache_folder() == no_home / ".cache/forge_ray"


@pytest.mark.usefixtures("settled")
def test_a_path_in_a_replaced_home_is_refused() -> None:
    """What a run file calls `~/store` would be lost with the container."""
    with pytest.raises(ConfigError, match=r"'~/store' is in the home folder, and HOME='.*file/home' is not one") as caught:
        home.expanded("~/store")
    assert "whole path" in caught.value.hint
    assert home.expanded("~backup.jsonl") == Path("~backup.jsonl")
    assert home.expanded("/mnt/store") == Path("/mnt/store")


def test_files_of_a_home_that_can_only_be_read_are_still_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret that is mounted as ~/.ray/auth_token, and what was noted of stores."""
    mounted = tmp_path / "mounted"
    for name in (".ray/auth_token", ".local/state/forge_ray/stores.json"):
        (mounted / name).parent.mkdir(parents=True)
        (mounted / name).write_text(json.dumps({"s3://b/store": {"genesis": "g", "head": ""}}))
    monkeypatch.setenv("HOME", str(mounted))
    monkeypatch.setattr(home, "can_hold_files", lambda folder: folder != str(mounted))
    for name in home.KEPT.values():
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv(home.REPLACED, "")
    home.settle()
    assert os.environ["HOME"] != str(mounted)
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(mounted / ".ray/auth_token")
    assert "AWS_CONFIG_FILE" not in os.environ
    assert pins.id_of("s3://b/store") == "g"


def test_a_folder_of_another_user_does_not_replace_the_home(no_home: Path, tmp_path: Path) -> None:
    no_home.parent.parent.mkdir()
    no_home.parent.symlink_to(tmp_path)
    for use in (home.home, home.settle, pins.file):
        with pytest.raises(ClusterError, match="is not a folder of this user"):
            use()


def test_where_no_folder_can_be_made_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file/tmp"))
    before = dict(os.environ)
    home.settle()
    assert dict(os.environ) == before
    assert pins._read() == {}


AS_A_NAMELESS_USER = """
import getpass, json, os, socket, pwd
from pathlib import Path
from forge_ray.store import home, pins, signing
from forge_ray.machine import ray_private
os.setgroups([]), os.setgid(0), os.setuid(1000770000)
before = signing.who()
home.settle()
ray_private.make_token_private()
token = Path.home() / ".ray/auth_token"
print(json.dumps({
    "who": [before, signing.who()], "home": str(Path.home()), "user": getpass.getuser(), "pins": str(pins.file()),
    "token": oct(token.stat().st_mode & 0o777), "sessions": ray_private.session_folder(),
}))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without a name")
@pytest.mark.parametrize("variables", [{"HOME": "/"}, {}, {"HOME": "/root"}, {"HOME": "/nonexistent"}], ids=str)
def test_a_user_id_without_a_name(variables: dict[str, str]) -> None:
    """The real thing: uid 1000770000, gid 0, and no other variables. torch and Ray ask `getpass` and HOME."""
    program = [sys.executable, "-c", AS_A_NAMELESS_USER]
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # pytest's own folders are closed to other users
        os.chmod(place, 0o777)
        environment = {"PYTHONPATH": str(Path(home.__file__).parents[2]), "TMPDIR": place} | variables
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    outcome, own = json.loads(done.stdout), Path(place, "forge-1000770000")
    assert outcome == {
        "who": [f"1000770000@{os.uname().nodename}"] * 2,
        "home": str(own / "home"),
        "user": "1000770000",
        "pins": str(own / "home/.local/state/forge_ray/stores.json"),
        "token": "0o600",
        "sessions": str(own / "ray"),
    }
