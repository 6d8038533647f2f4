"""Copies of model versions outside the store: may one be made, which were made, which version is a folder a copy of.

A copy is an `export` event of its version: its form, where it was written to, and the sha256 of each of its files. The event
is written before the copy appears under its name, so a killed command leaves a copy too many on record, never one too few.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from forge_ray.errors import PolicyError
from forge_ray.records import Event, FileEntry, Frozen, ModelVersion, files_digest
from forge_ray.store import signing
from forge_ray.store.catalog import Catalog

WEIGHTS = (".safetensors", ".gguf")  # files that are told apart by their weights alone


class ExportedCopy(Frozen):
    """A copy of a version outside the store. `to`: the path or address that it was written to, as a text; `files`: path →
    sha256."""

    version: str
    form: str
    precision: str
    to: str
    by: str
    at: str
    digest: str
    files: dict[str, str]


def refuse_export(catalog: Catalog, version: ModelVersion) -> None:
    """Raise `PolicyError` where the policy keeps weights in the store, or this process may not write export events."""
    if catalog.authority().policy.no_export:
        owners = ", ".join(signer.name for signer in catalog.authority().active("owner"))
        raise PolicyError(
            f"policy.no_export: the weights of {version.id} do not leave this store",
            hint=f"serve it from here (`forge serve`); an owner ({owners}) can allow it: `forge policy set --allow-export`",
        )
    catalog.check_may("export events")


def record_export(
    catalog: Catalog, version: ModelVersion, form: str, precision: str, to: str, files: tuple[FileEntry, ...], why: str = ""
) -> ExportedCopy:
    """Write the event of a copy that is about to leave the store. Raises `PolicyError` as `refuse_export` does."""
    refuse_export(catalog, version)
    data = {
        "action": "written",
        "form": form,
        "precision": precision,
        "to": to,
        "by": signing.who(),
        "digest": files_digest(files),
        "files": {entry.path: entry.sha256 for entry in files},
        **({"why": why} if why else {}),
    }
    return _copy_of(catalog.append(Event(kind="export", subject=version.id, data=data)))


def exported(catalog: Catalog, versions: Collection[str] | None = None) -> tuple[ExportedCopy, ...]:
    """The copies that left the store, of these versions or of all, oldest first."""
    subjects = [one for one in catalog.subjects("export") if versions is None or one in versions]
    copies = [_copy_of(event) for subject in subjects for event in catalog.events("export", subject)]
    return tuple(sorted(copies, key=lambda copy: (copy.at, copy.version, copy.to)))


def _copy_of(event: Event) -> ExportedCopy:
    data = {name: event.data[name] for name in ("form", "precision", "to", "by", "digest", "files")}
    return ExportedCopy(version=event.subject, at=event.at, **data)


def copy_with(copies: tuple[ExportedCopy, ...], files: tuple[FileEntry, ...]) -> ExportedCopy | None:
    """The newest of `copies` whose weights are all among `files`, whatever else was changed around them."""
    digests = {entry.sha256 for entry in files}
    for copy in reversed(copies):
        weights = {sha256 for path, sha256 in copy.files.items() if path.endswith(WEIGHTS)}
        if weights and weights <= digests:
            return copy
    return None


def is_unchanged(copy: ExportedCopy, files: tuple[FileEntry, ...]) -> bool:
    """Whether `files` are the copy as it was written: every file of it and no other."""
    return copy.files == {entry.path: entry.sha256 for entry in files}


def is_version_itself(copy: ExportedCopy, version: ModelVersion) -> bool:
    """Whether the copy has the very weight files of its version: it was neither merged nor converted."""
    weights = {entry.sha256 for entry in version.files if entry.path.endswith(WEIGHTS)}
    return bool(weights) and weights <= set(copy.files.values())


def refuse_withdrawn_weights(catalog: Catalog, files: tuple[FileEntry, ...], source: Path) -> None:
    """Raise `PolicyError` for weights of a version that an erasure withdrew, or of a copy of one."""
    withdrawn = catalog.withdrawn()
    if not withdrawn:
        return
    weights = {
        entry.sha256: version
        for version in withdrawn
        if catalog.has(version)
        for entry in catalog.get_as(ModelVersion, version).files
        if entry.path.endswith(WEIGHTS)
    }
    weights |= {
        sha256: copy.version
        for copy in exported(catalog, withdrawn)
        for path, sha256 in copy.files.items()
        if path.endswith(WEIGHTS)
    }
    if hit := next((weights[entry.sha256] for entry in files if entry.sha256 in weights), None):
        raise PolicyError(
            f"{source.name} holds the weights of {hit}, which learned from rows that {withdrawn[hit]} erased",
            hint=f"remove this copy; `forge lineage {withdrawn[hit]}` names what replaces the version",
        )
