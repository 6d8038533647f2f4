"""The home folder of this user, and the folder that replaces it where it cannot be written.

OpenShift starts containers as a user id without a name, whose HOME is `/`; service users have `/nonexistent`. What libraries
and Ray write there (caches, the cluster's token) then goes to a folder that only this user can enter, below the system's
folder for temporary files. It lasts as long as the container.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import stat
import sys
from pathlib import Path

from forge_ray.errors import ClusterError, ConfigError

PRIVATE = 0o700
REPLACED = "FORGE_HOME_REPLACED"  # what HOME was, in processes where it is replaced
# Files of a home that can be read but not written, such as a mounted secret → the variable that still leads to them
KEPT = {
    ".ray/auth_token": "RAY_AUTH_TOKEN_PATH",
    ".aws/credentials": "AWS_SHARED_CREDENTIALS_FILE",
    ".aws/config": "AWS_CONFIG_FILE",
    ".config/gcloud/application_default_credentials.json": "GOOGLE_APPLICATION_CREDENTIALS",
}


def system_temp() -> Path:
    """Where Ray would put its folder."""
    default = os.environ.get("TMPDIR", "/tmp") if sys.platform.startswith("linux") else "/tmp"
    return Path(os.environ.get("RAY_TMPDIR") or default)


def private_folder() -> Path:
    """The folder of this user below the system's temporary one, which `cluster/bare/environment.sh` makes under the same
    name; it may not exist yet."""
    name = f"forge-{os.getuid()}"
    base = system_temp()
    return base if base.name == name else base / name


def make_private_folder() -> Path:
    """`private_folder()`, made if absent. Raises `ClusterError` where another user owns the one of that name, or has left a
    link there."""
    folder = private_folder()
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=PRIVATE, parents=True)
    _require_own(folder)
    if folder.lstat().st_mode & 0o077:
        folder.chmod(PRIVATE)
    return folder


def _require_own(folder: Path) -> None:
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
        raise ClusterError(
            f"{folder} is not a folder of this user: Ray's sessions in it would be open to whoever made it",
            hint=f"remove it (`ls -ld {folder}` shows whose it is), or set RAY_TMPDIR to a short folder of your own",
        )


def home() -> Path:
    """HOME where it can hold files, else a folder in `private_folder()`; neither is made here. Raises `ClusterError` where
    that folder belongs to another user."""
    folder = os.environ.get("HOME", "") or _recorded()
    if can_hold_files(folder):
        return Path(folder)
    if os.path.lexists(private_folder()):
        _require_own(private_folder())
    return private_folder() / "home"


def can_hold_files(folder: str) -> bool:
    """Whether this user can write to a folder, or make it. "" is none."""
    if not os.path.isabs(folder):
        return False
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def expanded(path: str | Path) -> Path:
    """`path` with `~` as the home folder. Raises `ConfigError` where that is replaced, for what is written there would be
    lost with the container."""
    whole = Path(path)
    if whole.parts[:1] == ("~",) and REPLACED in os.environ:
        raise ConfigError(
            f"{str(path)!r} is in the home folder, and HOME={os.environ[REPLACED]!r} is not one that this user can write to",
            hint="give the whole path, or set HOME to a folder of this user",
        )
    try:
        return whole.expanduser()
    except RuntimeError:  # a name that only begins like another user's home
        return whole


def state_file(name: str) -> Path:
    """A file of what forge_ray notes on this machine. One in a home that can be read but not written counts where it is."""
    folder = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(folder):
        return Path(folder, "forge_ray", name)
    inside = Path(".local/state/forge_ray", name)
    homes = [os.environ.get(variable, "") for variable in (REPLACED, "HOME")]
    return next((Path(each, inside) for each in homes if each and os.path.exists(Path(each, inside))), home() / inside)


def cache_folder() -> Path:
    """The folder for copies of files from remote stores."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(folder) if os.path.isabs(folder) else home() / ".cache") / "forge_ray"


def user() -> str:
    """The name of this user, or the number where the system has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without a name
        return str(os.getuid())


def settle() -> None:
    """Give this process, and those that it starts, a HOME that can be written and a name of the user: torch's compiler, Ray
    and Hugging Face's libraries fail without. Where no folder can be made, nothing changes; `forge doctor` says so."""
    before = os.environ.get("HOME", "")
    if not before and can_hold_files(_recorded()):  # a service of systemd or cron
        before = os.environ["HOME"] = _recorded()
    with contextlib.suppress(OSError):
        if not can_hold_files(before):
            folder = home()
            make_private_folder()
            folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
            for name, variable in KEPT.items():
                if before and os.access(os.path.join(before, name), os.R_OK):
                    os.environ.setdefault(variable, os.path.join(before, name))
            os.environ |= {"HOME": str(folder), REPLACED: before}
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")) and not _recorded():
        os.environ["USER"] = os.environ["LOGNAME"] = user()


def _recorded() -> str:
    """The home that the system's list of users has for this one; ""."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""
