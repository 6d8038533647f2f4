"""The work area of dataset builds: finished pieces, named by what decides them.

    work/data/<key>-<n>.arrow     tables of one piece of work (Arrow IPC, lz4)
    work/data/<key>.json          its summary, written last: without it the piece is not done

A key is a digest of the input bytes and settings: a build that was killed, or that sees more files than the last, takes what
is finished and does only the rest. Two builds at once write equal bytes under equal names. `forge data clean` empties it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol, Self, TypeVar
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc as ipc

from forge_ray.errors import StoreError
from forge_ray.records import canonical_json, hex_of
from forge_ray.store import paths
from forge_ray.store.files import Store
from forge_ray.store.owner import owner_mark

WORK = paths.work("data")


class Summary(Protocol):
    """What is written last of a piece of work."""

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self: ...


S = TypeVar("S", bound=Summary)


def finished(store: Store, key: str, kind: type[S]) -> S | None:
    """The summary of a piece that is done; None when it is not."""
    path = f"{WORK}/{key}.json"
    return kind.from_json(json.loads(store.read(path))) if store.exists(path) else None


def once(store: Store, key: str, kind: type[S], work: Callable[[], S], mark: str = "") -> S:
    """The summary of the finished piece, or of what `work` does now. Raises `StoreError` where the `mark` of the build is
    gone, and leaves nothing of the piece then: an erasure empties the work area of rows that builds had read before it."""
    summary = finished(store, key, kind)
    if summary is None:
        require(store, mark)
        summary = work()
        store.write(f"{WORK}/{key}.json", canonical_json(summary.to_json()))
        try:
            require(store, mark)
        except StoreError:
            for path in store.list(WORK):
                if path.startswith(f"{WORK}/{key}"):
                    store.delete(path)
            raise
    return summary


def mark(store: Store) -> str:
    """A file of the work area that is gone when another command has emptied it since."""
    path = f"{WORK}/begun-{owner_mark()}-{uuid4().hex}"
    store.write(path, b"")
    return path


def require(store: Store, mark: str) -> None:
    """Raise `StoreError` where the mark of a build is gone; "" is a build that nobody watches."""
    if mark and not store.exists(mark):
        raise StoreError(
            "the work area was emptied while a dataset was being built, by an erasure or by `forge data clean`",
            hint="run the same command again",
        )


def note_dataset(store: Store, input_digest: str, dataset: str) -> None:
    """Remember that a build from these inputs made an older dataset once more."""
    store.write(_note(input_digest), canonical_json({"dataset": dataset}))


def noted_dataset(store: Store, input_digest: str) -> str | None:
    path = _note(input_digest)
    return str(json.loads(store.read(path))["dataset"]) if store.exists(path) else None


def _note(input_digest: str) -> str:
    return f"{WORK}/inputs-{hex_of(input_digest)[:32]}.json"


def write_batches(store: Store, name: str, table: pa.Table, cuts: Sequence[int]) -> None:
    """One Arrow file whose record batches end at the row numbers `cuts`, so that a reader can take some of them."""
    sink = pa.BufferOutputStream()
    options = ipc.IpcWriteOptions(compression="lz4")
    batch = next(iter(table.combine_chunks().to_batches()), None)
    with ipc.new_file(sink, table.schema, options=options) as writer:
        start = 0
        for end in cuts:
            if batch is not None:
                writer.write_batch(batch.slice(start, end - start))
            start = end
    store.write(f"{WORK}/{name}", sink.getvalue())


def read_batches(store: Store, name: str, numbers: Sequence[int] | None = None) -> list[pa.RecordBatch]:
    """Some record batches of a file, or all."""
    reader = _reader(store, name)
    return [reader.get_batch(n) for n in (range(reader.num_record_batches) if numbers is None else numbers)]


def write_array(store: Store, name: str, array: npt.NDArray[Any]) -> None:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    store.write(f"{WORK}/{name}", stream.getvalue())


@lru_cache(maxsize=4)
def read_array(store: Store, name: str) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(io.BytesIO(store.read(f"{WORK}/{name}")), allow_pickle=False)
    return array


def _reader(store: Store, name: str) -> Any:
    path = f"{WORK}/{name}"
    if store.is_local:
        return ipc.open_file(pa.memory_map(store.path(path)))
    return ipc.open_file(store.filesystem.open_input_file(store.path(path)))


def clean(store: Store) -> int:
    """Remove the work area of dataset builds and nothing else; returns the bytes that lay there. Files that a dataset shares
    with it stay in the dataset."""
    size = sum(map(store.size, store.list(WORK, recursive=True)))
    store.delete_dir(WORK)
    return size


def read_plan(store: Store, key: str) -> Any:
    """What all tasks of a stage share."""
    return json.loads(store.read(f"{WORK}/plans/{key}.json"))


def write_plan(store: Store, key: str, value: Any) -> None:
    store.write(f"{WORK}/plans/{key}.json", canonical_json(value))
