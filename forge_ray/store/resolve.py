"""What a person types → the id of a record."""

from __future__ import annotations

from forge_ray.errors import NotFound
from forge_ray.records import Deployment, ModelVersion, hex_of
from forge_ray.store.catalog import Catalog


def resolve(catalog: Catalog, text: str) -> str:
    """An id, an alias, or what an answer carries (`system_fingerprint`, `x-forge-model-digest`) → a record's id."""
    if catalog.has(text):
        return text
    if text in catalog.aliases():
        return catalog.aliases()[text]
    prefix = hex_of(text.removeprefix("fp_"))
    if len(prefix) >= 8:
        digests = {record.id: record.model_digest for record in catalog.all(Deployment)}
        digests |= {record.id: record.files_digest for record in catalog.all(ModelVersion)}
        for identifier, digest in digests.items():
            if hex_of(digest).startswith(prefix):
                return identifier
    raise NotFound(f"{text!r} is no id, alias or fingerprint of this store", hint="`forge models list` shows what is there")
