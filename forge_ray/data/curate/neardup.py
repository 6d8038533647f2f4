"""MinHash signatures, LSH bands and clusters.

Broder, "On the resemblance and containment of documents" (1997); Leskovec et al., "Mining of Massive Datasets", chapter 3. A
pair with Jaccard similarity s shares a band of r hashes with probability s^r, and so at least one of b bands with
1 - (1 - s^r)^b. Candidates are then compared by their whole signatures, so a shared band alone makes no duplicate.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from forge_ray.config.curate import NearDuplicates
from forge_ray.data.curate.words import hashes, mixed, runs, words

MIN_RECALL = 0.95  # of pairs that are exactly as similar as the threshold; bands are as long as this allows
COMPARED = 1 << 16  # signatures compared at once


def signature(texts: list[str], rule: NearDuplicates) -> npt.NDArray[np.uint32]:
    """uint32 [num_hashes]. A record of fewer words than a shingle is one shingle: equal or different."""
    text_words = [word for text in texts for word in words(text)]
    hashed = hashes(text_words)
    shingles = runs(hashed, min(rule.ngram, max(1, len(hashed))))
    if not len(shingles):
        return np.full(rule.num_hashes, np.uint32(0xFFFFFFFF))
    factors, offsets = _permutations(rule.num_hashes)
    # multiply-shift hashing (Dietzfelbinger et al. 1997): the upper half of a*x + b, for each of the num_hashes pairs (a, b)
    upper: npt.NDArray[np.uint64] = (np.unique(shingles)[:, None] * factors + offsets) >> np.uint64(32)
    smallest: npt.NDArray[np.uint32] = upper.min(axis=0).astype(np.uint32)
    return smallest


@lru_cache(maxsize=4)
def _permutations(count: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    values = mixed(np.arange(1, 2 * count + 1, dtype=np.uint64))
    return values[:count] | np.uint64(1), values[count:]


@lru_cache(maxsize=16)
def band_rows(threshold: float, num_hashes: int) -> int:
    """Hashes per band: the most that still find `MIN_RECALL` of the pairs at the threshold."""
    rows = [r for r in range(1, num_hashes + 1) if 1 - (1 - threshold**r) ** (num_hashes // r) >= MIN_RECALL]
    return max(rows, default=1)


def band_keys(signatures: npt.NDArray[np.uint32], rule: NearDuplicates) -> npt.NDArray[np.uint64]:
    """uint32 [n, num_hashes] → uint64 [n, bands]: equal keys are the candidates."""
    rows = band_rows(rule.threshold, rule.num_hashes)
    bands = [signatures[:, start : start + rows] for start in range(0, rule.num_hashes - rows + 1, rows)]
    keys = np.empty((len(signatures), len(bands)), np.uint64)
    for number, band in enumerate(bands):
        total = np.full(len(signatures), number, np.uint64)
        for column in range(rows):
            total = mixed(total + band[:, column])
        keys[:, number] = total
    return keys


def edges_of_band(
    keys: npt.NDArray[np.uint64], signatures: npt.NDArray[np.uint32], threshold: float
) -> npt.NDArray[np.int64]:
    """int64 [m, 2]: pairs of similar records that share a bucket, enough of them to connect each cluster.

    In every bucket all records are compared with the first; those unlike it go into another round with a first of their own.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    edges = []
    while len(order):
        first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        heads = np.repeat(order[first], np.diff(np.append(first, len(order))))
        rest = np.ones(len(order), bool)
        rest[first] = False
        order, ordered, heads = order[rest], ordered[rest], heads[rest]
        alike = _similar(signatures, order, heads, threshold)
        edges.append(np.stack([heads[alike], order[alike]], axis=1))
        order, ordered = order[~alike], ordered[~alike]
    return np.concatenate(edges).astype(np.int64) if edges else np.zeros((0, 2), np.int64)


def _similar(
    signatures: npt.NDArray[np.uint32], left: npt.NDArray[np.int64], right: npt.NDArray[np.int64], threshold: float
) -> npt.NDArray[np.bool_]:
    alike = np.zeros(len(left), bool)
    for start in range(0, len(left), COMPARED):
        part = slice(start, start + COMPARED)
        alike[part] = (signatures[left[part]] == signatures[right[part]]).mean(axis=1) >= threshold
    return alike


def cluster(count: int, edges: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64 [count]: for each record the smallest number of its connected component."""
    labels = np.arange(count, dtype=np.int64)
    while len(edges):
        left, right = labels[edges[:, 0]], labels[edges[:, 1]]
        open_edges = left != right
        if not open_edges.any():
            break
        edges, left, right = edges[open_edges], left[open_edges], right[open_edges]
        np.minimum.at(labels, np.maximum(left, right), np.minimum(left, right))
        while not np.array_equal(shorter := labels[labels], labels):
            labels = shorter
    return labels
