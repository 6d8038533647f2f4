"""Versions that are made of other versions of the store, files first: what is half-made is under no version's name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from forge_ray.records import ModelVersion, files_digest
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.erased import refuse_erased
from forge_ray.store.owner import owner_mark


def make_version(
    catalog: Catalog,
    parents: Sequence[ModelVersion],
    write: Callable[[Path], None],
    status: Literal["imported", "merged"],
    name: str,
    source: str,
    added_tokens: tuple[str, ...] = (),
) -> ModelVersion:
    """The version of the full weights that `write` puts into an empty folder; its licence is that of the first of `parents`,
    whose id it names. An erasure waits for the folder, and one that came in between takes it back."""
    parent, store = parents[0], catalog.store
    staging = paths.model(f".building-{parent.id}-{owner_mark()}")
    try:
        with store.staged_dir(staging) as folder:
            write(folder)
        files = store.files(staging)
        version = ModelVersion(
            name=name,
            status=status,
            weights="full",
            files=files,
            files_digest=files_digest(files),
            base_model=parent.id,
            added_tokens=added_tokens,
            licence=parent.licence,
            source=source,
        ).sealed()
        is_known = catalog.has(version.id)
        store.move_dir(staging, paths.model(version.id))
        for origin in parents:
            refuse_erased(store, version.id, version=origin.id, folder="" if is_known else paths.model(version.id))
        return catalog.put(version)
    finally:
        store.delete_dir(staging)
