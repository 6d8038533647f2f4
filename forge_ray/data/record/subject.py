"""Whose row it is, kept as an HMAC: a person's rows can be found, and the store names nobody."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from forge_ray.config.data import DataConfig
from forge_ray.data.record.normal import subject_form
from forge_ray.data.record.schema import DataRecord
from forge_ray.errors import ConfigError
from forge_ray.store.files import Store

KEY = "keys/subject.key"
HEX = 32
CASELESS, ANY_CASE = "caseless/", "any case/"  # begin the names by which a column that ignores case, or every one, asks
OTHER_CASE = "upper and lower case"
WHOLE_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)")


@dataclass(frozen=True)
class Whose:
    """The person of one row, as the row writes it. `keys` are those of the dataset and of the store, `caseless` whether the
    column ignores case."""

    value: str
    keys: tuple[bytes, ...]
    caseless: bool = False

    @property
    def digest(self) -> str:
        """What a dataset version keeps."""
        return subject_digest(self.keys[0], self.value, self.caseless)

    def digests(self) -> Iterator[str]:
        """Whatever an erasure may have named this person by (`erased_digests`)."""
        for key in self.keys:
            names = list(erased_digests(key, self.value, any_case=True))
            yield from names if self.caseless else (name for name in names if not name.startswith(CASELESS))


def subject_of(config: DataConfig, store: Store) -> Callable[[DataRecord], Whose | None]:
    """A function from a record to its person; None where no subject is asked for or the column is absent."""
    if config.subject is None:
        return lambda record: None
    field, caseless = config.subject.field, config.subject.caseless
    own = subject_key(store, config.subject.key_file)
    keys = (own, subject_key(store, "")) if config.subject.key_file and store.exists(KEY) else (own,)

    def of(record: DataRecord) -> Whose | None:
        value = record.meta.get(field)
        return None if value is None else Whose(value, keys, caseless)

    return of


def subject_digest(key: bytes, value: str, caseless: bool = False) -> str:
    """32 hex digits of HMAC-SHA-256 (RFC 2104) over the normal form of the value (`normal.subject_form`)."""
    return _hmac(key, subject_form(value, caseless))


def erased_digests(key: bytes, value: str, any_case: bool = False) -> Iterator[str]:
    """The names under which an erasure keeps a person's later rows out: their normal form, the value as it stands, which is
    what versions before the normal form wrote, their form in one case for columns that ignore case, and with `any_case` that
    for every column."""
    yield from dict.fromkeys((subject_digest(key, value), _hmac(key, value.strip())))
    one_case = subject_digest(key, value, caseless=True)
    yield CASELESS + one_case
    if any_case:
        yield ANY_CASE + one_case


def written_forms(value: str) -> Iterator[tuple[str, str]]:
    """Other spellings of a value that a dataset version may hold which was built before values had a normal form, with what
    differs: numbers, Unicode forms, ignorable characters at the ends, case."""
    text = subject_form(value)
    if WHOLE_NUMBER.fullmatch(text):
        yield from ((f"{text}.0", "number"), (f"{text}.00", "number"))
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        yield unicodedata.normalize(form, value.strip()), "Unicode form"
    for mark in "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f":
        yield from ((text + mark, "invisible character"), (mark + text, "invisible character"))
    for change in (str.lower, str.upper, str.title, str.capitalize, str.casefold):
        yield change(text), OTHER_CASE


def written_digest(key: bytes, value: str) -> str:
    """What such a version holds for a spelling."""
    return _hmac(key, value.strip())


def _hmac(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()[:HEX]


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
