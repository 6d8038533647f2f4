"""What this machine holds of the stores that it has seen: their genesis, and how far their logs went.

A store's identity is the digest of the event that named its first owner. Somebody who can write all its files can put
another store in its place, or an earlier day of it; what is noted elsewhere shows that: here, in the settings
(`FORGE_STORE_ID`), in deployments and certificates.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path

from forge_ray.errors import PolicyError
from forge_ray.store.files import Store
from forge_ray.store.home import state_file
from forge_ray.store.standing import Standing
from forge_ray.store.uris import shown

STORE_ID = "FORGE_STORE_ID"
FILE = "stores.json"


def check(standing: Standing) -> None:
    """Raise `PolicyError` where the store is not the one that this machine or `FORGE_STORE_ID` holds, or an earlier day of
    it."""
    require(standing, os.environ.get(STORE_ID, ""), "", f"{STORE_ID} holds")
    noted = _read()
    if (uri := standing.store.uri) in noted:
        require(standing, noted[uri]["genesis"], noted[uri]["head"], f"{file()} holds")


def note(standing: Standing) -> None:
    """Note how far the log of a store goes. One without signers has no identity and is not noted."""
    if genesis := standing.authority.genesis:
        _write(_read() | {standing.store.uri: {"genesis": genesis, "head": standing.reader.head}})


def require(standing: Standing, genesis: str, head: str, holder: str) -> None:
    """Raise `PolicyError` unless the store has this genesis and its log holds this head ("" for either: not asked)."""
    place = shown(standing.store.uri)
    if genesis and genesis != standing.authority.genesis:
        shows = standing.authority.genesis or "none: it has no signers"
        raise PolicyError(
            f"{place} is not the store that {holder}: its id is {shows}, not {genesis}",
            hint="ask an owner which id is right (`forge signers list`); `forge catalog trust` takes the store as it is now",
        )
    number, _, line_hash = head.partition(":")
    hashes = standing.reader.hashes
    if head and (int(number) > len(hashes) or hashes[int(number) - 1] != line_hash):
        raise PolicyError(
            f"the audit log of {place} does not hold line {number}, which {holder}: the log was cut, rewritten or put back",
            hint="compare with a backup and `forge audit verify`; `forge catalog trust` takes the store as it is now",
        )


def forget(store: Store) -> bool:
    """Forget what this machine holds of a store; whether it held anything."""
    noted = _read()
    if noted.pop(store.uri, None) is None:
        return False
    _write(noted)
    return True


def head_of(store: Store) -> str:
    """How far the log of a store went when this machine last saw it; ""."""
    return _read().get(store.uri, {}).get("head", "")


def id_of(uri: str) -> str:
    """The id that `FORGE_STORE_ID` or this machine holds for a store; ""."""
    return os.environ.get(STORE_ID, "") or _read().get(uri, {}).get("genesis", "")


def file() -> Path:
    """Of this user: `~/.local/state/forge_ray/stores.json`."""
    return state_file(FILE)


def _read() -> dict[str, dict[str, str]]:
    try:
        noted = json.loads(file().read_text())
        return {uri: {"genesis": str(entry["genesis"]), "head": str(entry["head"])} for uri, entry in noted.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise PolicyError(
            f"{file()} cannot be read: {error}", hint="restore it, or remove it: the stores are then taken as they are"
        ) from None


def _write(noted: dict[str, dict[str, str]]) -> None:
    """Atomically, for the user alone. A home that cannot be written holds nothing."""
    with contextlib.suppress(OSError):
        path = file()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f".{FILE}-{uuid.uuid4().hex}")
        with open(temporary, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
            json.dump(noted, stream, indent=1, sort_keys=True)
        os.replace(temporary, path)
