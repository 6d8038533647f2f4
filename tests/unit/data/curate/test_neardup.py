"""MinHash: the estimate is the Jaccard similarity, bands find the similar, clusters are connected components."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.config.curate import NearDuplicates
from forge_ray.data.curate.neardup import band_keys, band_rows, cluster, edges_of_band, signature
from forge_ray.data.curate.words import hashes, runs, words

pytestmark = pytest.mark.unit

RULE = NearDuplicates(rule="near_duplicates")


def jaccard(left: str, right: str, ngram: int) -> float:
    sets = []
    for text in (left, right):
        text_words = words(text)
        sets.append({tuple(text_words[i : i + ngram]) for i in range(len(text_words) - ngram + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_signatures_estimate_jaccard_similarity() -> None:
    seeded = random.Random(1)
    rule = NearDuplicates(rule="near_duplicates", num_hashes=512)
    for changed in (0, 5, 20, 60, 200):
        left = [str(seeded.randrange(10**6)) for _ in range(400)]
        right = list(left)
        for place in seeded.sample(range(400), changed):
            right[place] = "x"
        a, b = " ".join(left), " ".join(right)
        estimate = float((signature([a], rule) == signature([b], rule)).mean())
        assert estimate == pytest.approx(jaccard(a, b, rule.ngram), abs=4 * 0.5 / 512**0.5)  # four standard deviations


def test_signature_ignores_layout_and_case_but_not_word_order() -> None:
    one = signature(["The quick brown fox jumps over the lazy dog"], RULE)
    assert (one == signature(["the QUICK  brown fox,\n jumps over the lazy dog!"], RULE)).all()
    assert (one == signature(["The quick brown fox", "jumps over the lazy dog"], RULE)).all()
    assert not (one == signature(["dog lazy the over jumps fox brown quick The"], RULE)).any()


def test_records_without_words_match_only_each_other() -> None:
    empty = signature(["!!"], RULE)
    assert (empty == signature([""], RULE)).all()
    assert not (empty == signature(["yes"], RULE)).any()
    assert not (signature(["yes"], RULE) == signature(["no"], RULE)).any()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    rows = band_rows(threshold, 128)
    assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.95
    assert band_keys(np.zeros((3, 128), np.uint32), NearDuplicates(rule="near_duplicates", threshold=threshold)).shape == (
        3,
        128 // rows,
    )


def test_planted_clusters_are_recovered_exactly() -> None:
    seeded = random.Random(2)
    texts, truth = [], []
    for number in range(200):
        body = [str(seeded.randrange(10**6)) for _ in range(150)]
        for copy in range(1 + number % 3):
            copied = list(body)
            if copy:
                copied[seeded.randrange(150)] = f"changed{copy}"
            texts.append(" ".join(copied))
            truth.append(number)
    order = list(range(len(texts)))
    seeded.shuffle(order)
    texts, truth = [texts[i] for i in order], [truth[i] for i in order]
    signatures = np.stack([signature([text], RULE) for text in texts])
    keys = band_keys(signatures, RULE)
    edges = np.concatenate([edges_of_band(keys[:, band], signatures, RULE.threshold) for band in range(keys.shape[1])])
    labels = cluster(len(texts), edges)
    first = {}
    for place, number in enumerate(truth):
        first.setdefault(number, place)
    assert labels.tolist() == [first[number] for number in truth]


def test_bucket_collisions_are_verified_by_similarity() -> None:
    signatures = np.repeat(np.arange(40, dtype=np.uint32)[:, None], 16, axis=1) % 20
    edges = edges_of_band(np.zeros(40, np.uint64), signatures, 0.8)
    assert sorted(map(tuple, edges.tolist())) == [(i, i + 20) for i in range(20)]


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60))
def test_clusters_are_connected_components_named_by_their_first(count: int, pairs: list[tuple[int, int]]) -> None:
    pairs = [(a % count, b % count) for a, b in pairs]
    expected = list(range(count))
    for _ in range(count):
        for a, b in pairs:
            expected[a] = expected[b] = min(expected[a], expected[b])
    assert cluster(count, np.array(pairs, np.int64).reshape(-1, 2)).tolist() == expected


def test_equal_runs_of_words_have_equal_hashes() -> None:
    text = words("a b c a b c")
    hashed = runs(hashes(text), 3).tolist()
    assert len(hashed) == 4
    assert hashed[0] == hashed[3]
    assert len(set(hashed)) == 3
    assert runs(hashes(text), 7).tolist() == []
