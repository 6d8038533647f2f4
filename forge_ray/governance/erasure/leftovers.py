"""What lies in a store and is of no record: half-built and hidden folders, orphans, files that nobody knows.

Decided by what is on the disk, hidden or not; records say only which folders are accounted for. A leftover of a process that
runs is waited for, since its owner finds out by itself that it may not publish; one of a process that ended is removed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from forge_ray.governance.erasure import closure
from forge_ray.governance.impact import StoreUses
from forge_ray.records import DatasetManifest, Erasure, EvalReport, FileEntry, ModelVersion
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.erased import withdrawn
from forge_ray.store.files import names_in
from forge_ray.store.owner import MARK, is_alive
from forge_ray.store.walk import StoredFile, every_file, folders
from forge_ray.train import attempts, metrics, run_folder

# folders and files at the root of a store that hold facts, keys, counts and curves, never a row or a weight
FACTS = (
    *(paths.RECORDS, paths.EVENTS, paths.AUDIT, paths.TOMBSTONES),
    *("signatures", "erasures", "environments", "keys", "usage"),
)
FACT_FILES = (paths.INDEX_FILE, paths.MLFLOW_FILE)
# what stays of a run that learned from erased rows
KEPT_OF_RUN = {
    *(metrics.METRICS, metrics.CURVE, "diagnosis.md", "result.json", "adapter.json", attempts.DRIVER),
    *("attempts", "incidents", "validations", "stacks", "tensorboard"),
}
IMPORTS = (".importing-", ".tmp-.importing-")  # they come from outside the store
Registered = dict[str, dict[str, frozenset[str]]]
LATELY_S = 10.0  # between the last byte of a folder and its record
QUIET_S = 60.0  # a process of another machine that has written nothing for so long has ended


@dataclass(frozen=True)
class Leftover:
    """A file or folder that no record accounts for; `is_written`: a process that runs is writing it."""

    path: str
    is_written: bool


@dataclass(frozen=True)
class Accounts:
    """The content of a store by who accounts for it. `files`: every file; `strangers`: files that forge_ray does not write;
    `imports`: imports that are running; `links`: symbolic links → where they lead, which is not followed."""

    files: tuple[StoredFile, ...]
    leftovers: tuple[Leftover, ...]
    strangers: tuple[str, ...]
    imports: tuple[str, ...]
    links: dict[str, str]


def accounts_of(catalog: Catalog, used_runs: Iterable[str] = ()) -> Accounts:
    """`used_runs`: runs that learned from erased rows, besides those that the records of erasures name."""
    catalog.sync()
    files = tuple(every_file(catalog.store))
    registered = _registered(catalog)
    runs = _used_runs(catalog) | set(used_runs)
    newest: dict[str, float] = {}
    strangers, links = [], {}
    for file in files:
        if file.link:
            links[file.path] = file.link
        elif place := _place(file.path, registered, runs):
            newest[place] = max(newest.get(place, 0.0), file.modified)
        elif place is None:
            strangers.append(file.path)
    newest |= {f"{paths.image('')}{name}": 0.0 for name in _unseen_images(catalog, files)}
    is_building = any(is_alive(file.path) for file in files if "/begun-" in file.path)
    leftovers = tuple(Leftover(place, _is_written(place, at, is_building)) for place, at in sorted(newest.items()))
    imports = tuple(one.path for one in leftovers if one.is_written and one.path.split("/")[-1].startswith(IMPORTS))
    return Accounts(files, tuple(one for one in leftovers if one.path not in imports), tuple(strangers), imports, links)


def _registered(catalog: Catalog) -> Registered:
    """Folder → the names in it that records account for, with the files that each lists, none where it lists none. Dataset
    versions that an erasure withdrew are not accounted for."""
    erased = withdrawn(catalog.store).datasets
    datasets = {one.id: _names(one.files) for one in catalog.all(DatasetManifest) if one.id not in erased}
    derived = dict.fromkeys(datasets, frozenset[str]())
    return {
        "datasets": datasets,
        "index": derived,
        "cards": derived,
        "references": derived,
        "models": {version.id: _names(version.files) for version in catalog.all(ModelVersion)},
        "evals": {report.id: frozenset() for report in catalog.all(EvalReport)},
    }


def _names(files: tuple[FileEntry, ...]) -> frozenset[str]:
    return frozenset(names_in(files)) if files else frozenset()


def _used_runs(catalog: Catalog) -> set[str]:
    """Runs that learned from erased rows, and unfinished ones that would have, or of which nothing says on what they are."""
    runs = {run["id"] for erasure in catalog.all(Erasure) for run in erasure.plan.get("runs", ()) if run.get("used")}
    current, recorded = withdrawn(catalog.store), StoreUses.of(catalog).runs
    unfinished = {
        run.run
        for run in recorded.values()
        if not catalog.has(run.run)
        if run.dataset in current.datasets or not current.versions.keys().isdisjoint(run.starts_from) or not run.dataset
    }
    unfinished |= {place.rsplit("/", 1)[-1] for place in folders(catalog.store, paths.run())} - recorded.keys()
    living = attempts.drivers(catalog.store) if unfinished else {}
    return runs | {run for run in unfinished if paths.run(run) not in living}


def _place(path: str, registered: Registered, runs: set[str]) -> str | None:
    """The file or folder that is left over with this file; "" where a record accounts for it; None for a stranger's file."""
    parts = path.split("/")
    top, hidden = parts[0], next((n for n, part in enumerate(parts) if part.startswith(".")), None)
    if top == paths.work():
        return "/".join(parts[: hidden + 1]) if hidden else ""
    if top == paths.answers():
        return "/".join(parts[: hidden + 1]) if hidden else ""
    if top in FACTS or top.startswith(FACT_FILES) or top == "images":
        return ""
    if hidden == 0 or (hidden == 1 and top in (*registered, paths.run())):
        return "/".join(parts[: hidden + 1])
    if len(parts) == 1 or top not in (*registered, paths.run()):
        return None
    if top == paths.run():
        is_kept = parts[1] not in runs or len(parts) < 3 or parts[2] in KEPT_OF_RUN or parts[2].startswith(run_folder.CONFIG)
        return "" if is_kept else "/".join(parts[:3])
    if parts[1] not in registered[top]:
        return "/".join(parts[:2])
    if hidden:
        return "/".join(parts[: hidden + 1])
    names = registered[top][parts[1]]
    return None if names and "/".join(parts[2:]) not in names else ""


def _unseen_images(catalog: Catalog, files: Iterable[StoredFile]) -> Iterator[str]:
    """Images that no dataset version shows which is there and stays."""
    stored = {name for file in files if file.path.startswith(paths.image("")) for name in [file.path.split("/", 1)[1]]}
    gone_datasets = withdrawn(catalog.store).datasets
    for manifest in catalog.datasets() if stored else ():
        if manifest.id not in gone_datasets:
            stored -= {name.removeprefix("sha256:") for name in closure.images(catalog.store, manifest.id)}
    yield from sorted(stored)


def _is_written(place: str, modified: float, is_building: bool) -> bool:
    if place.startswith(paths.image("")):
        return is_building  # a build writes the images before its dataset version
    alive = is_alive(place)
    if alive is not None:
        return alive
    since = time.time() - modified
    return since < (QUIET_S if MARK.search(place) else LATELY_S if "/." not in place else 0.0)
