"""What holds an item whatever the policy says: traffic, a release, a process that uses it now."""

from __future__ import annotations

from collections.abc import Iterable

from forge_ray.data.build.work import WORK
from forge_ray.governance.impact import StoreUses
from forge_ray.governance.space.decide import StoredItem
from forge_ray.records import Deployment, Erasure, ModelVersion
from forge_ray.serve.routing import versions_of
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.endpoint_state import CRASHED, ENDED, state_of
from forge_ray.store.owner import is_alive
from forge_ray.store.removed import original
from forge_ray.store.uses import above, is_living, marked
from forge_ray.train import attempts, run_folder

UNMARKED_DAYS = 1.0  # a half-built folder whose process is unknown counts as in use for so long
BUILD_S = 86400.0  # the mark of a build on another machine counts for so long
MODELS = "models"  # the folder of all
Held = dict[str, list[str]]


def holds(catalog: Catalog, items: Iterable[StoredItem], in_files: dict[str, str]) -> Held:
    """Name of an item → why it must stay, as of now. The catalogue is brought up to date first. `in_files`: files that
    processes hold open (`uses.opened`)."""
    catalog.sync()
    items = list(items)
    held: Held = {}
    for folder, reason in [*_traffic(catalog), *_trainings(catalog), *marked(catalog.store).items()]:
        held.setdefault(folder, []).append(reason)
    by_folder: Held = {}
    for path, reason in in_files.items():
        for folder in above(path):
            by_folder.setdefault(original(folder), []).append(reason)
    building = _is_building(catalog)
    result: Held = {}
    for item in items:
        reasons = [reason for path in item.paths for folder in above(path) for reason in held.get(folder, ())]
        reasons += [reason for path in item.paths for reason in by_folder.get(path, ())]
        reasons += _of_builds(item) if building else []
        reasons += _of_process(item)
        if reasons:
            result[item.name] = list(dict.fromkeys(reasons))
    return result


def unfinished_erasures(catalog: Catalog) -> list[str]:
    """Erasures on record that have not come to their end: they look for files that a removal would take from them."""
    return [
        record.id
        for record in catalog.all(Erasure)
        if not any(event.data["state"].startswith("finished") for event in catalog.events("erasure", record.id))
    ]


def _traffic(catalog: Catalog) -> Iterable[tuple[str, str]]:
    """Versions that an alias or a deployment can answer with, and the base models below them."""
    reasons: list[tuple[str, str]] = []
    for alias, route in catalog.routes().items():
        reasons += [(version, f"alias {alias}") for version in versions_of(route)]
    for record in _deployed(catalog):
        versions = dict.fromkeys((record.model_version, *record.models.values()))
        reasons += [(version, f"deployment {record.name} ({record.id})") for version in versions]
    for version, reason in reasons:
        while version and catalog.has(version):
            yield paths.model(version), reason
            version = catalog.get_as(ModelVersion, version).base_model


def _deployed(catalog: Catalog) -> list[Deployment]:
    """Deployments that may be running: the last of each name that was started, unless it was stopped, its end is on record
    or it has crashed; those that are seen though another took their place; and those of which no event says how they ended,
    as from a Serve config file. One that is silent may be running behind a network that is cut."""
    current: dict[str, Deployment] = {}
    without_event, placed = [], []
    for record in catalog.all(Deployment):
        events = catalog.standing.placed("deployment", record.id)
        placed += [(event.line, record, str(event.event.data["state"])) for event in events]
        without_event += [] if events else [record]
    for _, record, state in sorted(placed, key=lambda entry: entry[0]):
        if state == "stopped" or (state == ENDED and current.get(record.name) == record):
            current.pop(record.name, None)
        elif state not in ("failed", ENDED):  # a roll-out that failed leaves the one before in place
            current[record.name] = record
    states = {record.id: state_of(catalog, record.id) for record in catalog.all(Deployment)}
    running = [record for record in current.values() if states[record.id].state != CRASHED]
    back = [record for record in catalog.all(Deployment) if states[record.id].lives and record not in running]
    return [*without_event, *running, *(record for record in back if record not in without_event)]


def _trainings(catalog: Catalog) -> Iterable[tuple[str, str]]:
    """Folders of runs that a living process drives, with the dataset and the models that they read."""
    living = attempts.drivers(catalog.store)
    runs = StoreUses.of(catalog).runs if living else {}
    for folder, sign in living.items():
        run = runs.get(folder.rsplit("/", 1)[-1])
        reason = f"being trained: {sign}"
        yield folder, reason
        position = next(run_folder.positions(catalog.store, folder.rsplit("/", 1)[-1]), {})
        dataset = (run.dataset if run else "") or str(position.get("dataset", ""))
        yield (paths.dataset(dataset) if dataset else paths.dataset()), reason
        models = map(paths.model, run.starts_from) if run and run.base_model else (MODELS,)
        yield from ((model, reason) for model in models)
        if folder.startswith(paths.work("reproduce")):
            yield folder.rsplit("/runs/", 1)[0], reason


def _is_building(catalog: Catalog) -> bool:
    """Whether a process is building a dataset version."""
    marks = [path for path in catalog.store.list(WORK) if "/begun-" in path]
    return any(is_living(catalog.store, path, BUILD_S) for path in marks)


def _of_builds(item: StoredItem) -> list[str]:
    """A build reads the work area and a tokenizer, and writes images and folders that have no record yet."""
    reads = ("cache", "base model", "version", "images", "half-built")
    return ["a dataset is being built"] if item.kind in reads else []


def _of_process(item: StoredItem) -> list[str]:
    """Why a half-built folder counts as being written."""
    if item.kind != "half-built":
        return []
    alive = is_alive(item.name)
    if alive:
        return ["its process is running"]
    if alive is None and item.idle_days < UNMARKED_DAYS:
        return ["its process is unknown, and it was written within a day"]
    return []
