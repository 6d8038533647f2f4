"""What a classifier version answers beside its logits: temperatures and thresholds, of the report that it was released by
(no ray, no torch).

The report is one of the records that the version's own record names, and its id follows from its content: so what an
endpoint divides logits by is what the evaluation found, and is signed and verified with the version. A version without such
a report (imported, or a checkpoint) has temperatures of 1 and no thresholds, and its model card says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from forge_ray.config.classify import Target, class_names
from forge_ray.records import EvalReport, ModelVersion
from forge_ray.store.files import Store
from forge_ray.store.verified import read_record

HALF = 0.5  # from which a label of a `multi` target holds that has no threshold


@dataclass(frozen=True)
class ClassHead:
    """The targets of a version, and how their logits are read. `temperatures` by target, `thresholds` by label
    (`class_names`), `unreached`: what a label was asked for that no threshold reaches; `flags`: labels for which a text is
    flagged, () where it is no moderation model; `report`: where these are from, or ""."""

    targets: tuple[Target, ...]
    temperatures: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    unreached: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    report: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return class_names(self.targets)


def head_of(store: Store, version: ModelVersion, targets: tuple[Target, ...]) -> ClassHead:
    """Raises `StoreError` where a report that the version names is not there, or was changed."""
    for identifier in version.evals:
        report = read_record(store, EvalReport, identifier)
        if report.subject == version.run and report.subject_digest == version.files_digest and not report.step:
            prefixes = {target.name: f"{target.name}_" if len(targets) > 1 else "" for target in targets}
            measured = {name: report.metrics.get(f"{prefix}temperature") for name, prefix in prefixes.items()}
            temperatures = {name: value for name, value in measured.items() if value is not None}
            return ClassHead(targets, temperatures, report.thresholds, report.unreached, version.flags, report.id)
    return ClassHead(targets, flags=version.flags)
