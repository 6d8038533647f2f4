"""Held-out rows by the name that a person gives them: a dataset version, or a file of which one is built once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forge_ray.config.base import parse
from forge_ray.config.data import DataConfig
from forge_ray.config.measurements import is_dataset_id
from forge_ray.machine import sessions
from forge_ray.machine.cluster import connect
from forge_ray.progress import stage
from forge_ray.records import DatasetManifest, ModelVersion
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog

LONGEST = 8192  # tokens of a held-out conversation, where the model has positions for more


def rows_of_file(catalog: Catalog, file: str, base: ModelVersion, settings: dict[str, Any]) -> DataConfig:
    """The settings of a dataset that holds every row of `file` out; `settings` go before the defaults of this use."""
    length = min(LONGEST, _positions(catalog, base))
    defaults = {"sequence_length": length, "splits": {"validation": 0.0, "test": 1.0}}
    return parse(DataConfig, {"sources": [{"path": file}]} | defaults | settings, where="data")


def _positions(catalog: Catalog, base: ModelVersion) -> int:
    config = catalog.store.read_json(paths.model(base.id, "config.json"))
    return int(config.get("text_config", config).get("max_position_embeddings") or LONGEST)


def dataset_of(catalog: Catalog, data: str, base: ModelVersion, settings: dict[str, Any]) -> DatasetManifest:
    """`data`: the id of a dataset version, or a file of rows, all of which are held out; a version of it is built once."""
    if is_version(catalog, data):
        return catalog.get_as(DatasetManifest, data)
    from forge_ray.data.build.prepare import prepare_version
    from forge_ray.data.dataset.version import require_tokenizer

    connect()
    sessions.note(catalog.store)
    require_tokenizer(catalog.store, base)
    with stage("prepare") as it:
        prepared = prepare_version(name_of(data), rows_of_file(catalog, data, base, settings), base, catalog, it.update)
        it.done(f"{prepared.manifest.id}  {prepared.summary}")
    return prepared.manifest


def is_version(catalog: Catalog, data: str) -> bool:
    """Whether `data` is the id of a dataset version, here or elsewhere, and no file."""
    return catalog.has(data) or is_dataset_id(data)


def name_of(file: str) -> str:
    """A dataset's name, from its file's."""
    stem = Path(file).stem.lower()
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in stem).strip("._-")[:64] or "rows"
