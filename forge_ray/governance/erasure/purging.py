"""The end of an erasure's round: trainings that run are stopped, files go, and the store itself is looked at once more."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from forge_ray.data.build import tombstones as erased
from forge_ray.governance.erasure.examine import Examined, examine
from forge_ray.governance.erasure.leftovers import Accounts, Leftover, accounts_of
from forge_ray.governance.erasure.options import Facts
from forge_ray.governance.erasure.plan import ErasurePlan, standing_for
from forge_ray.governance.erasure.purge import empty_work_area, listed, names_elsewhere, purge, remove, targets, used_runs
from forge_ray.governance.impact import StoreUses
from forge_ray.progress import stage
from forge_ray.records import Event, FileEntry, canonical_json, files_digest
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.erased import withdrawn
from forge_ray.store.placed import WITHDRAWN
from forge_ray.train import attempts

POLL_S, MAX_POLL_S = 0.2, 5.0
LOOKS = 2  # at least, so that what was removed is known to be gone
SEARCHED = (
    "datasets/",
    "index/",
    "cards/",
)  # folders of builds: what lies there is judged by its rows, not by who writes it


@dataclass(frozen=True)
class StoreCheck:
    """What a look at the whole store came to. `datasets`: dataset versions on record that hold erased rows → rows by
    split; `removed`: leftovers that were deleted at this look; `unconfirmed`: process or file → why it is."""

    examined: Examined
    accounts: Accounts
    datasets: dict[str, dict[str, int]]
    removed: tuple[str, ...] = ()
    unconfirmed: dict[str, str] = field(default_factory=dict)


def wait_for_trainings(catalog: Catalog, wait_s: float) -> dict[str, str]:
    """Wait until no training runs any more on what erasures withdrew: each finds out by itself within a step. Returns those
    that still do after `wait_s` seconds, with what is known of them."""
    deadline = time.monotonic() + wait_s
    while running := _trainings(catalog):
        if time.monotonic() > deadline:
            return {run: f"is still being trained ({sign})" for run, sign in running.items()}
        time.sleep(POLL_S)
    return {}


def _trainings(catalog: Catalog) -> dict[str, str]:
    living = attempts.drivers(catalog.store)
    if not living:
        return {}
    catalog.sync()
    current, runs = withdrawn(catalog.store), StoreUses.of(catalog).runs
    affected = {}
    for folder, sign in living.items():
        run = runs.get(folder.rsplit("/", 1)[-1])
        if run is None:
            continue
        if run.dataset in current.datasets or not current.versions.keys().isdisjoint(run.starts_from):
            affected[folder] = sign
    return affected


def purge_listed(catalog: Catalog, erasure: str, plan: ErasurePlan, keep_weights: bool, suffix: str) -> Facts:
    """Delete files. All of them are listed with their digests first, so that the list survives an interruption."""
    store, path = catalog.store, paths.erasure(erasure, f"purged{suffix.replace(' ', '-')}.json")
    with stage("purge") as it:
        before = store.read_json(path) if store.exists(path) else {}
        if "places" not in before:  # also of an earlier version, which listed less
            standing = standing_for(catalog, {version.id for version in plan.versions}).values()
            left = {version for hit in standing for version in hit}
            weights = [one.id for one in plan.versions if one.id not in left and not keep_weights]
            accounts = accounts_of(catalog, used_runs(plan))
            places = targets(catalog, plan, weights, accounts)
            files = tuple(FileEntry.model_validate(entry) for entry in before.get("files", ()))
            files += tuple(entry for entry in listed(store, accounts, places) if entry not in files)
            value: Facts = {
                "weights": weights,
                "places": places,
                "files": [entry.model_dump() for entry in files],
                "digest": files_digest(files),
                "names_elsewhere": names_elsewhere(accounts, places),
            }
            store.write(path, canonical_json(value))
        value = store.read_json(path)
        for version in value["weights"]:
            if catalog.last("model")[version].data["state"] != WITHDRAWN[1]:
                catalog.append(Event(kind="model", subject=version, data={"state": WITHDRAWN[1], "erasure": erasure}))
        purge(store, value["places"])
        size = sum(entry["size"] for entry in value["files"])
        it.done(f"{len(value['files'])} files, {size / 1e6:,.1f} MB")
    kept = sorted({version.id for version in plan.versions} - set(value["weights"]))
    return {
        "files": len(value["files"]),
        "bytes": size,
        "digest": value["digest"],
        "list": path,
        "weights_left": kept,
        "names_elsewhere": value["names_elsewhere"],
    }


def check(
    catalog: Catalog, erasure: str, plans: Iterable[ErasurePlan], wait_s: float, running: dict[str, str]
) -> StoreCheck:
    """Look at every file of the store once nothing of the rows is being written any more, or after `wait_s` seconds. What
    processes that ended have left is deleted. `running`: trainings that have not ended."""
    store = catalog.store
    runs = set().union(*(used_runs(plan) for plan in plans))
    tombstones = erased.of_erasure(store, erasure)
    removed: list[str] = []
    deadline = time.monotonic() + wait_s
    with stage("check") as it:
        while True:
            accounts, waiting = _settled(catalog, runs, tombstones, deadline, removed)
            files = [(file.path, file.size) for file in accounts.files if not file.link]
            examined = examine(store, files, tombstones)
            in_work = [path for path in examined.holding if path.startswith(paths.work(""))]
            if not in_work or time.monotonic() > deadline:
                break  # else a build has written them between the two looks
        running = running | dict.fromkeys(waiting, "a process that runs is writing it")
        running |= dict.fromkeys(in_work, "a build that runs has written it")
        it.done(f"{examined.num_files} of {len(accounts.files)} files searched, {len(removed)} leftovers removed")
    return StoreCheck(examined, accounts, _datasets(examined), tuple(dict.fromkeys(removed)), running)


def _settled(
    catalog: Catalog, runs: set[str], tombstones: erased.Erased, deadline: float, removed: list[str]
) -> tuple[Accounts, list[str]]:
    """The files of the store when no process writes any that may be of the rows, and what is still being written when the
    time is over. Adds to `removed` what was deleted."""
    store, pause = catalog.store, POLL_S
    looks = 0
    while True:
        looks += 1
        accounts = accounts_of(catalog, runs)
        written = [one for one in accounts.leftovers if one.is_written]
        places = (paths.work(""), *(f"{one.path}/" for one in written if one.path.startswith(SEARCHED)))
        files = [(file.path, file.size) for file in accounts.files if not file.link and file.path.startswith(places)]
        examined = examine(store, files, tombstones)
        ended = [one.path for one in accounts.leftovers if not one.is_written]
        for place in ended:
            remove(store, place)
        if holding := [path for path in examined.holding if path.startswith(paths.work(""))]:
            empty_work_area(store)  # of a build that had read them before
        removed += [*ended, *holding]
        waiting = [one.path for one in written if not _is_clean(one, examined)]
        if not (ended or holding or waiting):
            return accounts, []
        if looks > LOOKS and time.monotonic() > deadline:
            return accounts, [*waiting, *ended]  # what comes back each time it is removed is being written too
        time.sleep(pause)
        pause = min(2 * pause, MAX_POLL_S)


def _is_clean(leftover: Leftover, examined: Examined) -> bool:
    """Whether what a build is writing is without the rows. Other folders cannot be searched."""
    inside = f"{leftover.path}/"
    return leftover.path.startswith(SEARCHED) and not any(
        path.startswith(inside) for path in (*examined.holding, *examined.unreadable)
    )


def _datasets(examined: Examined) -> dict[str, dict[str, int]]:
    """Dataset version → split, or `dropped` → rows."""
    datasets: dict[str, dict[str, int]] = {}
    for path, num_rows in examined.holding.items():
        parts = path.split("/")
        if parts[0] == paths.dataset() and len(parts) > 3 and not any(part.startswith(".") for part in parts):
            split = parts[3] if parts[2] in ("records", "packed") else parts[2]
            counts = datasets.setdefault(parts[1], {})
            counts[split] = max(counts.get(split, 0), num_rows)
    return datasets
