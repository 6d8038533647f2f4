"""Whose row it is, kept as an HMAC: a person's rows can be found, and the store names nobody."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from forge_ray.config.data import DataConfig
from forge_ray.data.record.schema import DataRecord
from forge_ray.errors import ConfigError
from forge_ray.store.files import Store

KEY = "keys/subject.key"
HEX = 32


def subject_of(config: DataConfig, store: Store) -> Callable[[DataRecord], str | None]:
    """A function from a record to its subject's HMAC; None where no subject is asked for or the column is absent."""
    if config.subject is None:
        return lambda record: None
    field, key = config.subject.field, subject_key(store, config.subject.key_file)

    def of(record: DataRecord) -> str | None:
        value = record.meta.get(field)
        return None if value is None else subject_digest(key, value)

    return of


def subject_digest(key: bytes, value: str) -> str:
    """32 hex digits of HMAC-SHA-256 (RFC 2104) over the value without surrounding white space."""
    return hmac.new(key, value.strip().encode(), hashlib.sha256).hexdigest()[:HEX]


@lru_cache(maxsize=4)
def subject_key(store: Store, key_file: str) -> bytes:
    """The key; the store's own is made, readable by its owner alone, when it is absent."""
    if key_file:
        path = Path(key_file).expanduser()
        if not path.is_file() or len(path.read_bytes().strip()) < 16:
            raise ConfigError(
                f"data.subject.key_file={key_file!r} is no file of at least 16 bytes",
                hint="write one, readable by its owner alone: openssl rand -hex 32",
            )
        return path.read_bytes().strip()
    if not store.exists(KEY):
        _make(store, secrets.token_hex(32).encode())
    return store.read(KEY).strip()


def _make(store: Store, key: bytes) -> None:
    """Never readable by others, not for a moment; of two processes that make one at once the first one's stays."""
    if not store.is_local:
        store.create(KEY, key)
        return
    path = store.local(KEY)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".new-{os.getpid()}")
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(key)
        stream.flush()
        os.fsync(stream.fileno())
    with contextlib.suppress(FileExistsError):
        os.link(aside, path)
    aside.unlink()
