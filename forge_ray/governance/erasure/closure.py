"""Which further records an erasure covers.

Besides the requested records these are their near duplicates, as the curation of a dataset version found them, and the rows
as they were read, where a rule masked something afterwards: without the latter a new build would take the row in again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.config.base import parse
from forge_ray.config.data import DataConfig
from forge_ray.data.build.map import kept_columns
from forge_ray.data.curate.rules import compile_rule
from forge_ray.data.dataset import index
from forge_ray.data.dataset.index import Place
from forge_ray.data.dataset.version import SPLITS
from forge_ray.data.read.ingest import index_listed
from forge_ray.data.read.lines import Raw
from forge_ray.data.read.readers import Chunk, image_reader, read_raw
from forge_ray.data.read.sources import ListedFile, expand
from forge_ray.data.record.schema import DataRecord, Reject, parse_line, parse_record
from forge_ray.errors import ForgeError
from forge_ray.records import DatasetManifest
from forge_ray.store import paths
from forge_ray.store.files import Store

DROPPED = "dropped"
IMAGE = re.compile(r'"(sha256:[0-9a-f]{64})"')


def tables(store: Store, dataset: str, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    """(split or `dropped`, table) of every file of records; columns that an older dataset version lacks are left out."""
    for name in (*(f"records/{split}" for split in SPLITS), DROPPED):
        for path in store.list(paths.dataset(dataset, name)):
            with store.filesystem.open_input_file(store.path(path)) as stream:
                file = pq.ParquetFile(stream)
                present = [column for column in columns if column in file.schema_arrow.names]
                for group in range(file.num_row_groups):
                    yield name.rsplit("/", 1)[-1], file.read_row_group(group, columns=present)


def near_duplicates(store: Store, manifest: DatasetManifest, records: set[str]) -> set[str]:
    """Members of the near-duplicate clusters that contain any of `records`, without `records` themselves."""
    heads = records | {place.kept for place in index.dropped(store, manifest, records) if place.kept}
    return (heads | {place.record for place in index.duplicates(store, manifest, heads)}) - records


def as_read(manifest: DatasetManifest, places: Iterable[Place]) -> tuple[list[DataRecord], list[str]]:
    """The rows before rules masked them, read again from the source files, and notes on files that cannot be read. A row
    that is no longer at its line is skipped: only its masked form is known."""
    config = parse(DataConfig, manifest.config)
    masks = [rule for rule in config.curate if getattr(rule, "action", "") == "mask"]
    if not masks:
        return [], []
    checks = [compile_rule(rule) for rule in masks]
    records_by_file: dict[str, dict[int, str]] = {}
    for place in places:
        records_by_file.setdefault(place.file, {})[place.line] = place.record
    records: list[DataRecord] = []
    try:
        files = {file.name: file for file in expand(config, any_split=True)}
    except ForgeError as error:
        return records, [f"{manifest.id}: {error.message}"]
    for name, lines in records_by_file.items():
        if name not in files:
            continue
        for chunk, raw in _rows(config, files[name]):
            if raw.line not in lines or (record := _parsed(config, chunk, raw)) is None:
                continue
            after = record
            for check in checks:
                after = check(after).record or after
            if after.id == lines[raw.line]:
                records.append(record)
    return records, [f"{name}: not found" for name in records_by_file if name not in files]


def _rows(config: DataConfig, file: ListedFile) -> Iterator[tuple[Chunk, Raw]]:
    for chunk in index_listed(replace(file, sha256=""), config.max_line_bytes).chunks:  # which may have changed since
        for raw in read_raw(chunk, config.max_line_bytes):
            yield chunk, raw


def _parsed(config: DataConfig, chunk: Chunk, raw: Raw) -> DataRecord | None:
    source, keep, images = config.sources[chunk.source], kept_columns(config), image_reader(chunk)
    if raw.reason:
        return None
    try:
        if raw.raw is not None:
            return parse_line(raw.raw, source.shape, source.mapping, keep, images)
        return parse_record(raw.value, source.shape, source.mapping, keep, images)
    except Reject:
        return None


def images(store: Store, dataset: str) -> set[str]:
    """Names of the images in the records of a dataset version."""
    names: set[str] = set()
    for _, table in tables(store, dataset, ["content"]):
        for content in table.column("content").to_pylist():
            names.update(IMAGE.findall(content or ""))
    return names


def quoting(lines: bytes, holds: Callable[[str], bool]) -> int:
    """Number of items of an evaluation whose record satisfies `holds(id)`."""
    return sum(holds(str(json.loads(line).get("record", ""))) for line in lines.splitlines())
