"""Immutable records and events, their canonical JSON, and their ids, which are hashes of content.

A record is written once, by the stage that creates it. Its id is `<prefix>_<16 hex of sha256>` over the canonical JSON of
its *identity*: all fields except times and durations (`Record.volatile`). What changes over time is an `Event`.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from forge_ray.file_names import relative_path

ID_HEX = 16
MEASURED_ANEW = frozenset({"latency_ms_per_token"})  # measured values, which are left out of ids


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8, no NaN: equal values give equal bytes on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """`sha256:<hex>` of the canonical JSON of `value`."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


def hex_of(sha256: str) -> str:
    """The hexadecimal digits of a digest, with or without `sha256:` before them."""
    return sha256.removeprefix("sha256:")


def short_id(prefix: str, value: Any) -> str:
    return f"{prefix}_{hex_of(digest(value))[:ID_HEX]}"


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _without_empty(value: dict[str, Any], *names: str) -> dict[str, Any]:
    """`value` without the fields in `names` that are empty. Fields that were added later are left out this way, so that
    older records keep their ids."""
    return {key: item for key, item in value.items() if key not in names or item}


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class FileEntry(Frozen):
    """One file of an artefact; `path` is relative to the artefact's folder and cannot leave it (`relative_path`)."""

    path: Annotated[str, AfterValidator(relative_path)]
    size: int
    sha256: str


def files_digest(files: tuple[FileEntry, ...]) -> str:
    """The digest of a folder, over its sorted (path, sha256) pairs."""
    return digest(sorted((entry.path, entry.sha256) for entry in files))


class Record(Frozen):
    """Base of all records; `kind` names the folder, `prefix` starts the id."""

    kind: ClassVar[str]
    prefix: ClassVar[str]
    volatile: ClassVar[frozenset[str]] = frozenset()

    id: str = ""
    created_at: str = Field(default_factory=utc_now)

    def identity(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"id", "created_at", *self.volatile})

    def sealed(self) -> Self:
        """The same record with the id that follows from its content."""
        return self.model_copy(update={"id": short_id(self.prefix, self.identity())})

    def parents(self) -> tuple[str, ...]:
        """Ids of the records that this one was derived from: the edges of the lineage graph."""
        return ()


class SourceFile(Frozen):
    """One input file as it was read: `num_records` valid rows, `num_rejected` invalid ones, `num_dropped` dropped by
    rules."""

    path: str
    sha256: str
    size: int
    num_records: int
    num_rejected: int
    num_dropped: int = 0
    version: str = Field("", description="version of the table that the file is of, such as `delta 12`")


class SplitStats(Frozen):
    num_records: int
    num_rows: int = Field(description="packed rows of `sequence_length` tokens")
    num_tokens: int
    num_trained_tokens: int
    rows_digest: str = Field(description="over the packed rows' content, in order")
    block_rows: int = Field(description="rows per block (Parquet row group); the last block may be shorter")
    shard_rows: tuple[int, ...] = Field(description="rows of each shard file; all but the last are whole blocks")


class SourceStats(Frozen):
    """One source of the mixture: its counts, and how often its training records are used."""

    name: str
    num_records: int = Field(description="distinct records of all splits")
    num_documents: int = Field(description="packed training documents, repeats included")
    num_tokens: int = Field(description="training tokens, repeats included")
    num_trained_tokens: int
    epochs: float = Field(description="times that each training record is used; a fraction takes a part of the records")
    licences: dict[str, int] = Field(description="records per licence tag; '' where a record has none")


class CurationStep(Frozen):
    """One rule of `data.curate`: numbers of records before and after it, and its findings."""

    rule: str
    before: int
    after: int
    changed: int = Field(description="records whose text was masked")
    found: dict[str, int] = Field(description="findings per kind, flagged or masked or dropped")
    reasons: dict[str, int] = Field(description="dropped records per reason")


class DatasetManifest(Record):
    """A packed, content-addressed dataset: the output of the data stage and the input of training."""

    kind: ClassVar[str] = "datasets"
    prefix: ClassVar[str] = "ds"
    volatile: ClassVar[frozenset[str]] = frozenset({"files", "seconds", "input_digest", "erased"})

    name: str
    format: int
    input_digest: str = Field(description="config + source bytes + tokenizer: what a second run looks up")
    config: dict[str, Any]
    tokenizer_digest: str
    base_model: str = Field(description="model version whose tokenizer and template were used")
    sources: tuple[SourceFile, ...]
    kinds: dict[str, int] = Field(default_factory=dict, description="records per kind: chat, text, preference, feedback")
    mixture: tuple[SourceStats, ...] = Field(
        (), description="in the order of the run file; packed rows name their sources by position"
    )
    curation: tuple[CurationStep, ...] = ()
    lengths: dict[str, int] = Field(
        default_factory=dict, description="documents per length: tokens, each bucket up to its key"
    )
    num_truncated: int = 0
    splits: dict[str, SplitStats]
    num_duplicates: int
    rejects: dict[str, int] = Field(description="rejected rows per reason")
    erased: dict[str, tuple[int, ...]] = Field({}, description="lines of the rows that erasures leave out, per source file")
    sequence_length: int
    files: tuple[FileEntry, ...] = ()
    seconds: float = 0.0

    def identity(self) -> dict[str, Any]:
        """The content without names and paths: equal rows in differently named files are the same dataset."""
        value = super().identity()
        value.pop("name")
        value.pop("base_model")
        value["sources"] = sorted(source["sha256"] for source in value["sources"])
        value["config"] = {key: item for key, item in value["config"].items() if key != "sources"}
        for source in value["mixture"]:
            source.pop("name")
        return value

    def parents(self) -> tuple[str, ...]:
        return (self.base_model,)


class RunRecord(Record):
    """A finished training run. Its id is known before it starts: `run_id` over everything that determines the weights."""

    kind: ClassVar[str] = "runs"
    prefix: ClassVar[str] = "run"

    name: str
    method: str
    config: dict[str, Any]
    config_digest: str
    dataset: str
    base_model: str
    base_digest: str
    initial_adapter: str = Field("", description="the version whose adapter was trained on (train.init_from=continue)")
    initial_digest: str = Field("", description="digest of that adapter's files")
    frozen_model: str = Field("", description="the version that the loss reads numbers of: a teacher, or another reference")
    frozen_digest: str = Field("", description="digest of that version's files")
    micro_batch_size: int = Field(0, description="packed rows per forward pass where the run file says auto; else 0")
    seed: int
    num_steps: int
    samples_seen: int
    order_digest: str = Field(description="over the global row order of the whole run")
    order_key: str = Field("", description="what that order follows from: digest of the packed rows; '': the dataset's id")
    attempts: tuple[dict[str, Any], ...] = Field(description="one per start: world size, first step, host")
    incidents: tuple[dict[str, Any], ...] = Field((), description="what went wrong and what was done about it")
    code_digest: str
    code_commit: str = Field("", description="git commit of that code where it is known, `-dirty` behind it if changed")
    environment: dict[str, str] = Field(description="versions of the packages that decide numbers")
    environment_digest: str = Field("", description="of the lock in `environments/`; of the last attempt's first worker")
    hardware: dict[str, Any] = Field({}, description="the class of that worker's machine")
    metrics: dict[str, float]
    stopped_early: dict[str, Any] | None = Field(None, description="the step at which it ended, of how many, and why")
    adapter: dict[str, Any] = Field({}, description="what an adapter reached: patterns, weights, shares")
    export: tuple[FileEntry, ...]
    export_kind: Literal["adapter", "full"]
    export_step: int = Field(0, description="the step whose weights were exported; 0: the last")

    def sealed(self) -> Self:
        raise TypeError("a run's id is fixed at its start; build the record with id=run_id(...)")

    def identity(self) -> dict[str, Any]:
        since = ("order_key", "initial_adapter", "initial_digest", "frozen_model", "frozen_digest", "micro_batch_size")
        return _without_empty(super().identity(), *since)

    def parents(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.dataset, self.base_model, self.initial_adapter, self.frozen_model)))


class EvalReport(Record):
    """Scores of a run or version on an evaluation set, or the result of a leak audit."""

    kind: ClassVar[str] = "evals"
    prefix: ClassVar[str] = "ev"
    volatile: ClassVar[frozenset[str]] = frozenset({"seconds", "costs", "intervals"})

    subject: str = Field(description="id of the run or model version that was evaluated")
    subject_digest: str
    step: int = Field(0, description="of the run's checkpoint that was evaluated; 0: its export, or a model version")
    dataset: str
    endpoint: str = Field("", description="URL of the API of another system that was evaluated; `subject` has its model")
    split: str
    config: dict[str, Any]
    num_examples: int
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    per_slice: dict[str, dict[str, dict[str, float]]] = Field({}, description="kind of slice → its value → scores, count")
    undefined: tuple[str, ...] = Field((), description="metrics that are not a finite number: a model that diverged")
    items_sha256: str
    costs: dict[str, float] = Field({}, description="what answering takes: latency_ms_per_token, size_bytes")
    intervals: dict[str, tuple[float, float]] = Field({}, description="of 95 %, by metric; they follow from the items")
    left_out: dict[str, int] = Field({}, description="rows of the split that were not evaluated, by the reason")
    num_scored: dict[str, int] = Field({}, description="the user's own metrics → rows that they are means over")
    general: str = Field("", description="dataset version of the general rows, whose test split was scored too")
    num_general: int = Field(0, description="general rows that were scored; they are not among num_examples")
    thresholds: dict[str, float] = Field({}, description="of a classifier: label → probability from which it holds")
    unreached: dict[str, str] = Field({}, description="label → what eval.thresholds asks for and no probability reaches")
    seconds: float = 0.0

    @property
    def evaluated(self) -> str:
        """The subject as `forge eval --model` takes it: a checkpoint is `run_…@120`."""
        return f"{self.subject}@{self.step}" if self.step else self.subject

    def parents(self) -> tuple[str, ...]:
        subject = () if self.endpoint else (self.subject,)
        return tuple(dict.fromkeys((*subject, self.dataset, *filter(None, [self.general]))))

    def identity(self) -> dict[str, Any]:
        later = ("step", "per_slice", "undefined", "left_out", "endpoint", "num_scored", "general", "num_general")
        return _without_empty(super().identity(), *later, "thresholds", "unreached")


class Check(Frozen):
    """One check of a gate: a value, its bound, and whether it passed; `reason` says why not, or why it was not checked.
    `value` is None where there is no finite number."""

    name: str
    value: float | None
    bound: float | None
    passed: bool
    reason: str = ""


class ModelVersion(Record):
    """A version of a model: imported, or trained and gated. A `candidate` is a checkpoint that has passed no gate: it can be
    served by its id, and no alias can be moved to it. The same holds for `merged`: the weights of a base with the adapter of
    the version `base_model` added, which runs start from (train.init_from=merge)."""

    kind: ClassVar[str] = "models"
    prefix: ClassVar[str] = "mv"
    volatile: ClassVar[frozenset[str]] = frozenset({"log_head"})

    name: str
    status: Literal["imported", "candidate", "accepted", "rejected", "merged"]
    reasons: tuple[str, ...] = ()
    weights: Literal["full", "adapter"]
    files: tuple[FileEntry, ...]
    files_digest: str
    base_model: str = ""
    run: str = ""
    step: int = Field(0, description="of the run's checkpoint, where it is a candidate")
    dataset: str = Field("", description="of a candidate: its run may have no record yet")
    evals: tuple[str, ...] = ()
    checks: tuple[Check, ...] = Field((), description="what its gate looked at, in the order of the run file")
    licence: str
    flags: tuple[str, ...] = Field((), description="labels for which /v1/moderations flags a text (release.moderation)")
    source: str = Field("", description="of imported weights: a file name and its sha256; of `merged`: what was merged")
    added_tokens: tuple[str, ...] = Field((), description="tokens of its own, which `base_model` does not have")
    log_head: str = Field("", description="where the audit log stood: `<n>:<hash of line n>`")

    def parents(self) -> tuple[str, ...]:
        return tuple(parent for parent in (self.run, self.dataset, self.base_model, *self.evals) if parent)

    def identity(self) -> dict[str, Any]:
        value = _without_empty(super().identity(), "checks", "flags", "added_tokens")
        for check in value.get("checks", []):
            if check["name"] in MEASURED_ANEW:
                check["value"] = None
        return value if self.status == "candidate" else {key: value[key] for key in value if key not in ("step", "dataset")}


class Deployment(Record):
    """An endpoint as it was started: `models` has the version of each name at that time; later moves are events of the
    aliases. `model`, `model_version` and `model_digest` are those of the first name."""

    kind: ClassVar[str] = "deployments"
    prefix: ClassVar[str] = "dep"
    volatile: ClassVar[frozenset[str]] = frozenset({"log_head"})

    name: str
    model: str = Field(description="the name that clients send")
    model_version: str
    model_digest: str
    models: dict[str, str] = Field({}, description="name → model version")
    config: dict[str, Any]
    config_digest: str
    genesis: str = Field("", description="the store's id (`forge signers list`), which the endpoint holds it to")
    log_head: str = Field("", description="where the audit log stood: `<n>:<hash of line n>`")

    def parents(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.model_version, *self.models.values())))

    def identity(self) -> dict[str, Any]:
        value = _without_empty(super().identity(), "genesis")
        return value if self.models else {key: value[key] for key in value if key != "models"}


class Erasure(Record):
    """A request to erase rows, with its plan. The id depends on the request only, so that the same request resumes an
    interrupted erasure. It names no person and no record: `asked` is an HMAC, the rows are tombstones in
    `erasures/<id>.json`."""

    kind: ClassVar[str] = "erasures"
    prefix: ClassVar[str] = "er"
    volatile: ClassVar[frozenset[str]] = frozenset({"num_records", "why", "by", "options", "plan"})

    asked_by: Literal["subject", "record", "file", "answer"]
    asked: str = Field(description="HMAC of the subject, the ids or the file, under the store's subject key")
    near_duplicates: bool = Field(description="whether near duplicates of the rows go too")
    num_records: int
    why: str = ""
    by: str = Field("", description="user@host, as the system knows it")
    options: dict[str, Any] = Field(description="what is done with runs, weights and deployments")
    plan: dict[str, Any] = Field(description="what held the rows: datasets, runs, versions, aliases, deployments, evals")


RECORD_TYPES: tuple[type[Record], ...] = (DatasetManifest, RunRecord, EvalReport, ModelVersion, Deployment, Erasure)


AuthorityEvent = Literal["signer", "policy", "approval", "upgrade"]
LeavingEvent = Literal["export", "disclosure"]
EventKind = Literal[
    AuthorityEvent, LeavingEvent, "alias", "run", "deployment", "model", "key", "erasure", "reproduction", "removal"
]


class Event(Frozen):
    """A change over time, of one of the kinds above. Appended, never edited, and signed if the writer has a key."""

    at: str = Field(default_factory=utc_now)
    kind: EventKind
    subject: str
    data: dict[str, Any]
    key: str = Field("", description="id of the key that signed it")
    signature: str = Field("", description="base64, over `to_sign()`")

    def _content(self, *without: str) -> dict[str, Any]:
        value = self.model_dump(mode="json", exclude=set(without))
        return {name: item for name, item in value.items() if item or name not in ("key", "signature")}

    def to_sign(self) -> bytes:
        return canonical_json(self._content("signature"))

    def stored(self) -> bytes:
        return canonical_json(self._content())

    @property
    def id(self) -> str:
        return short_id("evt", self._content("signature"))
