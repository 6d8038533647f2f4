"""Several sources in one dataset: how often each training record is used, and in which partition each use lies.

A source has `epochs`, or all have a `weight`. With weights the training set keeps its size in tokens, and each source gets
its share of them: a small source is repeated, a large one sampled. Which records a fraction takes, and where the repeats of
a record go, are functions of the record alone, so a mixture is the same at any parallelism and in any order of files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from forge_ray.config.data import DataConfig

MAX_EPOCHS = 100.0
GOLDEN = 0x9E3779B97F4A7C15


def epochs_of(config: DataConfig, tokens: list[int]) -> list[float]:
    """Times that each source's training records are used; `tokens` are its training tokens, used once."""
    if config.sources[0].weight is None:
        return [source.epochs for source in config.sources]
    present = [source.weight or 0.0 if count else 0.0 for source, count in zip(config.sources, tokens, strict=True)]
    total, weights = sum(tokens), sum(present)
    return [
        min(MAX_EPOCHS, round(weight / weights * total / count, 6)) if count else 0.0
        for weight, count in zip(present, tokens, strict=True)
    ]


def num_copies(epochs: Sequence[float]) -> int:
    return max(1, math.ceil(max(epochs, default=1.0)))


def used(keys: npt.NDArray[np.uint64], epochs: npt.NDArray[np.float64], copy: int) -> npt.NDArray[np.bool_]:
    """Which records are used a (copy + 1)-th time: all while whole epochs are left, then a share by hash. All arrays [n]."""
    left = epochs - copy
    share = _mix(keys ^ np.uint64(0xC0FFEE)).astype(np.float64) / 2.0**64
    return share < left


def copy_key(keys: npt.NDArray[np.uint64], copy: int) -> npt.NDArray[np.uint64]:
    """The place of a record's copy in the shuffled order: the first is the record's own key."""
    return keys if copy == 0 else _mix(keys + np.uint64(copy * GOLDEN % 2**64))


def home_partition(partition: int, copy: int, num_partitions: int) -> int:
    """The partition whose records have their copy number `copy` in `partition`: repeats of a record lie apart."""
    stride = max(1, num_partitions // 2 - 1) | 1
    return (partition - copy * stride) % num_partitions


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
