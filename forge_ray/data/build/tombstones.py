"""Rows that may never be used again: tombstones, which every build obeys and from which nothing can be guessed.

    tombstones/<er>-<digest>.json     {"keys": […], "texts": […], "made_with": …}
    erasures/<er>.json                the same, of versions that did not put them into the audit log

`keys` are HMAC-SHA-256 of record ids and of subjects, `texts` those of the normal forms of rows (`data/record/normal.py`),
all under the store's own key; `made_with` says which key that was. The files are written once, each with its line in the
audit log, which holds the content: one that was removed or changed is restored from there before a build, and named.

A row is left out where it is read, before any rule; where rules change rows, also by what they made of it. So the rest
of a build goes as if the row had never been in its file.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from forge_ray.data.build.work import WORK
from forge_ray.data.record.normal import row_digests
from forge_ray.data.record.schema import DataRecord
from forge_ray.data.record.subject import KEY, Whose, subject_key
from forge_ray.errors import StoreError
from forge_ray.records import canonical_json, digest, hex_of
from forge_ray.store import audit_log, paths
from forge_ray.store.files import Store

TEXT = "text/"  # begins the value of a tombstone that is a row's normal form (`row_digest`)
ANSWER = "answer/"  # begins one that is the id of an answer that an endpoint kept


def key_of(key: bytes, value: str) -> str:
    """The tombstone of a record id (`rec_…`), of a subject's HMAC or of a row's form, apart from other uses of the key."""
    return hmac.digest(key, b"erased/" + value.encode(), "sha256").hex()


def write_tombstones(store: Store, erasure: str, values: Iterable[str]) -> None:
    """Record ids, subjects (`erased_digests`) and forms of rows (`TEXT` + `row_digest`) that no build may use from now on.
    What is there already stays."""
    key = subject_key(store, "")
    new: dict[str, set[str]] = {"keys": set(), "texts": set()}
    for value in values:
        new["texts" if value.startswith(TEXT) else "keys"].add(key_of(key, value))
    before = [store.read_json(path) for path in files_of(store, erasure)]
    for name, hmacs in new.items():
        hmacs.difference_update(*(value.get(name, ()) for value in before))
    if before and not any(new.values()):
        return
    publish(store, erasure, new["keys"], new["texts"], key_of(key, "made with"))


def publish(store: Store, erasure: str, keys: Iterable[str], texts: Iterable[str], made_with: str) -> None:
    """Write one file of tombstones, as HMACs, with its line in the audit log."""
    content = {"keys": sorted(keys), "texts": sorted(texts), "made_with": made_with}
    path = paths.tombstone(f"{erasure}-{hex_of(digest(content))[:16]}.json")
    audit_log.publish(store, path, canonical_json(content), "tombstones.add", erasure)


def files_of(store: Store, erasure: str) -> list[str]:
    """The files with the tombstones of one erasure."""
    older = paths.erasure(f"{erasure}.json")
    named = [path for path in store.list(paths.tombstone()) if path.startswith(paths.tombstone(f"{erasure}-"))]
    return [*named, *([older] if store.exists(older) else [])]


def of_erasure(store: Store, erasure: str) -> Erased:
    """The tombstones of one erasure."""
    contents = [store.read_json(path) for path in files_of(store, erasure)]
    return Erased(subject_key(store, ""), _union(contents, "keys"), _union(contents, "texts"))


def of_values(store: Store, values: Iterable[str]) -> Erased:
    """What tombstones of these values would cover, as `write_tombstones` takes them. Writes none."""
    key, listed = subject_key(store, ""), list(values)
    texts = frozenset(key_of(key, value) for value in listed if value.startswith(TEXT))
    return Erased(key, frozenset(key_of(key, value) for value in listed if not value.startswith(TEXT)), texts)


def _union(contents: list[dict[str, Any]], name: str) -> frozenset[str]:
    return frozenset(hmac for content in contents for hmac in content.get(name, ()))


def tombstones(store: Store) -> str:
    """A name for all tombstones of the store as they are now, under which workers find them; "" where there are none. Raises
    `StoreError` where the key that they were made with is gone: erased rows would not be known."""
    contents = []
    for path in _all_files(store):
        content = store.read_json(path)
        if not store.exists(KEY) or content["made_with"] != key_of(store.read(KEY).strip(), "made with"):
            raise StoreError(f"{KEY} is not the key that {path} was made with", hint=f"restore {KEY} from a backup")
        contents.append(content)
    keys, texts = sorted(_union(contents, "keys")), sorted(_union(contents, "texts"))
    if not keys and not texts:
        return ""
    value: Any = {"keys": keys, "texts": texts} if texts else keys  # as before where there are no forms of rows
    name = hex_of(digest(value))[:32]
    if not store.exists(_path(name)):
        store.write(_path(name), canonical_json(value))
    return name


def _all_files(store: Store) -> list[str]:
    return [*store.list(paths.erasure()), *store.list(paths.tombstone())]


def _path(name: str) -> str:
    return f"{WORK}/erased-{name}.json"


@dataclass(frozen=True)
class Erased:
    """Whether a row is among the tombstones."""

    key: bytes
    keys: frozenset[str]
    texts: frozenset[str] = frozenset()

    def has(self, value: str) -> bool:
        """Whether a record id or a subject's digest is."""
        return bool(self.keys) and key_of(self.key, value) in self.keys

    def has_text(self, record: DataRecord) -> bool:
        """Whether a row with the same normal form is."""
        return bool(self.texts) and any(key_of(self.key, TEXT + form) in self.texts for form in row_digests(record))

    def holds(self, record: DataRecord, whose: Whose | None) -> bool:
        if not self.keys and not self.texts:
            return False
        return self.has(record.id) or any(map(self.has, whose.digests() if whose else ())) or self.has_text(record)


@lru_cache(maxsize=4)
def read(store: Store, name: str) -> Erased:
    """The tombstones of that name; of "" none. Raises `StoreError` where the file of that name holds others."""
    if not name:
        return Erased(b"", frozenset())
    value = store.read_json(_path(name))
    if hex_of(digest(value))[:32] != name:
        raise StoreError(f"{_path(name)} was changed: it lists other tombstones", hint="`forge data clean` removes it")
    keys, texts = (value["keys"], value["texts"]) if isinstance(value, dict) else (value, ())
    return Erased(subject_key(store, ""), frozenset(keys), frozenset(texts))


def fingerprint_of(store: Store, value: str) -> str:
    """What a certificate says of whom it is about: an HMAC that the store's key alone can make again."""
    return hmac.new(subject_key(store, ""), b"certificate/" + value.strip().encode(), hashlib.sha256).hexdigest()
