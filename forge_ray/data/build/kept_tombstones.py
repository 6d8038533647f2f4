"""Whether the tombstones are those that the audit log tells of: what was removed or changed is restored, or refused by name.

Each command that builds or erases looks first (`restore`); `forge audit verify` and `forge doctor` look too (`problems`) and
write nothing. The log holds the content of every file, and the records of erasures, which it covers too, say which of them
must have tombstones.
"""

from __future__ import annotations

import json

from forge_ray.data.build import tombstones
from forge_ray.errors import StoreError
from forge_ray.records import Erasure, canonical_json
from forge_ray.store import paths
from forge_ray.store.files import Store
from forge_ray.store.standing import Standing


def problems(store: Store) -> list[str]:
    """What is wrong with the tombstones, each with the name of its file or erasure."""
    logged = _logged(store)
    return [*_differences(store, logged), *_unlogged(store, logged), *_without(store)]


def restore(store: Store) -> list[str]:
    """Write tombstones that were removed or changed as the log has them, and put those of older versions into the log;
    returns what was restored. Raises `StoreError` for files that the log does not tell of, and for erasures without any."""
    logged = _logged(store)
    if unlogged := _unlogged(store, logged):
        raise StoreError(
            f"{unlogged[0]}; rows could be left out of datasets that nobody erased",
            hint="remove the file, or restore the audit log; `forge audit verify` says more",
        )
    restored = list(_differences(store, logged))
    for path, content in logged.items():
        if not store.exists(path) or store.read(path) != content:
            store.write(path, content)
    if missing := _without(store):
        raise StoreError(
            f"{missing[0]}: its rows would come back", hint="restore the folders tombstones and erasures from a backup"
        )
    _adopt(store, logged)
    return restored


def _logged(store: Store) -> dict[str, bytes]:
    """Path → content of every file of tombstones in the log."""
    standing = Standing(store, paths.TOMBSTONES)
    standing.refresh()
    return {path: canonical_json(body) for path, line in standing.files.items() if (body := line.body()) is not None}


def _differences(store: Store, logged: dict[str, bytes]) -> list[str]:
    differences = []
    for path, content in logged.items():
        if not store.exists(path):
            differences.append(f"{path} was removed")
        elif store.read(path) != content:
            differences.append(f"{path} was changed")
    return differences


def _unlogged(store: Store, logged: dict[str, bytes]) -> list[str]:
    return [f"{path} is in no line of the audit log" for path in store.list(paths.tombstone()) if path not in logged]


def _without(store: Store) -> list[str]:
    """Erasures on record that have no tombstones."""
    names = [path.rsplit("/", 1)[-1].removesuffix(".json") for path in store.list(paths.of_kind(Erasure.kind))]
    return [f"the tombstones of {name} are missing" for name in names if not tombstones.files_of(store, name)]


def _adopt(store: Store, logged: dict[str, bytes]) -> None:
    """Tombstones of older versions get their line in the log, as a copy."""
    known_keys = {key for content in logged.values() for key in json.loads(content)["keys"]}
    for path in store.list(paths.erasure()):
        content = store.read_json(path)
        if not known_keys.issuperset(content["keys"]):
            erasure = path.rsplit("/", 1)[-1].removesuffix(".json")
            tombstones.publish(store, erasure, content["keys"], [], content["made_with"])
