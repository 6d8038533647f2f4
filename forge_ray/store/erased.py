"""What erasures have withdrawn, read from their records alone: workers ask before they publish anything (no SQLite).

An erasure's record names the dataset versions that held the rows and the versions that learned from them. From the moment
at which it is written, nothing more is derived from these: a training that runs stops, an evaluation ends without a report.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from forge_ray.errors import NotFound, PolicyError
from forge_ray.records import Erasure
from forge_ray.store import paths
from forge_ray.store.files import Store

SCRATCH = "/" + paths.work("reproduce") + "/"  # below it lie the scratch stores of reproductions


@dataclass(frozen=True)
class Withdrawn:
    """Dataset versions and model versions → the erasure that withdrew them."""

    datasets: dict[str, str]
    versions: dict[str, str]


def withdrawn(store: Store) -> Withdrawn:
    """Of a scratch store, what erasures of the store around it have withdrawn."""
    if store.is_local and SCRATCH in f"{store.root}/":
        store = Store(store.root.partition(SCRATCH)[0])
    datasets: dict[str, str] = {}
    versions: dict[str, str] = {}
    for path in store.list(paths.of_kind(Erasure.kind)):
        erasure, of_datasets, of_versions = _of_record(store, path)
        datasets |= dict.fromkeys(of_datasets, erasure)
        versions |= dict.fromkeys(of_versions, erasure)
    return Withdrawn(datasets, versions)


@lru_cache(maxsize=256)
def _of_record(store: Store, path: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Records are written once, so each is read once."""
    record = Erasure.model_validate(store.read_json(path))
    ids = {kind: tuple(item["id"] for item in record.plan.get(kind, ())) for kind in ("datasets", "versions")}
    return record.id, ids["datasets"], ids["versions"]


def refuse_erased(store: Store, what: str, dataset: str = "", version: str = "", folder: str = "") -> None:
    """Raise `PolicyError` if an erasure has withdrawn the dataset version or the model version that `what` is derived from;
    its `folder`, which no record tells of yet, is removed then."""
    try:
        current = withdrawn(store)
    except NotFound:  # a store that is being moved: nothing is published there either
        return
    source, erasure = dataset, current.datasets.get(dataset)
    if erasure is None:
        source, erasure = version, current.versions.get(version)
    if erasure is not None:
        if folder:
            store.delete_dir(folder)
        raise PolicyError(
            f"{what} is not published: {source} holds or learned from rows that {erasure} erased",
            hint="start it again: `forge data prepare` makes the dataset version without the rows, on which it can be based",
        )
