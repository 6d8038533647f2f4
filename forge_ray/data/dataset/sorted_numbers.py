"""A sorted array of numbers in the store that is searched without reading it, and checked where it is read.

    <name>.bin           the numbers, ascending, `width` bytes each, the most significant byte first
    <name>-fences.npy    of every `CHUNK` numbers the first one, and a digest

Whoever opens one has verified the fences by their sha256; the digests in them vouch for the rest.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.errors import StoreError
from forge_ray.store.files import Store

CHUNK = 1 << 16  # numbers that share a digest: half a MiB, hashed in half a millisecond
FENCE = np.dtype([("first", "<u8"), ("digest", "<u8", 2)])
Uint64s = npt.NDArray[np.uint64]


@dataclass
class Sorted:
    """A sorted array in the store with its fences; a chunk is checked the first time that it is read."""

    store: Store
    path: str
    width: int
    fences: npt.NDArray[Any]
    checked: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, store: Store, path: str, width: int, fences: bytes) -> Sorted:
        """`fences`: what their file holds, verified."""
        return cls(store, path, width, np.load(io.BytesIO(fences), allow_pickle=False))

    def within(self, lows: Uint64s, span: int) -> tuple[npt.NDArray[np.int64], Uint64s]:
        """The entries low..low + span of each of the ascending numbers `lows`: (which of them, entry). Raises `StoreError`
        where a chunk is not what was written."""
        highs, firsts = lows + np.uint64(span), self.fences["first"]
        begin = np.maximum(np.searchsorted(firsts, lows, "left") - 1, 0)
        count = np.maximum(np.searchsorted(firsts, highs, "right") - begin, 0)
        asking, chunks = np.repeat(np.arange(len(lows)), count), np.repeat(begin, count) + offsets(count)
        owners, inside_each = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for number in np.unique(chunks).tolist():
            entries, owned = self._chunk(number), asking[chunks == number]
            start = np.searchsorted(entries, lows[owned], "left")
            inside = np.searchsorted(entries, highs[owned], "right") - start
            owners.append(np.repeat(owned, inside))
            inside_each.append(entries[np.repeat(start, inside) + offsets(inside)])
        return np.concatenate(owners), np.concatenate(inside_each)

    def _chunk(self, number: int) -> Uint64s:
        size = CHUNK * self.width
        with self.store.filesystem.open_input_file(self.store.path(self.path)) as stream:
            stream.seek(number * size)
            data = stream.read(size)
        if number not in self.checked:
            if _digest(data) != self.fences["digest"][number].tobytes():
                raise StoreError(f"{self.path}: chunk {number} is not what was written", hint="remove the folder `index`")
            self.checked.add(number)
        return _numbers(data, self.width)


def write_sorted(folder: Path, name: str, values: Uint64s, width: int) -> None:
    """Write ascending `values`, each of which fits into `width` bytes, and their fences."""
    data = _bytes(values, width)
    (folder / f"{name}.bin").write_bytes(data)
    np.save(folder / f"{name}-fences.npy", _fences(values, data, width), allow_pickle=False)


def _fences(values: Uint64s, data: bytes, width: int) -> npt.NDArray[Any]:
    fences, size = np.zeros(-(-len(values) // CHUNK), FENCE), CHUNK * width
    for number in range(len(fences)):
        digest = _digest(data[number * size : (number + 1) * size])
        fences[number] = (values[number * CHUNK], np.frombuffer(digest, "<u8"))
    return fences


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def _bytes(values: Uint64s, width: int) -> bytes:
    """The last `width` bytes of each number, the first of them first."""
    return np.ascontiguousarray(values.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 8 - width :]).tobytes()


def _numbers(data: bytes, width: int) -> Uint64s:
    padded = np.zeros((len(data) // width, 8), np.uint8)
    padded[:, 8 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
    return padded.view(">u8").ravel().astype(np.uint64)


def offsets(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0 … n - 1 for each n of `counts`, one after the other."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
