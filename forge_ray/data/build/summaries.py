"""What the stages of a build report: one summary per piece of work, as JSON in the work area and in Ray's rows.

The JSON outlives the process: pieces that an earlier build left are read again, so its keys stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self, TypeVar

K = TypeVar("K")


@dataclass
class RuleCounts:
    """Counts of one curation rule."""

    before: int = 0
    changed: int = 0
    detections: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        counts = {"found": dict(self.detections), "reasons": dict(self.reasons)}
        return {"before": self.before, "changed": self.changed, **counts}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(value["before"], value["changed"], Counter(value["found"]), Counter(value["reasons"]))


@dataclass
class SplitCounts:
    """Records of one split, their tokens, those of the tokens that are trained, and the bytes of their canonical JSON."""

    records: int = 0
    tokens: int = 0
    trained: int = 0
    bytes: int = 0

    def add(self, other: SplitCounts) -> None:
        self.records += other.records
        self.tokens += other.tokens
        self.trained += other.trained
        self.bytes += other.bytes


@dataclass
class TrainTokens:
    """Tokens of one source's training records, each used once, and those of them that are trained."""

    tokens: int = 0
    trained: int = 0


@dataclass
class Tally:
    """What a job counted; sums of these make the manifest."""

    accepted: Counter[int] = field(default_factory=Counter)  # by chunk, like the next two
    rejected: Counter[int] = field(default_factory=Counter)
    dropped: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # documents, by the upper bound of their tokens
    licences: Counter[tuple[int, str]] = field(default_factory=Counter)  # by source and licence
    by_source: dict[int, TrainTokens] = field(default_factory=dict)
    by_split: dict[int, SplitCounts] = field(default_factory=dict)
    truncated: int = 0
    compared: int = 0  # records that two encoders encoded
    refused: int = 0  # texts that the fast one of them left to the other

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: _text_keys(getattr(self, name)) for name in ("accepted", "rejected", "dropped", "lengths")},
            "reasons": dict(self.reasons),
            "kinds": dict(self.kinds),
            "licences": {f"{source}:{licence}": count for (source, licence), count in self.licences.items()},
            "by_source": {str(source): asdict(counts) for source, counts in self.by_source.items()},
            "by_split": {str(split): asdict(counts) for split, counts in self.by_split.items()},
            "truncated": self.truncated,
            **({"compared": self.compared, "refused": self.refused} if self.compared else {}),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        licences = {tag.partition(":"): count for tag, count in value["licences"].items()}
        return cls(
            accepted=_number_keys(value["accepted"]),
            rejected=_number_keys(value["rejected"]),
            dropped=_number_keys(value["dropped"]),
            reasons=Counter(value["reasons"]),
            kinds=Counter(value["kinds"]),
            lengths=_number_keys(value["lengths"]),
            licences=Counter({(int(source), licence): count for (source, _, licence), count in licences.items()}),
            by_source={int(source): TrainTokens(**counts) for source, counts in value["by_source"].items()},
            by_split={int(split): SplitCounts(**counts) for split, counts in value["by_split"].items()},
            truncated=value["truncated"],
            compared=value.get("compared", 0),
            refused=value.get("refused", 0),
        )


@dataclass(frozen=True)
class PartFile:
    """A work file of records; `batches` has the split, first key and last key of each of its record batches."""

    path: str
    num_rows: int
    batches: tuple[tuple[int, int, int], ...] = ()  # of tokenised records alone: others have no key yet

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"path": self.path, "num_rows": self.num_rows}
        return value | ({"batches": self.batches} if self.batches else {})

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        batches = ((split, first, last) for split, first, last in value.get("batches", ()))
        return cls(value["path"], value["num_rows"], tuple(batches))


@dataclass(frozen=True)
class MapSummary:
    """What a job of the map stage left in the work area, and what it counted."""

    key: str
    parts: tuple[PartFile, ...]
    unused: str  # work file of the rows that are not used; "" where all are
    steps: dict[int, RuleCounts]  # by the number of the rule in the run file
    erased: tuple[tuple[int, int], ...]  # chunk and line of the rows that tombstones leave out
    tally: Tally

    @property
    def num_records(self) -> int:
        return sum(part.num_rows for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "parts": [part.to_json() for part in self.parts],
            "unused": self.unused,
            "steps": {str(number): step.to_json() for number, step in self.steps.items()},
            "erased": self.erased,
            **self.tally.to_json(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(
            key=value["key"],
            parts=tuple(map(PartFile.from_json, value["parts"])),
            unused=value["unused"],
            steps={int(number): RuleCounts.from_json(step) for number, step in value["steps"].items()},
            erased=tuple((chunk, line) for chunk, line in value.get("erased", ())),
            tally=Tally.from_json(value),
        )


History = list[list[MapSummary]]  # of every segment, of every job


@dataclass(frozen=True)
class WorkFile:
    """A file of the work area that becomes one of the dataset."""

    path: str
    size: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"work": self.path, "size": self.size, "sha256": self.sha256}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(value["work"], value["size"], value["sha256"])


@dataclass(frozen=True)
class SourceCounts:
    """What one source contributes to packed rows."""

    num_documents: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0

    def __add__(self, other: SourceCounts) -> SourceCounts:
        return SourceCounts(
            self.num_documents + other.num_documents,
            self.num_tokens + other.num_tokens,
            self.num_trained_tokens + other.num_trained_tokens,
        )


@dataclass(frozen=True)
class PartitionSummary:
    """What packing the records of a partition gave; `num_rows` are its whole blocks, `tail_rows` the packed rows beyond."""

    num_records: int = 0
    num_rows: int = 0
    tail_rows: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    records: WorkFile | None = None
    packed: WorkFile | None = None
    digest: str = ""  # of the whole blocks
    tail: str = ""  # path of the rows beyond
    sources: dict[int, SourceCounts] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        files = {"records": self.records, "packed": self.packed}
        return {
            "num_records": self.num_records,
            "num_rows": self.num_rows,
            "tail_rows": self.tail_rows,
            "num_tokens": self.num_tokens,
            "num_trained_tokens": self.num_trained_tokens,
            "files": {name: file.to_json() for name, file in files.items() if file},
            "digest": self.digest,
            "tail": self.tail,
            "sources": {str(source): asdict(counts) for source, counts in self.sources.items()},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        files = {name: WorkFile.from_json(file) for name, file in value["files"].items()}
        return cls(
            num_records=value["num_records"],
            num_rows=value["num_rows"],
            tail_rows=value["tail_rows"],
            num_tokens=value["num_tokens"],
            num_trained_tokens=value["num_trained_tokens"],
            records=files.get("records"),
            packed=files.get("packed"),
            digest=value["digest"],
            tail=value["tail"],
            sources={int(source): SourceCounts(**counts) for source, counts in value["sources"].items()},
        )


@dataclass(frozen=True)
class Partition:
    """A partition of one split in this build. Its summary is named by the records inside, so other builds may share it."""

    split: int
    number: int
    num_duplicates: int
    summary: PartitionSummary


def total(counters: Iterable[Counter[K]]) -> Counter[K]:
    counts: Counter[K] = Counter()
    for counter in counters:
        counts.update(counter)
    return counts


def source_counts(partitions: Iterable[Partition]) -> dict[int, SourceCounts]:
    """Sums over partitions of what each source contributes."""
    counts: dict[int, SourceCounts] = {}
    for partition in partitions:
        for source, more in partition.summary.sources.items():
            counts[source] = counts.get(source, SourceCounts()) + more
    return counts


def _text_keys(counter: Counter[int]) -> dict[str, int]:
    return {str(number): count for number, count in counter.items()}


def _number_keys(counts: dict[str, int]) -> Counter[int]:
    return Counter({int(number): count for number, count in counts.items()})
