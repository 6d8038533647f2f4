"""Words of a text as 64-bit hashes, and hashes of their runs: the ground of duplicates and decontamination."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import xxhash

_WORD = re.compile(r"\w+")
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that multiplication by it loses nothing


def words(text: str) -> list[str]:
    """Words in lower case; punctuation and layout do not count. Uint64 hashes of them are what the rest compares."""
    return _WORD.findall(text.lower())


def hashes(text_words: Iterable[str]) -> npt.NDArray[np.uint64]:
    return np.fromiter((xxhash.xxh3_64_intdigest(word.encode()) for word in text_words), np.uint64)


def runs(hashed: npt.NDArray[np.uint64], length: int) -> npt.NDArray[np.uint64]:
    """[n] word hashes → [n - length + 1] hashes of each run of `length` words; none if there are fewer words."""
    count = len(hashed) - length + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for place in range(length):
        total = total * np.uint64(_FACTOR) + hashed[place : place + count]
    return mixed(total)


def mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spreads neighbouring values over all 64 bits (the finaliser of MurmurHash3)."""
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
