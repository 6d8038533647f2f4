"""Records as a server reads them, one by one and without a catalogue: each is what its id says."""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError

from forge_ray.errors import StoreError
from forge_ray.records import Record
from forge_ray.store import paths
from forge_ray.store.files import Store

R = TypeVar("R", bound=Record)
RESTORE = "restore the store from a backup"


def read_record(store: Store, kind: type[R], identifier: str) -> R:
    """Raises `StoreError` where the record is none, or was changed: its id follows from its content."""
    path = paths.record(kind.kind, identifier)
    try:
        record = kind.model_validate(store.read_json(path))
    except ValidationError:
        raise StoreError(f"{path} holds no record", hint=RESTORE) from None
    if record.id != identifier or record.sealed().id != identifier:
        raise StoreError(f"the record of {identifier} was changed", hint=RESTORE)
    return record
