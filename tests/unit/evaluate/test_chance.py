"""Intervals: those of the papers, and that they hold as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from forge_ray.evaluate.chance import (
    MIN_ROWS,
    Difference,
    difference,
    interval,
    mapped,
    newcombe,
    ratio,
    rows_to_show,
    share,
    wilson,
)

pytestmark = pytest.mark.unit


def paired(both: int, ours: int, theirs: int, none: int) -> tuple[list[bool], list[bool]]:
    one = [True] * (both + ours) + [False] * (theirs + none)
    two = [True] * both + [False] * ours + [True] * theirs + [False] * none
    return one, two


@pytest.mark.parametrize(
    ("successes", "count", "bounds"),
    # Newcombe 1998, Statistics in Medicine 17, 857, table I, method 3
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_is_that_of_the_paper(successes: int, count: int, bounds: tuple[float, float]) -> None:
    assert wilson(successes, count) == pytest.approx(bounds, abs=5e-5)


def test_one_row_has_a_wide_interval_of_a_share_and_none_of_a_mean() -> None:
    assert interval(share([True])) == pytest.approx((0.2065, 1.0), abs=5e-5)
    assert interval(ratio([1.0], [2.0])) is None
    assert difference(ratio([1.0], [1.0]), ratio([2.0], [1.0])) is None
    assert interval(ratio([1.0] * MIN_ROWS, [2.0] * MIN_ROWS)) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("table", "bounds"),
    # Bentur 2009 and Cavo 2012 as in M. W. Fagerland et al., Statistical Analysis of Contingency Tables (2017), chapter 8;
    # the third as in D. G. Altman et al., Statistics with Confidence (2000), table 6.2
    [
        ((1, 1, 7, 12), (-0.5069, -0.0256)),
        ((59, 6, 16, 80), (-0.1186, -0.0046)),
        ((14, 5, 0, 22), (0.0115, 0.2265)),
    ],
)
def test_a_paired_difference_of_shares_is_that_of_the_books(
    table: tuple[int, int, int, int], bounds: tuple[float, float]
) -> None:
    ours, theirs = paired(*table)
    assert newcombe(np.array(ours), np.array(theirs), 0.95) == pytest.approx(bounds, abs=5e-5)
    assert newcombe(np.array(theirs), np.array(ours), 0.95) == pytest.approx((-bounds[1], -bounds[0]), abs=5e-5)


@pytest.mark.parametrize("table", [(0, 54, 0, 0), (1, 0, 0, 29), (0, 0, 0, 1), (7, 0, 0, 0)])
def test_a_paired_difference_of_shares_of_nothing_and_all(table: tuple[int, int, int, int]) -> None:
    ours, theirs = paired(*table)
    low, high = newcombe(np.array(ours), np.array(theirs), 0.95)
    assert -1 <= low < high <= 1
    assert low <= (table[1] - table[2]) / sum(table) <= high


def test_intervals_hold_as_often_as_they_say() -> None:
    """1,000 experiments of two models each, right on 70 % and 60 % of 60 rows, not independently."""
    random = np.random.default_rng(7)
    shares = losses = 0
    for _ in range(1000):
        hard = random.random(60)
        ours, theirs = hard < 0.7, np.where(random.random(60) < 0.8, hard < 0.6, random.random(60) < 0.6)
        bounds = newcombe(ours, theirs, 0.95)
        shares += bounds[0] <= 0.1 <= bounds[1]
    for _ in range(200):
        tokens = random.integers(1, 20, 60)
        nats = tokens * random.exponential(2.0, 60)
        bounds_of_loss = interval(ratio(nats.tolist(), tokens.tolist()))
        assert bounds_of_loss is not None
        losses += bounds_of_loss[0] <= 2.0 <= bounds_of_loss[1]
    assert 0.93 <= shares / 1000 <= 0.99
    assert 0.87 <= losses / 200 <= 0.99


def test_differences_of_means_are_paired() -> None:
    """Where both find the same rows hard, the difference is known far better than either loss."""
    random = np.random.default_rng(3)
    hard = random.exponential(2.0, 200)
    ours, theirs = ratio((hard - 0.05).tolist(), [1.0] * 200), ratio(hard.tolist(), [1.0] * 200)
    alone, change = interval(ours), difference(ours, theirs)
    assert alone
    assert change
    assert change.high - change.low < 1e-9 < alone[1] - alone[0]
    assert change.value == pytest.approx(-0.05)
    doubled = difference(mapped(ours, lambda value: 2 * value), mapped(theirs, lambda value: 2 * value))
    assert doubled
    assert doubled.value == pytest.approx(-0.1)
    with pytest.raises(ValueError, match="200 and 1 rows"):
        difference(ours, ratio([1.0], [1.0]))


def test_rows_that_would_show_a_gain() -> None:
    assert rows_to_show(Difference(0.02, -0.02, 0.06, 100), 0.0) == 400
    assert rows_to_show(Difference(0.02, -0.02, 0.06, 100), 0.02) is None
    assert Difference(0.1, -0.1, 0.3, 9).is_chance
    assert not Difference(0.1, 0.05, 0.3, 9).is_chance
