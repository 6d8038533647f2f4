"""What a frozen model says of every packed row of a dataset, which some losses compare with: made once, read in every step.

    references/<dataset>/<key>/<split>-<first row>.parquet      what `Measure` makes of each row, `FILE_ROWS` rows a file
    references/<dataset>/<key>/made_by.json                     the versions whose numbers they are

The frozen model is the one that a run starts from, and the run's own engine is asked before its first step (the weights are
then those of the base: a new adapter is switched off). Or it is another version: each worker loads it before the run's own
model, and releases it. Each row is a pass of its own, so that the numbers depend neither on the run's micro-batch nor on the
number of workers. A pass that was killed continues with the pieces that are there (`work/references/…`).
"""

from __future__ import annotations

import gc
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from forge_ray.config.train import TrainConfig
from forge_ray.data.dataset.stream import Rows
from forge_ray.errors import NotFound, TrainingError
from forge_ray.records import ModelVersion, canonical_json, digest
from forge_ray.store import paths
from forge_ray.store.owner import owner_mark
from forge_ray.train.context import Context, agree
from forge_ray.train.engine import TrainEngine
from forge_ray.train.follow import PROGRESS
from forge_ray.train.frozen import MADE_BY
from forge_ray.train.job import TrainJob
from forge_ray.train.measure import PIECE_ROWS, Measure, RowValues, by_segment
from forge_ray.train.method import Expect, Forward
from forge_ray.train.model import load_for_training, load_frozen
from forge_ray.train.reference_files import FILE_ROWS, RowRange, fetched, files_of, group_of, parquet, pieces, schema_of

FORMAT = 2


@dataclass(frozen=True)
class Reference:
    """Of the job's frozen model, or of the model that it starts from, over the rows of its dataset."""

    job: TrainJob
    measure: Measure

    @property
    def key(self) -> str:
        """What decides the numbers, besides the dataset."""
        job, weights = self.job, [version.files_digest for version in self.versions]
        how = ["nf4"] if self.is_quantised else []
        return digest([FORMAT, weights, job.precision, *how, *self.measure.settings]).removeprefix("sha256:")[:16]

    @property
    def versions(self) -> list[ModelVersion]:
        """Whose numbers they are."""
        job = self.job
        return list(job.frozen.versions) if job.frozen else [job.base, *([job.initial] if job.initial else [])]

    @property
    def is_quantised(self) -> bool:
        """Whether the run's own base gives the numbers, in 4 bits."""
        adapter = self.job.config.adapter
        return self.job.frozen is None and adapter is not None and adapter.quantize != "none"

    @property
    def folder(self) -> str:
        return paths.reference(self.job.dataset.id, self.key)

    def read(self, rows: Rows, numbers: Sequence[int]) -> list[RowValues]:
        """Of packed rows by number."""
        return [self._of_row(rows, number) for number in numbers]

    def _of_row(self, rows: Rows, number: int) -> RowValues:
        first, size = number - number % FILE_ROWS, self.measure.group_rows
        file = RowRange(rows.split, first, min(FILE_ROWS, rows.num_rows - first))
        group, place = divmod(number - first, size)
        return group_of(self.job.store, self.folder, file, group)[place]

    def prepare(self, context: Context, expect: Expect) -> None:
        """Where another model is asked: load it, compute and publish what is missing, release it; collective."""
        missing = self._missing(context)
        if missing:
            model: Any = self._opened(context.device)
            self._compute(model, missing, context, expect, together=False)
            del model
            gc.collect()
            if context.device.type == "cuda":
                torch.cuda.empty_cache()
        self._publish(missing, context, expect)

    def begin(self, engine: TrainEngine, context: Context, expect: Expect) -> None:
        """Where the run's own start is asked: compute and publish what is missing; collective."""
        missing = self._missing(context)
        if missing:
            engine.model.eval()
            with self._at_start(engine.model):
                self._compute(engine.forward, missing, context, expect, together=True)
            engine.model.train()
        self._publish(missing, context, expect)

    def _at_start(self, model: Any) -> AbstractContextManager[Any]:
        """A new adapter is switched off: it adds an exact zero, and takes its time."""
        is_new = self.job.config.adapter is not None and self.job.initial is None
        return model.disable_adapter() if is_new else nullcontext()

    def _opened(self, device: torch.device) -> Any:
        """The frozen model, its weights verified."""
        job, store = self.job, self.job.store
        assert job.frozen
        full, version = job.frozen.full, job.frozen.version
        base = store.fetch_dir(paths.model(full.id), files=full.files)
        adapter = store.fetch_dir(paths.model(version.id), files=version.files) if job.frozen.base else None
        return load_frozen(base, adapter, job.precision, device)

    def _missing(self, context: Context) -> list[RowRange] | None:
        """Pieces that nobody has computed yet, as rank 0 sees it; None where all is published."""
        missing: list[RowRange] | None = None
        if context.is_first and not self.job.store.is_published(self.folder):
            there = {path.rsplit("/", 1)[-1] for path in self.job.store.list(self._work)}
            missing = [piece for piece in pieces(self.job.dataset) if piece.name not in there]
        agreed: list[RowRange] | None = agree(missing, context)
        return agreed

    def _compute(self, forward: Forward, missing: list[RowRange], context: Context, expect: Expect, together: bool) -> None:
        """`together`: every rank does as many passes, for with ZeRO-3 each of them is collective."""
        job, store = self.job, self.job.store
        rank, size = (context.data_rank, context.data_size) if together else (context.rank, context.world_size)
        for start in range(0, len(missing), size):
            expect("reference", start)
            if context.is_first:
                progress = {"what": self._what, "done": start, "total": len(missing)}
                store.write(paths.run(job.run, PROGRESS), canonical_json(progress))
            own = missing[start + rank : start + rank + 1]
            for piece in own or missing[start : start + together]:
                rows = Rows.of(store, job.dataset, piece.split)
                last = piece.first + piece.num_rows - 1
                places = range(PIECE_ROWS if together else piece.num_rows)
                numbers = [min(piece.first + place, last) for place in places]
                values = [self._of_pass(forward, rows, number, context.device) for number in numbers]
                if own and not (together and context.sp_rank):
                    store.write(f"{self._work}/{piece.name}", parquet(values[: piece.num_rows], self.measure))

    @torch.no_grad()
    def _of_pass(self, forward: Forward, rows: Rows, number: int, device: torch.device) -> RowValues:
        batch = {name: torch.from_numpy(array).to(device) for name, array in rows.batch([number]).items()}
        values = self.measure.compute(forward, batch)
        if not all(np.isfinite(value).all() for value in values.values()):
            raise TrainingError(
                f"{self._what}: row {number} of {rows.split} has no finite log probabilities ({self.job.precision})",
                hint="the model's weights overflow in this precision: set train.precision=fp32, or take another model",
            )
        return values

    @property
    def _what(self) -> str:
        role = "teacher" if self.job.config.method_name == "distil" else "reference"
        return f"{role} {self.job.frozen.version.id if self.job.frozen else 'model'}"

    @property
    def _work(self) -> str:
        return paths.work("references", f"{self.job.dataset.id}-{self.key}")

    def _publish(self, missing: list[RowRange] | None, context: Context, expect: Expect) -> None:
        """Collective. Another run may have published the same at any time: its folder stays. Read back now, not in the first
        step: the watchdog gives both the time of a start."""
        if missing is not None:
            expect("publish", 0)
            agree(None, context)  # every rank has written its pieces once rank 0 goes on
            if context.is_first:
                self._publish_alone()
            agree(None, context)
            expect("start", 0)
        fetched(self.job.store, self.folder)

    def _publish_alone(self) -> None:
        store = self.job.store
        self.job.check_may_publish()
        staging = paths.reference(self.job.dataset.id, f".building-{self.key}-{owner_mark()}")
        try:
            with store.staged_dir(staging) as folder:
                for file, parts in files_of(self.job.dataset):
                    with pq.ParquetWriter(folder / file.name, schema_of(self.measure), compression="zstd") as writer:
                        for piece in parts:
                            table = pq.read_table(io.BytesIO(store.read(f"{self._work}/{piece.name}")))
                            writer.write_table(table, row_group_size=self.measure.group_rows)
                ids = [version.id for version in self.versions]
                (folder / MADE_BY).write_bytes(canonical_json({"versions": ids, "precision": self.job.precision}))
            store.move_dir(staging, self.folder)
        except NotFound:  # another run was faster, and has removed the pieces
            if not store.is_published(self.folder):
                raise
        finally:
            store.delete_dir(staging)
        store.delete(paths.run(self.job.run, PROGRESS))
        store.delete_dir(self._work)

    def difference(self, num_rows: int) -> tuple[float, float]:
        """(the largest difference between what is kept and what this process computes, the largest number), in nats, over a
        few training rows."""
        job, rows = self.job, Rows.of(self.job.store, self.job.dataset, "train")
        device = torch.device("cpu")
        chosen = sorted(Random(job.run).sample(range(rows.num_rows), min(num_rows, rows.num_rows)))
        model: Any = self._opened(device) if job.frozen else self._started(job.config, device)
        again = [self._of_pass(model, rows, number, device) for number in chosen]
        results = list(map(self.measure.difference, self.read(rows, chosen), again))
        return max((first for first, _ in results), default=0.0), max((size for _, size in results), default=0.0)

    def _started(self, config: TrainConfig, device: torch.device) -> Any:
        """The model that the run started from."""
        job = self.job
        alone = {"engine": "torch", "zero_stage": 0, "adapter": config.adapter if job.initial else None, "freeze": ()}
        base = job.store.fetch_dir(paths.model(job.base.id), files=job.base.files)
        initial = job.store.fetch_dir(paths.model(job.initial.id), files=job.initial.files) if job.initial else None
        return load_for_training(base, config.model_copy(update=alone), job.precision, device, 1, initial=initial).eval()


def read_document_logps(reference: Reference, rows: Rows, numbers: list[int]) -> npt.NDArray[np.float32]:
    """[B, S] fp32: of each document of the rows, 0 where a row has fewer; S is even."""
    return by_segment([values["logps"].tolist() for values in reference.read(rows, numbers)], 0.0)
