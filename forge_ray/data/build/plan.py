"""The plan of the reduce stage: where the map stage left its records and unused rows, and how often a source is used."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Self

from forge_ray.data.build.summaries import PartFile
from forge_ray.data.build.work import read_plan
from forge_ray.store.files import Store


@dataclass(frozen=True)
class SourceChunk:
    """Which source file a chunk is of."""

    name: str
    source: int


@dataclass(frozen=True)
class PlannedPart:
    """Records of one job; its chunk n is `ReducePlan.chunks[chunks[n]]`."""

    file: PartFile
    chunks: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {**self.file.to_json(), "chunks": self.chunks}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(PartFile.from_json(value), tuple(value["chunks"]))


@dataclass(frozen=True)
class UnusedRows:
    """The rows that one job did not use; `chunks` as in `PlannedPart`."""

    path: str
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class ReducePlan:
    """What all tasks of the reduce stage share; its digest names it."""

    chunks: tuple[SourceChunk, ...]  # in the order of reading
    parts: tuple[PlannedPart, ...]
    unused: tuple[UnusedRows, ...]
    epochs: tuple[float, ...]  # times that each source's training records are used
    settings: str

    def to_json(self) -> dict[str, Any]:
        return {
            "chunks": [asdict(chunk) for chunk in self.chunks],
            "parts": [part.to_json() for part in self.parts],
            "unused": [asdict(rows) for rows in self.unused],
            "epochs": self.epochs,
            "settings": self.settings,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(
            chunks=tuple(SourceChunk(**chunk) for chunk in value["chunks"]),
            parts=tuple(map(PlannedPart.from_json, value["parts"])),
            unused=tuple(UnusedRows(rows["path"], tuple(rows["chunks"])) for rows in value["unused"]),
            epochs=tuple(value["epochs"]),
            settings=value["settings"],
        )


@lru_cache(maxsize=4)
def reduce_plan(store: Store, name: str) -> ReducePlan:
    """Read once per process."""
    return ReducePlan.from_json(read_plan(store, name))


@dataclass(frozen=True)
class PartitionTask:
    """One partition to pack, of the `num_partitions` of its split."""

    plan: str
    split: int
    partition: int
    num_partitions: int


@dataclass(frozen=True)
class TailTask:
    """The last shard of a split, of the rows that its partitions left over; `folder` and `name` say where it goes."""

    split: str
    parts: tuple[str, ...]  # files of the work area, in the order of the partitions
    folder: str
    name: str


@dataclass(frozen=True)
class UnusedTask:
    """Rows that some jobs did not use, which share files; `part` numbers them in the dataset's `folder`."""

    plan: str
    jobs: range
    part: int
    folder: str
