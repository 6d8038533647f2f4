"""What Ray writes outside the store, kept from other users of the machine: its sessions, and the token of a cluster.

Ray makes its folders writable by everyone (0777), whatever the umask, and its token readable by everyone (0644). So the
folder that it is given lies in one that only its owner may enter, and the token is there before Ray looks for it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from forge_ray.store.home import PRIVATE, home, make_private_folder, private_folder

CLUSTER_FILE = "ray_current_cluster"  # in which `ray start` leaves the address of the cluster


def session_folder() -> str:
    """A folder for Ray's sessions that no other user can enter, made if absent. Raises `ClusterError` where another user
    owns the one of that name, or has left a link there."""
    return str(make_private_folder() / "ray")


def make_token_private() -> None:
    """Make the token that Ray requires for a cluster of this machine before Ray does, or take the permissions of others from
    it. Nothing where the token is not in a file, or not asked for."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or home() / ".ray/auth_token")
    if path.exists():
        if path.stat().st_mode & 0o077 and path.stat().st_uid == os.getuid():
            path.chmod(0o600)
        return
    path.parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    aside = path.with_name(f".auth_token-{os.getpid()}")  # linked when it is complete: another process may look now
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):
        os.link(aside, path)
    aside.unlink()


def current_cluster() -> str:
    """The address of the cluster that the scripts of `cluster/bare` started on this machine; "" where there is none, or
    where another user could have written it."""
    folder = private_folder()
    try:
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
            return ""
        return (folder / "ray" / CLUSTER_FILE).read_text().strip()
    except OSError:
        return ""
