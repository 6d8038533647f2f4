"""Deletion of files at the end of an erasure; each is listed with its digest first."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable

import pyarrow.fs as pafs

from forge_ray.governance.erasure.leftovers import Accounts
from forge_ray.governance.erasure.plan import ErasurePlan
from forge_ray.records import FileEntry
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store, sha256_file
from forge_ray.store.walk import StoredFile
from forge_ray.train.frozen import MADE_BY

TRIES = 10


def folders(plan: ErasurePlan, weights: Iterable[str]) -> list[str]:
    """Folders that hold the rows or were derived from them. Records, metrics and reports stay: they quote no rows."""
    targets = []
    for dataset in plan.datasets:
        targets += [at(dataset.id) for at in (paths.dataset, paths.card, paths.index, paths.reference)]
    for run in plan.runs:
        if run.used:
            targets += [paths.checkpoints(run.id), paths.export(run.id)]
    return [*targets, *(paths.report(report.id) for report in plan.evals), *(paths.model(version) for version in weights)]


def used_runs(plan: ErasurePlan) -> set[str]:
    return {run.id for run in plan.runs if run.used}


def targets(catalog: Catalog, plan: ErasurePlan, weights: Iterable[str], accounts: Accounts) -> list[str]:
    """What will be deleted, as folders and files of the store, without the work area: what the plan names, what no record
    accounts for and no running process writes, and further names of these files."""
    chosen = [*folders(plan, weights), *(one.path for one in accounts.leftovers if not one.is_written)]
    chosen += numbers_of(catalog.store, {version.id for version in plan.versions}, accounts)
    names = {file.path for file in _inside(accounts, chosen)}
    numbers = {file.number for file in _inside(accounts, chosen) if file.num_names > 1}
    others = [file.path for file in accounts.files if file.number in numbers and file.path in accounts.strangers]
    return sorted({*chosen, *(path for path in others if path not in names)})


def numbers_of(store: Store, versions: set[str], accounts: Accounts) -> list[str]:
    """Folders of what these versions said of rows as a teacher or reference, also of rows that stay; and those that do not
    say whose numbers they hold. Runs compute again what they need."""
    made_by = {
        "/".join(parts[:3]): set[str]()
        for file in accounts.files
        if versions and (parts := file.path.split("/"))[0] == "references" and len(parts) == 4
        if not parts[2].startswith(".")  # half-built: a leftover, unless a process writes it
    }
    for folder in made_by:
        if store.exists(f"{folder}/{MADE_BY}"):
            made_by[folder] = set(store.read_json(f"{folder}/{MADE_BY}")["versions"])
    return [folder for folder, own in made_by.items() if not own or own & versions]


def names_elsewhere(accounts: Accounts, chosen: Iterable[str]) -> dict[str, int]:
    """File → how many more names (hard links) it has outside the store, where deleting it here does not remove its bytes."""
    inside = Counter(file.number for file in accounts.files)
    return {
        file.path: file.num_names - inside[file.number]
        for file in _inside(accounts, [*chosen, paths.work()])
        if file.num_names > inside[file.number]
    }


def _inside(accounts: Accounts, places: Iterable[str]) -> list[StoredFile]:
    chosen = set(places)
    return [file for file in accounts.files if not chosen.isdisjoint(_above(file.path))]


def _above(path: str) -> list[str]:
    """The path, and every folder that it lies in."""
    parts = path.split("/")
    return ["/".join(parts[:number]) for number in range(1, len(parts) + 1)]


def listed(store: Store, accounts: Accounts, chosen: Iterable[str]) -> tuple[FileEntry, ...]:
    """Every file that will be deleted, with size and sha256: from its manifest where the folder is published."""
    published: dict[str, FileEntry] = {}
    for place in chosen:
        if store.is_published(place):
            published |= {f"{place}/{entry.path}": entry for entry in store.files(place)}
    entries = []
    for file in _inside(accounts, chosen):
        if file.link:
            continue
        entry = published.get(file.path)
        if entry is None or entry.size != file.size:
            entry = FileEntry(path="file", size=file.size, sha256=_sha256(store, file.path))
        entries.append(entry.model_copy(update={"path": file.path}))
    return tuple(sorted(entries, key=lambda entry: entry.path))


def _sha256(store: Store, path: str) -> str:
    return sha256_file(store.local(path)) if store.is_local else hashlib.sha256(store.read(path)).hexdigest()


def purge(store: Store, chosen: Iterable[str]) -> None:
    """Delete the files and folders, and the work area, which may hold any row: its marks first, by which builds that run
    learn of it. Repeatable."""
    empty_work_area(store)
    for place in chosen:
        remove(store, place)


def empty_work_area(store: Store) -> None:
    """Delete what builds and reproductions have written; the leases of endpoints stay, which hold no row. One that is
    writing may put a file into a folder that is being deleted, so it is tried more than once."""
    for _ in range(TRIES - 1):
        try:
            return _empty(store)
        except OSError:
            time.sleep(0.2)
    _empty(store)


def _empty(store: Store) -> None:
    selector = pafs.FileSelector(store.path(paths.work()), allow_not_found=True)
    for info in store.filesystem.get_file_info(selector):
        place = info.path.removeprefix(store.root + "/")
        if place != paths.work(paths.ENDPOINTS):
            remove(store, place)


def remove(store: Store, place: str) -> None:
    """Delete a file or folder, or whatever has that name."""
    if store.filesystem.get_file_info(store.path(place)).type == pafs.FileType.Directory:
        store.delete_dir(place)
    else:
        store.delete(place)
