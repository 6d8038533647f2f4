"""The key that authenticates manifests of checkpoints: whoever can write files of a store, and has no key, makes none.

    keys/checkpoints.key         in a local or mounted store: made when it is first needed, readable by its owner alone
    FORGE_CHECKPOINT_KEY=FILE    for a remote store, which its writers can also read; or where several accounts share runs

The file holds 64 hex digits. A manifest carries an HMAC-SHA256 (RFC 2104) over everything else that it says. The key reaches
a worker as a file of its host, as the token of the cluster does: never in an argument, a setting or a log.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

from forge_ray.errors import ConfigError, PolicyError
from forge_ray.records import canonical_json
from forge_ray.store import paths
from forge_ray.store.files import Store, fsync_dir
from forge_ray.store.home import expanded

VARIABLE = "FORGE_CHECKPOINT_KEY"
PURPOSE = b"forge_ray: manifest of a checkpoint\n"
KEY = re.compile(rb"[0-9a-f]{64}")
MAKE = f"(umask 077; openssl rand -hex 32 >~/.forge_checkpoint.key), and its path as {VARIABLE} on each host"


def manifest_key(store: Store) -> bytes:
    """The key of this store; that of a local store is made where there is none. Raises `ConfigError` where a remote store
    has none, or the file holds none; `PolicyError` where others could have read or written it."""
    if named := os.environ.get(VARIABLE, ""):
        return _read(expanded(named), 0o027, f"{VARIABLE} names {named}, which")
    if not store.is_local:
        raise ConfigError(
            f"{store.place} is a remote store, and {VARIABLE} names no key to authenticate its checkpoints with",
            hint=f"{MAKE}, before `ray start`; copy the file to every host of the cluster (scp -p)",
        )
    path = store.local(paths.CHECKPOINT_KEY)
    if not path.is_symlink() and not path.exists():
        _make(path)
    return _read(path, 0o077, str(path), owners=(os.geteuid(), 0, Path(store.root).stat().st_uid))


def authentication(store: Store, value: Any) -> str:
    """The HMAC of a manifest without its own, 64 hex digits."""
    return hmac.new(manifest_key(store), PURPOSE + canonical_json(value), "sha256").hexdigest()


def require_authentic(store: Store, place: str, value: Any, stated: Any) -> None:
    """Raise `PolicyError` unless `stated` is the HMAC of the manifest at `place`."""
    if not isinstance(stated, str) or not stated:
        raise PolicyError(
            f"the manifest of {place} is not authenticated: an earlier version wrote it, or it was made anew",
            hint=f"if nobody else could write there: forge runs authenticate {place.split('/')[1]}; else remove {place}",
        )
    if not hmac.compare_digest(authentication(store, value).encode(), stated.encode(errors="surrogatepass")):
        raise PolicyError(
            f"the manifest of {place} was not made with this store's key: it was made anew, or the key is another one",
            hint=f"is {VARIABLE}, or {paths.CHECKPOINT_KEY} of the store, the key that wrote it? else remove {place}; the"
            " checkpoint before it is used",
        )


def _make(path: Path) -> None:
    """Complete before it has its name; of two processes that make one at once the first one's stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".new-{os.getpid()}-{secrets.token_hex(4)}")
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(secrets.token_hex(32).encode())
        stream.flush()
        os.fsync(stream.fileno())
    with contextlib.suppress(FileExistsError):
        os.link(aside, path)
    aside.unlink()
    fsync_dir(path.parent)


def _read(path: Path, forbidden: int, name: str, owners: tuple[int, ...] = ()) -> bytes:
    """The key in a file, which is opened once: what is looked at is what is read. With `owners` it is no link either."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (os.O_NOFOLLOW if owners else 0))
    except OSError as error:
        raise ConfigError(
            f"{name} cannot be read: {error.strerror}",
            hint=f"accounts that share runs share a key: {MAKE}, each with a copy of its own",
        ) from None
    with os.fdopen(handle, "rb") as stream:
        state = os.fstat(handle)
        if owners and state.st_uid not in owners:
            raise PolicyError(
                f"{name} belongs to the user id {state.st_uid}, not to this account: whoever made it knows it",
                hint=f"find out who made it, and remove it; accounts that share runs share a key by {VARIABLE}",
            )
        if not stat.S_ISREG(state.st_mode) or state.st_mode & forbidden:
            raise PolicyError(
                f"{name} has mode {stat.S_IMODE(state.st_mode):o}: others than its owner can use it",
                hint=f"chmod 600 {path}",
            )
        key = stream.read(1024).strip()
    if not KEY.fullmatch(key):
        raise ConfigError(f"{name} does not hold a key, which is 64 hex digits", hint=MAKE)
    return key
