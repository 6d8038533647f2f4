"""Rows that may never be used again: tombstones, which every build obeys and from which nothing can be guessed.

    erasures/<er>.json     {"keys": […], "made_with": …}

`keys` are HMAC-SHA-256 of record ids and of subject keys under the store's own key, and `made_with` says which key that was.

A row is left out where it is read, before any rule; where rules change rows, also by what they made of it. So the rest
of a build goes as if the row had never been in its file.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from forge_ray.data.build.work import WORK
from forge_ray.data.record.schema import DataRecord
from forge_ray.data.record.subject import KEY, subject_key
from forge_ray.errors import StoreError
from forge_ray.records import canonical_json, digest, hex_of
from forge_ray.store import paths
from forge_ray.store.files import Store


def key_of(key: bytes, value: str) -> str:
    """The tombstone of a record id (`rec_…`) or of a subject's HMAC, apart from other uses of the key."""
    return hmac.digest(key, b"erased/" + value.encode(), "sha256").hex()


def write_tombstones(store: Store, erasure: str, values: Iterable[str]) -> None:
    """Record ids and subject keys that no build may use from now on; what is there already stays."""
    key, path = subject_key(store, ""), paths.erasure(f"{erasure}.json")
    keys = {key_of(key, value) for value in values}
    if store.exists(path):
        keys.update(store.read_json(path)["keys"])
    store.write(path, canonical_json({"keys": sorted(keys), "made_with": key_of(key, "made with")}))


def of_erasure(store: Store, erasure: str) -> Erased:
    """The tombstones of one erasure."""
    return Erased(subject_key(store, ""), frozenset(store.read_json(paths.erasure(f"{erasure}.json"))["keys"]))


def tombstones(store: Store) -> str:
    """A name for all tombstones of the store as they are now, under which workers find them; "" where there are none. Raises
    `StoreError` where the key that they were made with is gone: erased rows would not be known."""
    hmacs: set[str] = set()
    for path in store.list(paths.erasure()):
        value = store.read_json(path)
        if not store.exists(KEY) or value["made_with"] != key_of(store.read(KEY).strip(), "made with"):
            raise StoreError(f"{KEY} is not the key that {path} was made with", hint=f"restore {KEY} from a backup")
        hmacs.update(value["keys"])
    if not hmacs:
        return ""
    keys = sorted(hmacs)
    name = hex_of(digest(keys))[:32]
    if not store.exists(_path(name)):
        store.write(_path(name), canonical_json(keys))
    return name


def _path(name: str) -> str:
    return f"{WORK}/erased-{name}.json"


@dataclass(frozen=True)
class Erased:
    """Whether a record is among the tombstones."""

    key: bytes
    keys: frozenset[str]

    def has(self, value: str) -> bool:
        return bool(self.keys) and key_of(self.key, value) in self.keys

    def holds(self, record: DataRecord, subject: str | None) -> bool:
        return bool(self.keys) and (self.has(record.id) or (subject is not None and self.has(subject)))


@lru_cache(maxsize=4)
def read(store: Store, name: str) -> Erased:
    """The tombstones of that name; of "" none."""
    if not name:
        return Erased(b"", frozenset())
    return Erased(subject_key(store, ""), frozenset(store.read_json(_path(name))))


def fingerprint_of(store: Store, value: str) -> str:
    """What a certificate says of whom it is about: an HMAC that the store's key alone can make again."""
    return hmac.new(subject_key(store, ""), b"certificate/" + value.strip().encode(), hashlib.sha256).hexdigest()
