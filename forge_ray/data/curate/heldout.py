"""Test records of earlier cycles, by their ids: what an earlier version was judged by, a later one must not learn.

A record's split follows from its id and the shares of `data.splits` alone, so a test record stays one while the share of the
test split does not fall; where it falls, the rule `held_out` drops those that would move. Only equal records are found: a
rule `decontaminate` finds those that share words.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from forge_ray.config.data import Splits
from forge_ray.data.dataset.version import SPLITS, records, split_of
from forge_ray.progress import visible
from forge_ray.records import DatasetManifest
from forge_ray.store import paths
from forge_ray.store.files import Store

TEST = SPLITS.index("test")


def index_of(against: Iterable[str], store: Store) -> npt.NDArray[np.uint64]:
    """The first 64 bits of the ids of every test record of the dataset versions, sorted. Of a version whose rows are gone,
    which is said, there are none."""
    ids: list[str] = []
    for dataset in against:
        manifest = DatasetManifest.model_validate(store.read_json(paths.record("datasets", dataset)))
        if not store.is_published(paths.dataset(dataset)):
            print(f"  {visible(dataset)}: its rows are gone, and its test rows are not held out", file=sys.stderr)
            continue
        for table in records(store, manifest, "test", ["record"]):
            ids += table.column("record").to_pylist()
    return np.unique(np.array([_number(record) for record in ids], np.uint64))


def is_held_out(record: str, index: npt.NDArray[np.uint64], splits: Splits) -> bool:
    """Whether a record is in the index, and these shares do not make it a test record."""
    if not len(index) or split_of(bytes.fromhex(record.removeprefix("rec_")), splits) == TEST:
        return False
    number = np.uint64(_number(record))
    place = int(np.searchsorted(index, number))
    return place < len(index) and bool(index[place] == number)


def _number(record: str) -> int:
    return int(record.removeprefix("rec_")[:16], 16)
