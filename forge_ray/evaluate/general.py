"""General rows (`eval.general`): what a model could do before it was trained on a task.

They are a dataset version of their own, whose test split is scored, so lineage and erasure follow them as they follow other
rows. Only the loss is measured: generated answers to open questions take long, and no rule here judges them.
"""

from __future__ import annotations

from typing import Any

from forge_ray.config.data import DataConfig
from forge_ray.config.measurements import GeneralConfig, is_dataset_id
from forge_ray.config.release import EvalConfig
from forge_ray.data.build.prepare import existing_version
from forge_ray.data.dataset.version import records
from forge_ray.data.read.ingest import IndexedFile, expand, index_listed
from forge_ray.errors import DataError, NotFound
from forge_ray.evaluate.examples import GENERAL_SPLIT
from forge_ray.evaluate.rows import dataset_of, is_version, rows_of_file
from forge_ray.machine import shipped
from forge_ray.records import DatasetManifest, ModelVersion, hex_of
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

CARRIED = {"chats": "jobs/data/general_chats.jsonl", "texts": "jobs/data/general_texts.jsonl"}


def general_rows(catalog: Catalog, manifest: DatasetManifest, config: EvalConfig) -> DatasetManifest | None:
    """The dataset version of `eval.general`, with the tokenizer, tools and date of the evaluated rows (`manifest`); None
    where none is set. A row that the model's template has no place for is counted in the report (`left_out`)."""
    if config.general is None:
        return None
    rows = place_of(config.general)
    if is_version(catalog, rows):
        return catalog.get_as(DatasetManifest, rows)
    base = catalog.get_as(ModelVersion, manifest.base_model)
    settings: dict[str, Any] = {key: manifest.config[key] for key in ("tools", "date") if key in manifest.config}
    settings["max_invalid_fraction"] = 1.0
    data = rows_of_file(catalog, rows, base, settings)
    if version := existing_version(data, base, catalog, require_rows(config.general)):
        return version
    try:
        return dataset_of(catalog, rows, base, settings)
    except DataError as error:
        raise DataError(
            f"eval.general.rows={config.general.rows}: {error.message}",
            hint=f"name rows that {base.id} can take: `texts` for a model without a chat template",
        ) from error


def place_of(general: GeneralConfig) -> str:
    """The dataset version or the file of the rows; of rows that forge_ray carries, the file of this installation."""
    carried = CARRIED.get(general.rows)
    return str(shipped.folder() / carried) if carried else general.rows


def require_rows(general: GeneralConfig) -> list[IndexedFile]:
    """The files of the rows, by their bytes; none for a dataset version. Raises `NotFound` where there is no file,
    `DataError` where its digest is not `sha256`."""
    rows = place_of(general)
    if is_dataset_id(rows):
        return []
    data = DataConfig.model_validate({"sources": [{"path": rows}]})
    try:
        files = [index_listed(file, data.max_line_bytes) for file in expand(data)]
    except NotFound as error:
        raise NotFound(
            f"eval.general.rows={general.rows}: there is no such file",
            hint=f"name {' or '.join(CARRIED)}, a file of conversations or texts, or a dataset version (ds_…)",
        ) from error
    if general.sha256 and [file.sha256 for file in files] != [hex_of(general.sha256)]:
        digests = ", ".join(file.sha256 for file in files)
        raise DataError(
            f"eval.general.rows={general.rows} has sha256 {digests}, and eval.general.sha256 is {hex_of(general.sha256)}",
            hint="restore the file, or write its digest into eval.general.sha256 if the change is meant",
        )
    return files


def refuse_trained(store: Store, general: DatasetManifest, manifest: DatasetManifest) -> None:
    """Raise `DataError` if a general row is a training row of `manifest` too: its loss would not show what was forgotten."""
    ids = {record for table in records(store, general, GENERAL_SPLIT, ["record"]) for record in _ids(table)}
    shared = sorted({record for table in records(store, manifest, "train", ["record"]) for record in _ids(table)} & ids)
    if shared:
        raise DataError(
            f"{len(shared)} of the {len(ids)} general rows ({general.id}) are training rows of {manifest.id}: {shared[0]}"
            + (", …" if len(shared) > 1 else ""),
            hint=f"add {{rule: held_out, against: [{general.id}]}} to data.curate, or name other rows in eval.general",
        )


def _ids(table: Any) -> list[str]:
    return list(table.column("record").to_pylist())
