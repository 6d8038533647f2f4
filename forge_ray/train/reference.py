"""Log probabilities of every document under the model that a run starts from, which some losses compare with.

    references/<dataset>/<key>/<split>-<first row>.parquet      per packed row, the log p of each document's trained tokens

They are computed once for a dataset, by the run's own engine before its first step: the weights are then those of the base
(a new adapter adds nothing), so no second model is held, and what trains fits. Every run that starts from the same weights
in the same precision reads them again. A pass that was killed continues with the pieces that are there.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from forge_ray.data.dataset.stream import Rows
from forge_ray.errors import StoreError
from forge_ray.records import canonical_json, digest
from forge_ray.store import paths
from forge_ray.store.files import Store
from forge_ray.train.context import Context, agree
from forge_ray.train.engine import TrainEngine
from forge_ray.train.follow import PROGRESS
from forge_ray.train.job import TrainJob
from forge_ray.train.loss import segment_sums, token_logps
from forge_ray.train.method import Column, Expect, Forward
from forge_ray.train.model import load_for_training

FORMAT = 1
SPLITS = ("train", "validation")
PIECE_ROWS = 16  # packed rows of one file


@dataclass(frozen=True)
class RowRange:
    """Some neighbouring packed rows of a split."""

    split: str
    first: int
    num_rows: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.first:09d}.parquet"


@dataclass(frozen=True)
class Reference:
    """Of the model that a job starts from, over the rows of its dataset."""

    job: TrainJob

    @property
    def key(self) -> str:
        """What decides the numbers, beside the dataset."""
        job = self.job
        weights = [job.base.files_digest, *([job.initial.files_digest] if job.initial else [])]
        return digest([FORMAT, weights, job.precision]).removeprefix("sha256:")[:16]

    @property
    def folder(self) -> str:
        return paths.reference(self.job.dataset.id, self.key)

    @property
    def column(self) -> Column:
        return Column("reference_logps", "segment", blank=0.0, read=self.read)

    def read(self, rows: Rows, numbers: list[int]) -> npt.NDArray[np.float32]:
        """[B, S] fp32: of each document of the rows, 0 where a row has fewer; S is even."""
        return by_segment([self._of_row(rows, number) for number in numbers], 0.0)

    def _of_row(self, rows: Rows, number: int) -> list[float]:
        first = number - number % PIECE_ROWS
        piece = RowRange(rows.split, first, min(PIECE_ROWS, rows.num_rows - first))
        return _values(self.job.store, self.folder, piece)[number - first]

    def keep(self, engine: TrainEngine, context: Context, expect: Expect) -> None:
        """Compute and publish what is missing; collective, and every rank does as many passes."""
        job, store = self.job, self.job.store
        if agree(store.is_published(self.folder), context):
            return
        missing = agree([piece for piece in pieces(job) if not job.store.exists(self._unfinished(piece))], context)
        engine.model.eval()
        for start in range(0, len(missing), context.data_size):
            expect("reference", start)
            if context.is_first:
                store.write(paths.run(job.run, PROGRESS), canonical_json({"done": start, "total": len(missing)}))
            own = missing[start + context.data_rank : start + context.data_rank + 1]
            piece = own[0] if own else missing[start]
            values = self._pass(engine, piece, context)
            if own and not context.sp_rank:
                job.store.write(self._unfinished(piece), _parquet(values))
        engine.model.train()
        agree(None, context)  # every rank has written its pieces once rank 0 goes on
        if context.is_first:
            self._publish()
        agree(None, context)

    def difference(self, num_rows: int) -> tuple[float, float]:
        """(largest difference, largest log p) in nats over a few training rows, computed once more in this process by the
        model that the run started from."""
        job, rows = self.job, Rows.of(self.job.store, self.job.dataset, "train")
        chosen = sorted(Random(job.run).sample(range(rows.num_rows), min(num_rows, rows.num_rows)))
        config = job.config.model_copy(
            update={"engine": "torch", "zero_stage": 0, "adapter": job.config.adapter if job.initial else None}
        )
        base = job.store.fetch_dir(paths.model(job.base.id), files=job.base.files)
        initial = job.store.fetch_dir(paths.model(job.initial.id), files=job.initial.files) if job.initial else None
        model: Any = load_for_training(base, config, job.precision, torch.device("cpu"), 1, initial=initial).eval()
        again = by_segment([self._logps(model, rows, [number], torch.device("cpu"))[0] for number in chosen], 0.0)
        kept = self.read(rows, chosen)
        return float(np.abs(again - kept).max()), float(np.abs(kept).max())

    def _pass(self, engine: TrainEngine, piece: RowRange, context: Context) -> list[list[float]]:
        """Per row of the piece, the log p of each of its documents; `PIECE_ROWS` rows' worth of passes on every rank."""
        rows, size = Rows.of(self.job.store, self.job.dataset, piece.split), self.job.config.micro_batch_size
        values: list[list[float]] = []
        for offset in range(0, PIECE_ROWS, size):
            numbers = [piece.first + place for place in range(offset, min(offset + size, piece.num_rows))]
            values += self._logps(engine.forward, rows, numbers or [piece.first], context.device)[: len(numbers)]
        return values

    @torch.no_grad()
    def _logps(self, forward: Forward, rows: Rows, numbers: list[int], device: torch.device) -> list[list[float]]:
        """Per row, the log p of each of its documents; one pass."""
        batch = {name: torch.from_numpy(array).to(device) for name, array in rows.batch(numbers).items()}
        logps_K, positions_K = token_logps(forward, batch)
        sums_BS, _ = segment_sums(logps_K, positions_K, batch)
        counts = batch["segment_ids"].amax(dim=1).tolist()
        return [row[:count] for row, count in zip(sums_BS.tolist(), counts, strict=True)]

    def _unfinished(self, piece: RowRange) -> str:
        return paths.work("references", f"{self.job.dataset.id}-{self.key}", piece.name)

    def _publish(self) -> None:
        store = self.job.store
        self.job.check_may_publish()
        with store.staged_dir(self.folder) as folder:
            for piece in pieces(self.job):
                (folder / piece.name).write_bytes(store.read(self._unfinished(piece)))
        store.delete(paths.run(self.job.run, PROGRESS))
        store.delete_dir(paths.work("references", f"{self.job.dataset.id}-{self.key}"))


def by_segment(values: list[list[float]], blank: float) -> npt.NDArray[np.float32]:
    """Numbers per document of each row as [B, S] fp32, S even as in `segment_sums`; `blank` where a row has fewer."""
    most = max(map(len, values), default=0)
    filled = np.full((len(values), most + most % 2), blank, np.float32)
    for lane, numbers in enumerate(values):
        filled[lane, : len(numbers)] = numbers
    return filled


def pieces(job: TrainJob) -> list[RowRange]:
    """Of the splits that training looks at."""
    return [
        RowRange(split, first, min(PIECE_ROWS, stats.num_rows - first))
        for split in SPLITS
        if (stats := job.dataset.splits.get(split))
        for first in range(0, stats.num_rows, PIECE_ROWS)
    ]


@lru_cache(maxsize=256)
def _values(store: Store, folder: str, piece: RowRange) -> list[list[float]]:
    path = _fetched(store, folder) / piece.name
    values: list[list[float]] = pq.read_table(path).column("logps").to_pylist() if path.is_file() else []
    if len(values) != piece.num_rows:
        raise StoreError(
            f"{folder}/{piece.name} has {len(values)} rows and the dataset {piece.num_rows}",
            hint=f"remove {folder}: the next run computes it again",
        )
    return values


@lru_cache(maxsize=4)
def _fetched(store: Store, folder: str) -> Any:
    """The folder on this machine, each file verified against its manifest."""
    return store.fetch_dir(folder)


def _parquet(values: list[list[float]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"logps": pa.array(values, pa.list_(pa.float32()))}), sink, compression="zstd")
    return sink.getvalue()
