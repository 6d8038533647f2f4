"""The items of a report, as they were written: verified against its digest."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from forge_ray.config.classify import normalise
from forge_ray.config.measurements import GENERAL
from forge_ray.errors import StoreError
from forge_ray.evaluate.answer_schema import KEPT_AS
from forge_ray.evaluate.chance import Difference
from forge_ray.evaluate.examples import GENERAL_SPLIT
from forge_ray.evaluate.measures import differences
from forge_ray.evaluate.named_files import sha256_of
from forge_ray.evaluate.own import kept_name
from forge_ray.evaluate.summary import OTHER
from forge_ray.records import EvalReport
from forge_ray.store import paths
from forge_ray.store.files import Store

ITEMS = ("items.jsonl", "safety.jsonl", "contaminated.jsonl")  # a report's digest is over those that are there


def read_items(store: Store, report: EvalReport) -> bytes:
    """`items.jsonl` of a report, verified together with its other files. Raises `StoreError` if one was changed."""
    folder = paths.report(report.id)
    items = store.read(f"{folder}/{ITEMS[0]}")
    more = [store.read(f"{folder}/{name}") for name in ITEMS[1:] if store.exists(f"{folder}/{name}")]
    if hashlib.sha256(b"".join([items, *more])).hexdigest() != report.items_sha256:
        raise StoreError(f"{folder}/{ITEMS[0]} does not match the report's digest", hint="restore it from a backup")
    return items


def verify_sources(store: Store, report: EvalReport) -> None:
    """Compare the kept files of `eval.metrics` and `eval.json_schema` with the digests in the report's settings. Raises
    `StoreError`."""
    digests = {kept_name(one["sha256"]): one["sha256"] for one in report.config.get("metrics", [])}
    if sha256 := report.config.get("json_schema"):
        digests[KEPT_AS] = sha256
    for name, sha256 in digests.items():
        path = paths.report(report.id, name)
        if not store.exists(path) or sha256_of(store.read(path)) != sha256:
            raise StoreError(f"{path} is not there or not what the report was made with", hint="restore it from a backup")


def items_of(store: Store, report: EvalReport) -> list[dict[str, Any]]:
    """One per evaluated row."""
    return [json.loads(line) for line in read_items(store, report).splitlines()]


def splits_of(report: EvalReport) -> tuple[tuple[str, str], ...]:
    """(dataset version, split) of the rows that a report is of: the evaluated ones, then the general ones."""
    return (report.dataset, report.split), *([(report.general, GENERAL_SPLIT)] if report.general else [])


def split_of(report: EvalReport, metric: str) -> tuple[str, str]:
    """(dataset version, split) of the rows that a metric is of."""
    return splits_of(report)[-1 if metric.startswith(GENERAL) else 0]


def labels_of(report: EvalReport) -> tuple[str, ...]:
    """The label set that a report was made with, as labels are compared."""
    names = tuple(dict.fromkeys(map(normalise, report.per_class)))
    return tuple(name for name in names if name != OTHER) if report.config.get("labels") else ()


def compared(store: Store, ours: EvalReport, theirs: EvalReport, confidence: float) -> dict[str, Difference | None]:
    """Metric → ours minus theirs on the rows that both have."""
    return differences(items_of(store, ours), items_of(store, theirs), labels_of(ours), confidence)
