"""Which rows a run really used, against which it should have used (no torch).

The loop writes two things down: the digest of the order (`Order.link`), and per step the sum of the fingerprints of the rows
that the model was given. The first is recomputed from the order alone, the second from the dataset's bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.data.dataset.order import Order, order_of
from forge_ray.data.dataset.stream import Rows
from forge_ray.errors import NotFound
from forge_ray.records import DatasetManifest, RunRecord
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train import metrics, run_folder
from forge_ray.train.fingerprint import fingerprint

WINDOW_STEPS = 64


@dataclass(frozen=True)
class DataFacts:
    """What a run wrote down about its data: a finished one in its record, another in its newest checkpoint."""

    run: str
    rows: Rows
    order: Order
    num_steps: int
    order_digest: str
    lines: list[dict[str, Any]]
    method: Any = "sft"  # the setting


def facts_of(store: Store, run: str) -> DataFacts:
    """Raises `NotFound` where the run has neither a record nor a checkpoint."""
    with Catalog.read_only(store) as catalog:
        if catalog.has(run):
            record = catalog.get_as(RunRecord, run)
            position: dict[str, Any] = {
                "dataset": record.dataset,
                "step": record.num_steps,
                "order_digest": record.order_digest,
                "order_key": record.order_key,
            }
            settings: dict[str, Any] = record.config["train"]
        else:
            position = _newest_position(store, run)
            settings = run_folder.config_of(store, run)["train"]
        manifest = catalog.get_as(DatasetManifest, position["dataset"])
    if not store.exists(paths.dataset(manifest.id)):
        raise NotFound(f"the rows of {manifest.id} are not in this store", hint="were they erased? the run's record remains")
    rows = Rows.of(store, manifest, "train")
    key = position.get("order_key") or manifest.id  # of a run that was made when the order followed from the dataset's id
    order = order_of(manifest, "train", settings["seed"], settings["global_batch"], key)
    lines = metrics.parse(store.read(paths.run(run, metrics.METRICS)).decode())
    return DataFacts(run, rows, order, position["step"], position["order_digest"], lines, settings.get("method", "sft"))


def _newest_position(store: Store, run: str) -> dict[str, Any]:
    for position in run_folder.positions(store, run):
        return position
    raise NotFound(f"{run!r} has no record and no checkpoint", hint="`forge runs list` shows the runs of this store")


@dataclass(frozen=True)
class Audit:
    """What `forge audit data` found; `problems` is empty when every step used exactly the rows that the order says."""

    run: str
    dataset: str
    num_steps: int
    num_rows: int
    samples_seen: int
    order_digest: str
    recomputed_digest: str
    steps_compared: int
    times_used: dict[str, int]  # how often a row was used → number of rows
    problems: tuple[str, ...]


def audit(facts: DataFacts, progress: Callable[[float, float, str], None]) -> Audit:
    """Compare what a run wrote down with its dataset. Reads every row that was used; memory is one window of steps."""
    rows, order, num_steps, order_digest = facts.rows, facts.order, facts.num_steps, facts.order_digest
    problems = []
    derived = {line["step"] - 1: line["derived"] for line in facts.lines if "derived" in line}
    recomputed = order.digest(num_steps, derived)
    if recomputed != order_digest:
        problems.append(f"the order's digest is {recomputed}, the run says {order_digest}")
    line_of = {line["step"]: line for line in facts.lines}
    missing = [step for step in range(1, num_steps + 1) if step not in line_of]
    if missing:
        problems.append(f"{len(missing)} of {num_steps} steps are not on record, the first is step {missing[0]}")
    compared = 0
    for first in range(0, num_steps, WINDOW_STEPS):
        window = range(first, min(first + WINDOW_STEPS, num_steps))
        numbers = [order.rows_of(step, range(order.global_batch)) for step in window]
        used = sorted({number for step in numbers for number in step})
        prints = dict(zip(used, map(_fingerprint_of_row, rows.take(used)["input_ids"]), strict=True))
        for step, of_step in zip(window, numbers, strict=True):
            line = line_of.get(step + 1)
            if line is None or "rows_sum" not in line:
                continue
            compared += 1
            expected = sum(prints[number] for number in of_step)
            if line["rows_sum"] != expected:
                problems.append(f"step {step + 1} was given other rows: their sum is {line['rows_sum']}, not {expected}")
        progress(window.stop, num_steps, "steps compared")
    return Audit(
        facts.run,
        rows.dataset,
        num_steps,
        rows.num_rows,
        num_steps * order.global_batch,
        order_digest,
        recomputed,
        compared,
        _times_used(order, num_steps),
        tuple(problems),
    )


def _fingerprint_of_row(row: npt.NDArray[np.int32]) -> int:
    return fingerprint(row[None])


def _times_used(order: Order, num_steps: int) -> dict[str, int]:
    counts = np.zeros(order.num_rows, np.int64)
    for step in range(num_steps):
        np.add.at(counts, order.rows_of(step, range(order.global_batch)), 1)
    times, numbers = np.unique(counts, return_counts=True)
    return {str(time): number for time, number in zip(times.tolist(), numbers.tolist(), strict=True)}


def records_of(rows: Rows, order: Order, step: int) -> list[dict[str, Any]]:
    """The rows of one step (from 1), in lane order, with the records inside each."""
    numbers = order.rows_of(step - 1, range(order.global_batch))
    return [
        {"lane": lane, "row": number, "records": records}
        for lane, (number, records) in enumerate(zip(numbers, rows.records(numbers), strict=True))
    ]
