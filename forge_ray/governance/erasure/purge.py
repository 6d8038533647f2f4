"""Deletion of files at the end of an erasure; each is listed with its digest first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from forge_ray.data.build import tombstones as erased
from forge_ray.errors import StoreError
from forge_ray.governance.erasure import closure
from forge_ray.governance.erasure.plan import ErasurePlan
from forge_ray.records import EvalReport, FileEntry, files_digest
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store


def folders(plan: ErasurePlan, weights: Iterable[str]) -> list[str]:
    """Folders that hold the rows or were derived from them. Records, metrics and reports stay: they quote no rows."""
    targets = []
    for dataset in plan.datasets:
        targets += [paths.dataset(dataset.id), paths.card(dataset.id), paths.index(dataset.id)]
    for run in plan.runs:
        if run.used:
            targets += [paths.checkpoints(run.id), paths.export(run.id)]
    return [*targets, *(paths.report(report.id) for report in plan.evals), *(paths.model(version) for version in weights)]


def files(store: Store, folder: str) -> tuple[FileEntry, ...]:
    """Every file of a folder with size and sha256, taken from its manifest where the folder is published."""
    if store.is_published(folder):
        return tuple(entry.model_copy(update={"path": f"{folder}/{entry.path}"}) for entry in store.files(folder))
    entries = []
    for path in store.list(folder, recursive=True):
        data = store.read(path)
        entries.append(FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return tuple(entries)


def lone_images(catalog: Catalog, plan: ErasurePlan) -> list[str]:
    """Images that only affected datasets contain."""
    affected = {dataset.id for dataset in plan.datasets}
    images = set().union(*(closure.images(catalog.store, dataset) for dataset in affected)) if affected else set()
    for manifest in catalog.datasets() if images else []:
        if manifest.id not in affected:
            images -= closure.images(catalog.store, manifest.id)
    return sorted(paths.image(name) for name in images)


def listed(catalog: Catalog, plan: ErasurePlan, weights: Iterable[str]) -> tuple[FileEntry, ...]:
    """Every file that will be deleted."""
    store = catalog.store
    entries = [entry for folder in folders(plan, weights) for entry in files(store, folder)]
    for path in lone_images(catalog, plan):
        if store.exists(path):
            data = store.read(path)
            entries.append(FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return tuple(sorted(entries, key=lambda entry: entry.path))


def purge(store: Store, plan: ErasurePlan, weights: Iterable[str], listing: tuple[FileEntry, ...]) -> str:
    """Delete the listed files, and the work area, which may hold any row. Repeatable. Returns the digest of the list."""
    for folder in folders(plan, weights):
        store.delete_dir(folder)
    for entry in listing:
        if entry.path.startswith(paths.image("")):
            store.delete(entry.path)
    store.delete_dir(paths.work())  # of builds and of reproductions
    return files_digest(listing)


def check_gone(catalog: Catalog, erasure: str) -> None:
    """Raise `StoreError` if a dataset version or the items of an evaluation still contain one of the rows."""
    store, tombstones = catalog.store, erased.of_erasure(catalog.store, erasure)
    for manifest in catalog.datasets():
        for _, table in closure.tables(store, manifest.id, ["record"]):
            if left := [record for record in table.column("record").to_pylist() if record and tombstones.has(record)]:
                raise StoreError(
                    f"{manifest.id} still holds {len(left)} of the rows of {erasure}",
                    hint="it was built after the plan: erase again with `--record` or `--file`, which makes a new plan",
                )
    for report in catalog.all(EvalReport):
        path = paths.items(report.id)
        if store.exists(path) and closure.quoting(store.read(path), tombstones.has):
            raise StoreError(
                f"{path} still quotes rows of {erasure}", hint="it was written in the meantime: run the same command again"
            )
