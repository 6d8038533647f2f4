"""Versions that nothing more may be made of: what learned from erased rows, and what was archived."""

from __future__ import annotations

from forge_ray.errors import PolicyError
from forge_ray.store.catalog import Catalog


def refuse_withdrawn(catalog: Catalog, version: str, setting: str = "") -> None:
    """Raise `PolicyError` for a version that learned from erased rows. `setting`: what named it, for the message."""
    if erasure := catalog.withdrawn().get(version):
        raise PolicyError(
            f"{_named(setting)}{version} learned from rows that {erasure} erased",
            hint=f"`forge lineage {erasure}` and erasures/{erasure}/certificate.json name what replaces it",
        )


def refuse_archived(catalog: Catalog, version: str, setting: str = "") -> None:
    """Raise `PolicyError` for a version that was taken out of use. `setting` as above."""
    if version in catalog.archived():
        raise PolicyError(f"{_named(setting)}{version} is archived", hint=f"`forge models restore {version}` first")


def _named(setting: str) -> str:
    return f"{setting}: " if setting else ""
