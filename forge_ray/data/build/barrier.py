"""Rules over all records at once: exact and near duplicates, across files, shards and sources.

Every job of the map stage left its records with a MinHash signature. One task per LSH band reads that band of all jobs and
returns the pairs that share a bucket and are similar; their connected components are the clusters. The record that was read
first stays; of the others each job gets a list, in which every row names the record that stays.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from forge_ray.config.curate import ExactDuplicates, NearDuplicates
from forge_ray.data.build.summaries import MapSummary
from forge_ray.data.build.work import read_array, read_batches, read_plan, write_array, write_batches, write_plan
from forge_ray.data.curate.neardup import band_keys, cluster, edges_of_band
from forge_ray.machine.tasks import in_tasks
from forge_ray.store.files import Store

DROPPED = pa.schema([("row", pa.int64()), ("reason", pa.string())])
BANDS_PER_PASS = 4  # signatures are read once per pass, and the keys of so many bands held at once


def find_duplicates(
    store: Store, rule: ExactDuplicates | NearDuplicates, key: str, summaries: list[MapSummary]
) -> list[str]:
    """Per job, in their order: the work file that lists its dropped rows ('' where there is none)."""
    parts = [[part.path for part in summary.parts] for summary in summaries]
    counts = [summary.num_records for summary in summaries]
    total = sum(counts)
    if not total:
        return ["" for _ in summaries]
    write_plan(store, key, {"parts": parts, "rule": rule.model_dump(mode="json")})
    if isinstance(rule, ExactDuplicates):
        passes = [0]
    else:
        num_bands = band_keys(np.zeros((1, rule.num_hashes), np.uint32), rule).shape[1]
        passes = list(range(0, num_bands, BANDS_PER_PASS))
    tasks = [_Pass(key, first, is_last=first == passes[-1]) for first in passes]
    names: list[str] = []
    in_tasks(partial(_pairs, store=store), tasks, names.append, at_once=1)  # each holds the signatures of all records
    edges = np.concatenate([read_array(store, name).reshape(-1, 2) for name in sorted(names)])
    labels = cluster(total, edges)
    return _write_dropped(store, key, labels, parts, counts, "near duplicate" if len(passes) > 1 else "duplicate")


@dataclass(frozen=True)
class _Pass:
    """Some bands, from `first` on, over all records."""

    key: str
    first: int
    is_last: bool


def _pairs(bands: _Pass, store: Store) -> str:
    """A task; returns the work file with the pairs of duplicates."""
    name = f"{bands.key}-edges-{bands.first:04d}.npy"
    plan = _plan(store, bands.key)
    if isinstance(plan.rule, ExactDuplicates):
        records = np.concatenate([_records(store, path) for path in plan.parts])
        write_array(store, name, _equal(records))
        return name
    rule = plan.rule
    signatures = _all_signatures(store, bands.key, rule.num_hashes)
    if bands.is_last:
        _all_signatures.cache_clear()  # the process lives on
    keys = band_keys(signatures, rule)[:, bands.first : bands.first + BANDS_PER_PASS]
    edges = [edges_of_band(keys[:, band], signatures, rule.threshold) for band in range(keys.shape[1])]
    write_array(store, name, np.concatenate(edges))
    return name


@dataclass(frozen=True)
class _Plan:
    """What all passes share."""

    rule: ExactDuplicates | NearDuplicates
    parts: tuple[str, ...]  # work files, in the order of reading


@lru_cache(maxsize=4)
def _plan(store: Store, key: str) -> _Plan:
    value = read_plan(store, key)
    kind = ExactDuplicates if value["rule"]["rule"] == "exact_duplicates" else NearDuplicates
    return _Plan(kind.model_validate(value["rule"]), tuple(path for paths in value["parts"] for path in paths))


@lru_cache(maxsize=1)
def _all_signatures(store: Store, key: str, num_hashes: int) -> npt.NDArray[np.uint32]:
    """Of every record, for pass after pass: Ray gives the next task to the process that is free."""
    return np.concatenate([_signatures(store, path, num_hashes) for path in _plan(store, key).parts])


def _signatures(store: Store, path: str, num_hashes: int) -> npt.NDArray[np.uint32]:
    columns = [batch.column("signature").flatten().to_numpy(zero_copy_only=False) for batch in read_batches(store, path)]
    signatures: npt.NDArray[np.uint32] = np.concatenate(columns).astype(np.uint32).reshape(-1, num_hashes)
    return signatures


def _records(store: Store, path: str) -> npt.NDArray[Any]:
    """12-byte record ids as two numbers: [n, 2]."""
    ids = [value for batch in read_batches(store, path) for value in batch.column("record").to_pylist()]
    raw = np.frombuffer(b"".join(value + b"\0\0\0\0" for value in ids), np.uint64)
    return raw.reshape(-1, 2)


def _equal(records: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Pairs (first, other) of equal rows."""
    order = np.lexsort((np.arange(len(records)), records[:, 1], records[:, 0]))
    same = (records[order[1:]] == records[order[:-1]]).all(axis=1)
    return np.stack([order[:-1][same], order[1:][same]], axis=1).astype(np.int64)


def _write_dropped(
    store: Store, key: str, labels: npt.NDArray[np.int64], parts: list[list[str]], counts: list[int], what: str
) -> list[str]:
    """The dropped rows of each job, by row number inside it, naming the record that stays."""
    dropped = np.flatnonzero(labels != np.arange(len(labels)))
    names = _names(store, np.unique(labels[dropped]), parts, counts)
    files, start = [], 0
    for count in counts:
        in_job = dropped[(dropped >= start) & (dropped < start + count)]
        rows = [{"row": int(i - start), "reason": f"{what} of {names[int(labels[i])]}"} for i in in_job]
        name = ""
        if rows:
            content = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]
            name = f"dropped-{content}.arrow"  # by content: a job whose list did not change is not done again
            write_batches(store, name, pa.Table.from_pylist(rows, DROPPED), [len(rows)])
        files.append(name)
        start += count
    return files


def _names(store: Store, rows: npt.NDArray[np.int64], parts: list[list[str]], counts: list[int]) -> dict[int, str]:
    """Record ids of the rows that stay in some cluster; reads the id column of the parts that hold one."""
    names: dict[int, str] = {}
    start = 0
    for paths, count in zip(parts, counts, strict=True):
        in_job = rows[(rows >= start) & (rows < start + count)]
        if len(in_job):
            ids = [v for path in paths for batch in read_batches(store, path) for v in batch.column("record").to_pylist()]
            names |= {int(i): "rec_" + ids[int(i) - start].hex() for i in in_job}
        start += count
    return names
