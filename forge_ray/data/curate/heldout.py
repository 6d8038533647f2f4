"""Test records of earlier cycles, by their ids: what an earlier version was judged by, a later one must not learn.

A record's split follows from its id and the shares of `data.splits` alone, so a test record stays one while the share of the
test split does not fall; where it falls, the rule `held_out` drops those that would move. By `record` only equal records are
found, by `conversation` also other answers and later turns; a rule `decontaminate` finds those that share words.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt

from forge_ray.config.data import Splits
from forge_ray.data.dataset.version import SPLITS, decisive_bytes, record_bytes, records, split_of
from forge_ray.data.record.conversation import conversation_marks
from forge_ray.data.record.schema import DataRecord
from forge_ray.progress import visible
from forge_ray.records import DatasetManifest
from forge_ray.store import paths
from forge_ray.store.files import Store

TEST = SPLITS.index("test")


def index_of(
    against: Iterable[str], store: Store, by: Literal["record", "conversation"] = "record"
) -> npt.NDArray[np.uint64]:
    """The first 64 bits of the ids of every test record of the dataset versions, sorted, and of the marks of their
    conversations. Of a version whose rows are gone, which is said, there are none."""
    numbers: set[int] = set()
    for dataset in against:
        manifest = DatasetManifest.model_validate(store.read_json(paths.record("datasets", dataset)))
        if not store.is_published(paths.dataset(dataset)):
            print(f"  {visible(dataset)}: its rows are gone, and its test rows are not held out", file=sys.stderr)
            continue
        columns = ["record"] if by == "record" else ["record", "kind", "content"]
        for table in records(store, manifest, "test", columns):
            for row in table.to_pylist():
                numbers.add(_number(bytes.fromhex(row["record"].removeprefix("rec_"))))
                if by == "conversation":
                    numbers |= set(map(_number, conversation_marks(DataRecord(json.loads(row["content"]), row["kind"]))))
    return np.array(sorted(numbers), np.uint64)


def is_held_out(
    record: DataRecord,
    index: npt.NDArray[np.uint64],
    splits: Splits,
    by: Literal["record", "conversation"] = "record",
) -> bool:
    """Whether a record, or its conversation, is in the index, and these shares do not make it a test record."""
    if not len(index) or split_of(decisive_bytes(record, splits), splits) == TEST:
        return False
    numbers = {_number(record_bytes(record.canonical))}
    if by == "conversation":
        numbers |= set(map(_number, conversation_marks(record)))
    own = np.array(sorted(numbers), np.uint64)
    places = np.minimum(np.searchsorted(index, own), len(index) - 1)
    return bool((index[places] == own).any())


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")
