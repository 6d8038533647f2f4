"""What is deleted at the end of an erasure, named with its digests before it goes."""

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
    """What holds the rows, or learned from them. Records, metrics and reports stay: they say what was, and quote nothing."""
    found = []
    for dataset in plan.datasets:
        found += [paths.dataset(dataset.id), paths.card(dataset.id), paths.index(dataset.id)]
    for run in plan.runs:
        if run.used:
            found += [paths.checkpoints(run.id), paths.export(run.id)]
    return [*found, *(paths.report(report.id) for report in plan.evals), *(paths.model(version) for version in weights)]


def files(store: Store, folder: str) -> tuple[FileEntry, ...]:
    """Every file of a folder with its size and sha256: from its manifest where it was published."""
    if store.is_published(folder):
        return tuple(entry.model_copy(update={"path": f"{folder}/{entry.path}"}) for entry in store.files(folder))
    found = []
    for path in store.list(folder, recursive=True):
        data = store.read(path)
        found.append(FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return tuple(found)


def lone_images(catalog: Catalog, plan: ErasurePlan) -> list[str]:
    """Images that no dataset but the affected ones shows."""
    gone = {dataset.id for dataset in plan.datasets}
    mine = set().union(*(closure.images(catalog.store, dataset) for dataset in gone)) if gone else set()
    for manifest in catalog.datasets() if mine else []:
        if manifest.id not in gone:
            mine -= closure.images(catalog.store, manifest.id)
    return sorted(paths.image(name) for name in mine)


def listed(catalog: Catalog, plan: ErasurePlan, weights: Iterable[str]) -> tuple[FileEntry, ...]:
    """All that is to go, before anything goes."""
    store = catalog.store
    found = [entry for folder in folders(plan, weights) for entry in files(store, folder)]
    for path in lone_images(catalog, plan):
        if store.exists(path):
            data = store.read(path)
            found.append(FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return tuple(sorted(found, key=lambda entry: entry.path))


def purge(store: Store, plan: ErasurePlan, weights: Iterable[str], listing: tuple[FileEntry, ...]) -> str:
    """Delete what was listed, and the work area, whose pieces may hold any row. Again is fine. Returns the list's digest."""
    for folder in folders(plan, weights):
        store.delete_dir(folder)
    for entry in listing:
        if entry.path.startswith(paths.image("")):
            store.delete(entry.path)
    store.delete_dir(paths.work())  # of builds and of reproductions
    return files_digest(listing)


def check_gone(catalog: Catalog, erasure: str) -> None:
    """Raise `StoreError` where a dataset version or the items of an evaluation still hold one of the rows."""
    store, gone = catalog.store, erased.of_erasure(catalog.store, erasure)
    for manifest in catalog.datasets():
        for _, table in closure.tables(store, manifest.id, ["record"]):
            if left := [record for record in table.column("record").to_pylist() if record and gone.has(record)]:
                raise StoreError(
                    f"{manifest.id} still holds {len(left)} of the rows of {erasure}",
                    hint="it came after the plan: ask once more by `--record` or `--file`, which makes a new plan",
                )
    for report in catalog.all(EvalReport):
        path = paths.items(report.id)
        if store.exists(path) and closure.quoting(store.read(path), gone.has):
            raise StoreError(
                f"{path} still quotes rows of {erasure}", hint="it was written meanwhile: give the same command once more"
            )
