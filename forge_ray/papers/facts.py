"""Everything on record about one model version, gathered once.

Only two figures, which no record has, are entered by hand: the power of a worker and the base model's training compute.
"""

from __future__ import annotations

import importlib.metadata
import json
import struct
from dataclasses import dataclass
from typing import Any

from forge_ray import __version__
from forge_ray.errors import ConfigError
from forge_ray.evaluate.items import splits_of
from forge_ray.machine import environment
from forge_ray.papers import compute
from forge_ray.records import (
    DatasetManifest,
    Deployment,
    EvalReport,
    Event,
    ModelVersion,
    Record,
    RunRecord,
    digest,
    hex_of,
)
from forge_ray.store import paths
from forge_ray.store.aliases import route_of
from forge_ray.store.authority import Authority
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.signatures import valid_signers
from forge_ray.train.start import started_from

NOT_RECORDED = "not recorded"
BY_HAND = "not recorded: provide by hand"
DECIDED = ("model", "approval", "erasure", "reproduction")  # kinds of events about a version, its runs or its datasets
MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class RunFacts:
    """One run of the chain with its dataset and compute."""

    run: RunRecord
    dataset: DatasetManifest | None
    started_at: str
    compute: compute.RunCompute


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    licence: str  # SPDX; "" where the package states none, or a different version is installed here than in the run
    record: str = ""  # sha256 of the list of its files, from the environment lock


@dataclass(frozen=True)
class Approval:
    """A signed approval or refusal; `holds`: whether the signature is valid and of a signer of this store."""

    at: str
    who: str
    holds: bool
    decision: str
    alias: str
    why: str


@dataclass(frozen=True)
class Facts:
    """Everything on record about a version. `chain`: the version, what its run started from (an adapter that was trained on,
    or its base), and so on to the imported model; `trainings`: newest first; `frozen`: the versions whose numbers the losses
    of these runs read; `signatures`: record → signers with a valid signature. `at`: time of the newest record or event, used
    as the time of the documents, so that equal stores give equal documents."""

    version: ModelVersion
    chain: tuple[ModelVersion, ...]
    trainings: tuple[RunFacts, ...]
    datasets: tuple[DatasetManifest, ...]
    evals: tuple[EvalReport, ...]
    aliases: tuple[str, ...]
    events: tuple[Event, ...]
    deployments: tuple[Deployment, ...]
    packages: tuple[Package, ...]
    architecture: dict[str, Any]
    parameters: dict[str, int]
    signatures: dict[str, tuple[str, ...]]
    approvals: tuple[Approval, ...]
    missing: tuple[str, ...]
    at: str
    power_w: float | None
    base_flops: float | None
    frozen: tuple[ModelVersion, ...] = ()
    forge_version: str = __version__

    @property
    def training(self) -> RunFacts | None:
        """The run that produced this version."""
        return self.trainings[0] if self.trainings and self.trainings[0].run.id == self.version.run else None

    @property
    def dataset(self) -> DatasetManifest | None:
        """What this version was trained on."""
        dataset_id = self.training.run.dataset if self.training else self.version.dataset
        return next((dataset for dataset in self.datasets if dataset.id == dataset_id), None)

    @property
    def base(self) -> ModelVersion | None:
        """The version with full weights that this one was trained from, or that its adapter belongs to."""
        return next((version for version in self.chain if version.id == self.version.base_model), None)

    @property
    def origin(self) -> ModelVersion:
        """The imported model at the end of the chain, or the oldest model on record."""
        return self.chain[-1]

    @property
    def own_evals(self) -> tuple[EvalReport, ...]:
        return tuple(report for report in self.evals if report.subject in (self.version.id, self.version.run))

    @property
    def rows(self) -> int | None:
        """Records that the version was trained on."""
        train = self.dataset.splits.get("train") if self.dataset else None
        return train.num_records if train else None

    @property
    def flops(self) -> float | None:
        """Training FLOPs of all runs from the imported model to this version; None unless every run is on record and
        known."""
        return _sum([training.compute.flops for training in self.trainings]) if self._is_whole else None

    @property
    def worker_hours(self) -> float | None:
        return _sum([training.compute.worker_hours for training in self.trainings]) if self._is_whole else None

    @property
    def energy_kwh(self) -> float | None:
        """Worker hours times the stated power of a worker."""
        return None if self.power_w is None or self.worker_hours is None else self.worker_hours * self.power_w / 1000

    @property
    def share(self) -> float | None:
        """Training FLOPs as a share of the base model's training compute."""
        return None if self.flops is None or not self.base_flops else self.flops / self.base_flops

    @property
    def _is_whole(self) -> bool:
        trained = {version.run for version in self.chain if version.run}
        return bool(self.trainings) and trained == {training.run.id for training in self.trainings}

    @property
    def records(self) -> tuple[Record, ...]:
        """Every record that the documents mention, each once."""
        runs = tuple(training.run for training in self.trainings)
        all_records: tuple[Record, ...] = (*self.chain, *self.frozen, *runs, *self.datasets, *self.evals, *self.deployments)
        return tuple({record.id: record for record in all_records}.values())


def _sum(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) if values and len(numbers) == len(values) else None


def gather(catalog: Catalog, reference: str, power_w: float | None = None, base_flops: float | None = None) -> Facts:
    """The facts of a version, by its id or alias. Raises `NotFound`, and `ConfigError` for invalid figures."""
    for name, value in (("--power-w", power_w), ("--base-flops", base_flops)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} {value:g} is not a positive number", hint="leave it out if it is not known")
    version, authority = catalog.model(reference), catalog.authority()
    missing: list[str] = []

    def look_up(record_id: str, kind: type[Any]) -> Any:
        if not record_id:
            return None
        if catalog.has(record_id):
            return catalog.get_as(kind, record_id)
        missing.append(record_id)
        return None

    chain = [version]
    while (before := look_up(started_from(catalog, chain[-1]), ModelVersion)) and before not in chain:
        chain.append(before)
    runs: list[RunRecord] = [run for each in chain if (run := look_up(each.run, RunRecord))]
    asked = dict.fromkeys(run.frozen_model for run in runs if run.frozen_model)
    frozen: list[ModelVersion] = [each for name in asked if (each := look_up(name, ModelVersion))]
    evals: list[EvalReport] = [report for name in version.evals if (report := look_up(name, EvalReport))]
    evals += [
        report
        for report in catalog.all(EvalReport)
        if report.subject in (version.id, version.run or version.id) and report not in evals
        if not report.step or report.subject_digest == version.files_digest  # of another checkpoint of the run
    ]
    dataset_ids = [
        *(run.dataset for run in runs),
        *([] if runs else [version.dataset]),
        *(dataset for report in evals for dataset, _ in splits_of(report)),
    ]
    datasets: list[DatasetManifest] = [
        manifest for name in dict.fromkeys(dataset_ids) if (manifest := look_up(name, DatasetManifest))
    ]
    by_id = {manifest.id: manifest for manifest in datasets}
    trainings = tuple(
        RunFacts(
            run,
            by_id.get(run.dataset),
            min((str(attempt["at"]) for attempt in run.attempts if "at" in attempt), default=""),
            compute.of_run(catalog.store, run, by_id.get(run.dataset)),
        )
        for run in runs
    )
    aliases = tuple(sorted(name for name, route in catalog.routes().items() if version.id in route.versions))
    deployments = tuple(
        record for record in catalog.all(Deployment) if version.id in (record.model_version, *record.models.values())
    )
    subjects = [version.id, *(run.id for run in runs), *by_id]
    events = _events(catalog, version.id, subjects, [deployment.id for deployment in deployments])
    records: list[Record] = [*chain, *frozen, *runs, *datasets, *evals, *deployments]
    return Facts(
        version=version,
        chain=tuple(chain),
        trainings=trainings,
        datasets=tuple(datasets),
        evals=tuple(evals),
        aliases=aliases,
        events=events,
        deployments=deployments,
        packages=_packages(catalog.store, runs[0]) if runs else (),
        architecture=_configuration(catalog.store, chain),
        parameters={each.id: count for each in chain if (count := num_parameters(catalog.store, each)) is not None},
        signatures=_signatures(catalog, authority, records),
        approvals=tuple(approval_of(catalog, event) for event in events if event.kind == "approval"),
        missing=tuple(dict.fromkeys(missing)),
        at=max([record.created_at for record in records] + [event.at for event in events]),
        power_w=power_w,
        base_flops=base_flops,
        frozen=tuple(frozen),
    )


def _events(catalog: Catalog, version: str, subjects: list[str], deployments: list[str]) -> tuple[Event, ...]:
    """The events of a version: alias moves that name it, decisions about it and its origins, and its deployments."""
    events = [event for kind in DECIDED for subject in subjects for event in catalog.events(kind, subject)]
    events += [event for identifier in deployments for event in catalog.events("deployment", identifier)]
    for alias in catalog.subjects("alias"):
        for event in catalog.events("alias", alias):
            route = route_of(event)
            if route and version in (*route.versions, *route.shadow):
                events.append(event)
    return tuple(sorted(events, key=lambda event: (event.at, event.id)))


def _signatures(catalog: Catalog, authority: Authority, records: list[Record]) -> dict[str, tuple[str, ...]]:
    """Record → signers with a valid signature of it."""
    signers = {record.id: valid_signers(catalog.standing, record) for record in records}
    return {record: tuple(f"{authority.name_of(key)} ({key})" for key in keys) for record, keys in signers.items() if keys}


def approval_of(catalog: Catalog, event: Event) -> Approval:
    """What an approval event says, by whom, and whether its signature holds."""
    authority, standing = catalog.authority(), catalog.standing
    who = f"{authority.name_of(event.key)} ({event.key})" if event.key in authority.signers else event.key
    data = event.data
    holds = any(
        placed.event == event and standing.is_signed(placed) for placed in standing.placed("approval", event.subject)
    )
    return Approval(
        event.at, who, holds, str(data.get("decision", "")), str(data.get("alias", "")), str(data.get("why", ""))
    )


def _configuration(store: Store, chain: list[ModelVersion]) -> dict[str, Any]:
    """`config.json` of the version, or of its base model if it is an adapter."""
    for version in chain:
        path = paths.model(version.id, "config.json")
        if version.weights == "full" and store.exists(path):
            value = store.read_json(path)
            return value if isinstance(value, dict) else {}
    return {}


def num_parameters(store: Store, version: ModelVersion) -> int | None:
    """Number of parameters, from the headers of the version's safetensors files; None if these are not in the store."""
    total = 0
    names = [entry.path for entry in version.files if entry.path.endswith(".safetensors")]
    for name in names:
        path = paths.model(version.id, name)
        if not store.exists(path):
            return None
        with store.filesystem.open_input_file(store.path(path)) as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER
            if length >= MAX_HEADER:
                return None
            try:
                header = json.loads(stream.read(length))
            except ValueError:
                return None
        for key, entry in header.items():
            if key != "__metadata__":
                size = 1
                for extent in entry["shape"]:
                    size *= int(extent)
                total += size
    return total if names else None


def _packages(store: Store, run: RunRecord) -> tuple[Package, ...]:
    """The packages of the environment lock; for a run without a lock, those that affect results."""
    packages = {name: {"version": version} for name, version in run.environment.items() if name != "machine"}
    packages |= environment.read(store, run.environment_digest).get("packages", {})
    return tuple(
        Package(name, each["version"], _licence(name, each["version"]), each.get("record", ""))
        for name, each in sorted(packages.items())
        if each["version"] != "absent"
    )


def _licence(name: str, version: str) -> str:
    if name == "python":
        return "PSF-2.0"
    try:
        fields = dict(importlib.metadata.metadata(name).json)
    except importlib.metadata.PackageNotFoundError:
        return ""
    licence = str(fields.get("license_expression") or fields.get("license") or "")
    return spdx(licence) if fields.get("version") == version else ""


def spdx(licence: str) -> str:
    """The licence as a canonical SPDX expression; "" if it is not one."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        return str(canonicalize_license_expression(licence))
    except InvalidLicenseExpression:
        return ""


def sha256_of(record: Record) -> str:
    """The full sha256, in hex, that the record's id is the start of."""
    value = record.config_digest if isinstance(record, RunRecord) else digest(record.identity())
    return hex_of(value)
