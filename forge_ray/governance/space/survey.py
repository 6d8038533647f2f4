"""The items of a store: every file on the disk, by the dataset, model, checkpoint, … that it belongs to."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime

from forge_ray.errors import ForgeError
from forge_ray.evaluate.items import splits_of
from forge_ray.governance.erasure import closure
from forge_ray.governance.erasure.leftovers import FACT_FILES, FACTS
from forge_ray.governance.impact import StoreUses
from forge_ray.governance.space.decide import Kind, Role, StoredItem
from forge_ray.governance.uses import Run
from forge_ray.records import DatasetManifest, EvalReport, ModelVersion, Record, RunRecord, utc_now
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.removed import ASIDE
from forge_ray.store.uses import USES
from forge_ray.store.walk import StoredFile, every_file

DAY_S = 86400.0
DERIVED = ("index", "cards", "references")  # folders of a dataset version besides its own
# names of what is being written or removed; other hidden files, such as the lock of the audit log, are in use for as long as
# the store is
HALF = (".tmp-", ".new-", ".old-", ".building-", ".importing-", ASIDE)
UNSHOWN = "images of no dataset"
# the first item in this order that has a file counts its bytes
ORDER: tuple[Kind, ...] = (
    *("facts", "dataset", "base model", "version", "export", "checkpoint", "evaluation", "run", "images", "answers"),
    *("other", "reproduction", "cache", "half-built"),
)


@dataclass
class _Part:
    """The files of one item while they are being collected."""

    kind: Kind
    paths: dict[str, None] = field(default_factory=dict)
    files: list[StoredFile] = field(default_factory=list)


@dataclass(frozen=True)
class Survey:
    """The items of a store, largest first; `files` are all files, for the bytes that a removal frees."""

    items: tuple[StoredItem, ...]
    files: tuple[StoredFile, ...]

    @property
    def size(self) -> int:
        return sum(item.size for item in self.items)

    def freed(self, removed: Iterable[str]) -> int:
        """Bytes that are free once these paths are removed: those of files that keep no other name."""
        prefixes = set(removed)
        names: dict[tuple[int, int], int] = {}
        size = 0
        for file in self.files:
            if file.link or not _is_inside(file.path, prefixes):
                continue
            if file.num_names == 1:
                size += file.size
                continue
            names[file.number] = names.get(file.number, 0) + 1
            size += file.size * (names[file.number] == file.num_names)
        return size


def survey(catalog: Catalog) -> Survey:
    """Every item of the store. Writes nothing."""
    store = catalog.store
    files = tuple(every_file(store))
    uses = StoreUses.of(catalog)
    in_datasets = _shown_images(catalog, files)
    parts: dict[str, _Part] = {}
    for file in files:
        name, kind, path = _place(file.path, catalog, in_datasets)
        part = parts.setdefault(name, _Part(kind))
        part.paths[path] = None
        part.files.append(file)
    details = _details(catalog, uses, parts)
    counted: set[tuple[int, int]] = set()
    items = []
    for name, part in sorted(parts.items(), key=lambda entry: (ORDER.index(entry[1].kind), entry[0])):
        size = 0
        for file in part.files:
            if file.num_names == 1 or file.number not in counted:
                size += file.size
            if file.num_names > 1:
                counted.add(file.number)
        ordered = (name, *(path for path in part.paths if path != name)) if name != UNSHOWN else tuple(part.paths)
        items.append(replace(details[name], paths=ordered, size=size))
    return Survey(tuple(sorted(items, key=lambda item: (-item.size, item.name))), files)


def _is_inside(path: str, prefixes: set[str]) -> bool:
    parts = path.split("/")
    return any("/".join(parts[:end]) in prefixes for end in range(1, len(parts) + 1))


def _place(path: str, catalog: Catalog, in_datasets: set[str]) -> tuple[str, Kind, str]:
    """(name of the item, its kind, the folder or file of it) for one file."""
    parts = path.split("/")
    top = parts[0]
    hidden = next((number for number, part in enumerate(parts) if part.startswith(HALF)), None)
    is_aside = hidden is not None and parts[hidden].startswith(ASIDE)

    def upto(number: int, kind: Kind) -> tuple[str, Kind, str]:
        joined = "/".join(parts[:number])
        return joined, kind, joined

    if top == paths.work() and not is_aside:
        if len(parts) > 2 and parts[1] == "reproduce":
            return upto(3, "reproduction")
        return upto(2, "facts" if path.startswith((f"{USES}/", f"{paths.work(paths.ENDPOINTS)}/")) else "cache")
    if hidden is not None:
        return upto(hidden + 1, "half-built")
    if top in FACTS or (len(parts) == 1 and top.startswith(FACT_FILES)):
        return upto(1, "facts")
    if top == paths.answers():
        return upto(min(2, len(parts)), "answers")
    if top == "images":
        return upto(1, "images") if parts[-1] in in_datasets else (UNSHOWN, "images", path)
    if len(parts) < 3 or top not in ("datasets", *DERIVED, "models", "evals", paths.run()):
        return upto(1, "other")
    if top == paths.run():
        if parts[2] == "checkpoints" and len(parts) > 4:
            return upto(4, "checkpoint")
        if parts[2] == "exports" and len(parts) > 4:
            return upto(4, "half-built")
        return upto(3, "export") if parts[2] == "export" else upto(2, "run")
    if not catalog.has(parts[1]):
        return upto(2, "half-built")  # complete, and killed before its record was written
    if top in ("datasets", *DERIVED):
        return paths.dataset(parts[1]), "dataset", "/".join(parts[:2])
    if top == "evals":
        return upto(2, "evaluation")
    return upto(2, "base model" if catalog.get_as(ModelVersion, parts[1]).status == "imported" else "version")


def _shown_images(catalog: Catalog, files: Iterable[StoredFile]) -> set[str]:
    """Names of the images that a dataset version of the store shows; all, where one cannot be read."""
    stored = {file.path.split("/", 1)[1] for file in files if file.path.startswith(paths.image(""))}
    images: set[str] = set()
    for manifest in catalog.datasets() if stored else ():
        try:
            images |= {name.removeprefix("sha256:") for name in closure.images(catalog.store, manifest.id)}
        except (ForgeError, OSError, ValueError):
            return stored
    return images


# ---------------------------------------------------------------- what an item is of, and what it needs


def _details(catalog: Catalog, uses: StoreUses, parts: dict[str, _Part]) -> dict[str, StoredItem]:
    """Name → the item without its files."""
    withdrawn = catalog.withdrawn()
    released = [one for one in catalog.all(ModelVersion) if one.status == "accepted" and one.id not in withdrawn]
    released_runs = {version.run for version in released}
    newest: dict[str, float] = {}
    for name, part in parts.items():
        owner = "/".join(name.split("/")[:2]) if name.startswith(f"{paths.run()}/") else name
        newest[owner] = max([newest.get(owner, 0.0), *(file.modified for file in part.files)])
    details: dict[str, StoredItem] = {}
    kept_steps: dict[str, dict[str, frozenset[Role]]] = {}
    for name, part in parts.items():
        pieces = name.split("/")
        owner = "/".join(pieces[:2]) if pieces[0] == paths.run() else name
        record = catalog.get(pieces[1]) if len(pieces) > 1 and catalog.has(pieces[1]) else None
        item = StoredItem((name,), part.kind, 0, _idle_days(max(newest[owner], _written(record))))
        run = uses.runs.get(pieces[1]) if pieces[0] == paths.run() and len(pieces) > 1 else None
        match part.kind:
            case "dataset":
                item = replace(item, needs=_models(catalog.get_as(DatasetManifest, pieces[1]).base_model))
            case "base model" | "version":
                version = catalog.get_as(ModelVersion, pieces[1])
                is_released = version in released
                item = replace(item, needs=_needs_of_version(version, uses, is_released), is_released=is_released)
            case "evaluation":
                scored = splits_of(catalog.get_as(EvalReport, pieces[1]))
                item = replace(item, needs=tuple(dict.fromkeys(paths.dataset(dataset) for dataset, _ in scored)))
            case "export" | "checkpoint":
                item = replace(item, needs=_needs_of_run(run, parts), is_released=pieces[1] in released_runs)
            case "images":
                item = replace(item, is_released=name != UNSHOWN)
            case "answers":
                item = replace(item, is_finished=pieces[-1] < utc_now()[:10])
        if part.kind == "checkpoint":
            if pieces[1] not in kept_steps:
                kept_steps[pieces[1]] = _kept_steps(catalog, pieces[1])
            roles = kept_steps[pieces[1]].get(pieces[3], frozenset())
            item = replace(item, is_finished=isinstance(record, RunRecord), roles=roles)
        details[name] = item
    return details


def _idle_days(moment: float) -> float:
    return max(0.0, time.time() - moment) / DAY_S


def _written(record: Record | None) -> float:
    return datetime.fromisoformat(record.created_at).timestamp() if record else 0.0


def _models(*identifiers: str) -> tuple[str, ...]:
    return tuple(paths.model(identifier) for identifier in identifiers if identifier)


def _needs_of_run(run: Run | None, parts: dict[str, _Part]) -> tuple[str, ...]:
    """Weights need the rows that made them (a trace and an erasure look there) and the models that they started from. Of
    a run whose dataset is unknown, every dataset is needed."""
    if run is None or not run.dataset:
        return tuple(name for name, part in parts.items() if part.kind in ("dataset", "base model", "version"))
    return (paths.dataset(run.dataset), *_models(*run.starts_from))


def _needs_of_version(version: ModelVersion, uses: StoreUses, is_released: bool) -> tuple[str, ...]:
    run = uses.runs.get(version.run)
    dataset = (run.dataset if run else "") or version.dataset
    needs = [paths.dataset(dataset)] if dataset else []
    needs += _models(version.base_model, *(run.starts_from if run else ()))
    needs += map(paths.report, version.evals)
    return tuple(dict.fromkeys([*needs, *([paths.export(version.run)] if version.run and is_released else [])]))


def _kept_steps(catalog: Catalog, run: str) -> dict[str, frozenset[Role]]:
    """Name of a checkpoint → whether it is the run's last or best one. Where that cannot be read, each may be the best."""
    from forge_ray.train import checkpoint, validation

    steps = checkpoint.steps(catalog.store, run)
    try:
        best = validation.best_step(catalog.store, run)
    except (ForgeError, LookupError, TypeError, ValueError):
        return {paths.step(step): frozenset({"best"}) for step in steps}
    roles: dict[str, set[Role]] = {}
    if steps:
        roles.setdefault(paths.step(steps[0]), set()).add("last")
    if best is not None:
        roles.setdefault(paths.step(best), set()).add("best")
    return {name: frozenset(of_step) for name, of_step in roles.items()}
