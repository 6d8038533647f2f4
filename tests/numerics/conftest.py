"""Fixtures of the numerics tests: a small packed dataset, training jobs over it, and groups of worker processes.

A worker is forked from a server process that has imported the libraries already, so a group of two costs a second and not
twenty; it is told its rank by the environment, as torchrun would.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import worker

from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.data.build.pack import Document, PackedRow, pack
from forge_ray.data.dataset.version import GRADED, PACKED
from forge_ray.records import DatasetManifest, FileEntry, ModelVersion, SplitStats, canonical_json, digest
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import MANIFEST, Store
from forge_ray.train import attempts
from forge_ray.train.job import TrainJob

SEQUENCE_LENGTH = 48
BLOCK_ROWS = 4
OfRecords = tuple[pa.Field, dict[str, Any]]  # a further column of packed rows, and its value of each record
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_rank_of_an_earlier_test() -> None:
    """DeepSpeed, and accelerate where it finds a rank of DeepSpeed's, leave them in the environment of this process."""
    for name in RANKS:
        os.environ.pop(name, None)


PROCESSES = multiprocessing.get_context("forkserver")


def documents(seed: int, count: int) -> list[Document]:
    """Counting up in a random stride: something that a tiny model can learn. The first third is a prompt; every seventh
    document is all prompt."""
    random, generated = Random(seed), []
    for number in range(count):
        length, start, stride = random.randint(5, 30), random.randint(0, 149), random.randint(1, 3)
        ids = [10 + (start + stride * place) % 150 for place in range(length)]
        mask = [int(place >= length // 3 and number % 7 > 0) for place in range(length)]
        generated.append(Document(f"rec_{seed}_{number}", ids, mask))
    return generated


def pairs(seed: int, count: int) -> list[Document]:
    """2 `count` documents: counting up, as `documents` does, and the same prompt with another end."""
    random, generated = Random(seed), []
    for number in range(count):
        length, start, stride = random.randint(5, 20), random.randint(0, 149), random.randint(1, 3)
        prompt = [10 + (start + stride * place) % 150 for place in range(length // 3)]
        better = [10 + (start + stride * place) % 150 for place in range(length // 3, length)]
        worse = [random.randint(10, 159) for _ in range(random.randint(2, 8))]
        for answer in (better, worse):
            generated.append(Document(f"rec_pair_{seed}_{number}", prompt + answer, [0] * len(prompt) + [1] * len(answer)))
    return generated


def _shard(rows: list[PackedRow], more: OfRecords | None) -> bytes:
    columns = {
        "input_ids": [row.input_ids for row in rows],
        "loss_mask": [row.loss_mask for row in rows],
        "segment_ids": [row.segment_ids for row in rows],
        "records": [row.records for row in rows],
        "sources": [[0] * len(row.records) for row in rows],
    }
    schema = PACKED
    for field, values in [more] if more else []:
        schema = schema.append(field)
        columns[field.name] = [[values[record] for record in row.records] for row in rows]
    arrays = {name: pa.array([list(value) for value in values], schema.field(name).type) for name, values in columns.items()}
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays, schema=schema), sink, row_group_size=BLOCK_ROWS)
    return sink.getvalue()


@pytest.fixture(scope="session")
def dataset(store: Store) -> DatasetManifest:
    packed = {"train": pack(documents(0, 70), SEQUENCE_LENGTH, 0), "validation": pack(documents(1, 12), SEQUENCE_LENGTH, 0)}
    return written(store, "counting", packed, {})


@pytest.fixture(scope="session")
def judged(store: Store) -> dict[str, DatasetManifest]:
    """Datasets of judged answers by the kind of their records: the same documents, as pairs with margins and one by one."""
    manifests = {}
    for kind, size in (("preference", 2), ("feedback", 1)):
        packed, grades = {}, {}
        for split, (seed, count) in {"train": (0, 40), "validation": (1, 8)}.items():
            packed[split] = pack(pairs(seed, count), SEQUENCE_LENGTH, 0, size)
            for number in range(count):
                grades[f"rec_pair_{seed}_{number}"] = 1.0 + number if size == 2 else 1.0 - 2 * (number % 2)
        manifests[kind] = written(store, kind, packed, {kind: 48}, (GRADED.field("grades"), grades))
    return manifests


def written(
    store: Store,
    name: str,
    packed: dict[str, list[PackedRow]],
    kinds: dict[str, int],
    more: OfRecords | None = None,
    row_length: int = SEQUENCE_LENGTH,
) -> DatasetManifest:
    """A dataset version written without Ray Data, in the layout of `data/dataset/version.py`."""
    shards = {f"packed/{split}/shard-00000.parquet": _shard(rows, more) for split, rows in packed.items()}
    with Catalog.open(store) as catalog:
        base = catalog.model("tiny")
    manifest = DatasetManifest(
        name=name,
        format=1,
        kinds=kinds,
        input_digest=digest(name),
        config={},
        tokenizer_digest="",
        base_model=base.id,
        sources=(),
        splits={
            split: SplitStats(
                num_records=sum(len(row.records) for row in rows),
                num_rows=len(rows),
                num_tokens=sum(int((row.segment_ids > 0).sum()) for row in rows),
                num_trained_tokens=sum(int(row.loss_mask.sum()) for row in rows),
                rows_digest=digest([row.input_ids.tolist() for row in rows] + ([more[1]] if more else [])),
                block_rows=BLOCK_ROWS,
                shard_rows=(len(rows),),
            )
            for split, rows in packed.items()
        },
        num_duplicates=0,
        rejects={},
        sequence_length=row_length,
        files=tuple(
            FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for path, data in shards.items()
        ),
    ).sealed()
    for path, data in shards.items():
        store.write(f"datasets/{manifest.id}/{path}", data)
    listed = {"files": [entry.model_dump() for entry in manifest.files]}
    store.write(f"datasets/{manifest.id}/{MANIFEST}", canonical_json(listed))
    return manifest


@dataclass(frozen=True)
class Jobs:
    """Makes training jobs: `jobs("name", zero_stage=3, adapter={...})`. The name is the run's folder."""

    store: Store
    dataset: DatasetManifest

    def __call__(self, run: str, precision: str = "fp32", **settings: Any) -> TrainJob:
        defaults = {
            "engine": "deepspeed",
            "precision": precision,
            "max_steps": 4,
            "epochs": 100,
            "global_batch": 4,
            "micro_batch_size": 1,
            "optimizer": {"lr": 1e-3, "weight_decay": 0.01},
            "validation": {"max_rows": 0},
        }
        # what is on disk when a process dies must not depend on how fast a thread was; test_saving.py is about the thread
        checkpoint = {"asynchronous": False} | settings.pop("checkpoint", {})
        config = parse(TrainConfig, defaults | settings | {"checkpoint": checkpoint})
        with Catalog.open(self.store) as catalog:
            base = catalog.model("tiny")
        return TrainJob(run, run, config, self.store, self.dataset, base, precision, under_ray=False)

    def on(self, job: TrainJob, dataset: DatasetManifest) -> TrainJob:
        """The same job on other rows."""
        return replace(job, dataset=dataset)

    def on_base(self, job: TrainJob, base: ModelVersion) -> TrainJob:
        """The same job on another model with the same tokenizer."""
        return replace(job, base=base)


@pytest.fixture(scope="session")
def jobs(store: Store, dataset: DatasetManifest) -> Jobs:
    return Jobs(store, dataset)


@pytest.fixture(scope="session")
def fork_server() -> None:
    """Starts the server process; it gets `sys.path` as PYTHONPATH, for Python 3.11 does not pass it on."""
    PROCESSES.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, fork_server: None) -> Run:
    """`run(job, ranks=2, kill_at=3)`: train in `ranks` processes and return what the first one printed.

    `kill_at=k`: the process that logs step k dies before it does (`kill_in="report"`: when the checkpoint of step k is
    there), and the others are killed. `method`: the module whose `method_of` takes the place of the loop's. The test fails
    unless the first process ends with the exit code `expect` and printed the words `says`.
    """
    groups = 0

    def group(
        *tasks: TrainJob,
        ranks: int = 1,
        kill_at: int = 0,
        kill_in: str = "append",
        expect: int = 0,
        says: str = "",
        faults: worker.Faults | None = None,
        method: str = "",
    ) -> str:
        nonlocal groups
        groups += 1
        logs = [tmp_path / f"group-{groups}-rank-{rank}.log" for rank in range(ranks)]
        values = [replace(job, under_ray=False).to_json() for job in tasks]
        port = _free_port()
        workers = [
            PROCESSES.Process(
                target=worker.main, args=(values, rank, ranks, port, kill_at, kill_in, str(logs[rank]), faults or {}, method)
            )
            for rank in range(ranks)
        ]
        for process in workers:
            process.start()
        workers[0].join(300)
        for process in workers[1:]:
            if workers[0].exitcode == 0:
                process.join(60)
            if process.is_alive():
                process.kill()
                process.join()
        codes = [int(process.exitcode if process.exitcode is not None else -1) for process in workers]
        if workers[0].is_alive():
            workers[0].kill()
        printed = [log.read_text(errors="replace") for log in logs if log.is_file()]
        if codes[0] != expect or says not in printed[0]:
            pytest.fail(f"exit codes {codes}\n" + "\n".join(text[-6000:] for text in printed))
        return printed[0]

    return group


def _free_port() -> int:
    """Below the ports that the system hands out: no connection of another process takes it before the workers do."""
    random = Random()
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def losses(job: TrainJob, name: str = "loss") -> list[float]:
    """One value per step, from the run's metrics."""
    from forge_ray.train import metrics

    lines = metrics.read(job.store.local(f"runs/{job.run}") / metrics.METRICS)
    return [line[name] for line in lines if name in line]


def exported(job: TrainJob) -> dict[str, Any]:
    """The exported weights, fp32."""
    from safetensors.torch import load_file

    (path,) = job.store.local(f"runs/{job.run}/export").glob("*.safetensors")
    return {name: value.float() for name, value in load_file(path).items()}


def export_digest(job: TrainJob) -> str:
    """sha256 of the exported safetensors."""
    (path,) = job.store.local(f"runs/{job.run}/export").glob("*.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def first_steps(job: TrainJob) -> list[int]:
    """Where each start of the run began."""
    return [attempt["first_step"] for attempt in attempts.read(job.store, job.run)]


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
