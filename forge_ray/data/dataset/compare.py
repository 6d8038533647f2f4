"""What distinguishes two dataset versions, and which versions hold a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from forge_ray.data.dataset.version import SPLITS, find_record, find_subject, records
from forge_ray.errors import NotFound
from forge_ray.records import DatasetManifest
from forge_ray.store.files import Store

SHOWN = 20
COLUMNS = ["record", "source", "file", "line"]


def diff(store: Store, old: DatasetManifest, new: DatasetManifest) -> dict[str, Any]:
    """Records that only one of two versions holds, by source; `changed` are those that replaced another at the same file
    and line. Equal records that another source gave are counted where they are, not as a difference."""
    before, after = _table(store, old), _table(store, new)
    removed = before.filter(pc.invert(pc.is_in(before.column("record"), value_set=after.column("record"))))
    added = after.filter(pc.invert(pc.is_in(after.column("record"), value_set=before.column("record"))))
    removed_at = {(row["file"], row["line"]): row for row in removed.to_pylist()}
    changed, fresh = [], []
    for row in added.to_pylist():
        other = removed_at.pop((row["file"], row["line"]), None)
        if other:
            changed.append({**row, "was": other["record"]})
        else:
            fresh.append(row)
    groups = {"added": fresh, "removed": list(removed_at.values()), "changed": changed}
    return {
        "old": old.id,
        "new": new.id,
        "num_records": {"old": before.num_rows, "new": after.num_rows},
        "counts": {what: len(rows) for what, rows in groups.items()},
        "by_source": _by_source(groups),
        "settings": _settings(old, new),
        **{what: sorted(rows, key=lambda row: row["record"])[:SHOWN] for what, rows in groups.items()},
    }


def by_split(store: Store, old: DatasetManifest, new: DatasetManifest) -> dict[str, Any]:
    """`splits`: per split, distinct records of both versions and of one alone; `moved`: in both, but in another split."""
    sides = [{split: _ids(store, manifest, split) for split in SPLITS} for manifest in (old, new)]
    splits, stayed = {}, 0
    for split in SPLITS:
        before, after = (side[split] for side in sides)
        common = pc.sum(pc.is_in(before, value_set=after)).as_py() or 0
        stayed += common
        splits[split] = {"common": common, "only_old": len(before) - common, "only_new": len(after) - common}
    whole = [pa.concat_arrays(list(side.values())) for side in sides]
    both = pc.sum(pc.is_in(whole[0], value_set=whole[1])).as_py() or 0
    return {"splits": splits, "moved": both - stayed}


def _ids(store: Store, manifest: DatasetManifest, split: str) -> pa.Array:
    tables = [table.column("record") for table in records(store, manifest, split, ["record"])]
    return pc.unique(pa.chunked_array([chunk for column in tables for chunk in column.chunks], pa.string()))


def _table(store: Store, manifest: DatasetManifest) -> pa.Table:
    tables = [table for split in SPLITS for table in records(store, manifest, split, COLUMNS)]
    table = pa.concat_tables(tables)
    names = [source.name for source in manifest.mixture]
    source = pa.array([names[number] for number in table.column("source").to_pylist()], pa.string())
    return table.set_column(table.schema.get_field_index("source"), "source", source)


def _by_source(groups: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, int]]:
    counts = {what: Counter(row["source"] for row in rows) for what, rows in groups.items()}
    names = sorted({name for counter in counts.values() for name in counter})
    return {name: {what: counter[name] for what, counter in counts.items()} for name in names}


def _settings(old: DatasetManifest, new: DatasetManifest) -> dict[str, list[Any]]:
    """Settings of the `data:` section that differ: key → [old, new]."""
    keys = sorted((old.config.keys() | new.config.keys()) - {"sources"})
    return {key: [old.config.get(key), new.config.get(key)] for key in keys if old.config.get(key) != new.config.get(key)}


def holders(
    store: Store, manifests: list[DatasetManifest], record: str = "", subjects: Mapping[str, Collection[str]] | None = None
) -> list[dict[str, Any]]:
    """The dataset versions that hold a record, or the records of a person, with split, file and line. `subjects`: dataset
    version → HMACs of the person there."""
    held = []
    for manifest in manifests:
        if record:
            try:
                rows = [find_record(store, manifest, record)]
            except NotFound:
                rows = []
        else:
            rows = find_subject(store, manifest, (subjects or {}).get(manifest.id, ()))
        held += [{"dataset": manifest.id, "name": manifest.name, **_place(row)} for row in rows]
    return held


def _place(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("record", "split", "file", "line", "offset")}
