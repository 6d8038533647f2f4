"""Sample sizes against published values, and against how often the gate's own interval shows a gain."""

from __future__ import annotations

import numpy as np
import pytest

from forge_ray.evaluate.chance import newcombe, ratio, share
from forge_ray.evaluate.sample_size import Spread, num_rows, smallest_gain, spread_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("one", "other", "quantile", "power", "rows"),
    [
        # p10, p01: Connor (1987) p. 209 as on powerandsamplesize.com, one-sided at 5 % and two-sided at 5 %
        (0.45, 0.05, 0.95, 0.9, 23),
        (0.45, 0.05, 0.975, 0.8, 23),
        # clinicaltrials-tools.vercel.app/calculators/mcnemar-test, two-sided at 5 %
        (0.30, 0.15, 0.975, 0.8, 155),
    ],
)
def test_paired_shares_equal_published_values(one: float, other: float, quantile: float, power: float, rows: int) -> None:
    assert num_rows(Spread(one + other, True), one - other, 0.0, quantile, power) == rows


@pytest.mark.parametrize(
    ("quantile", "power", "multiplier"),
    [(0.975, 0.8, 7.85), (0.975, 0.9, 10.51), (0.95, 0.8, 6.18), (0.95, 0.9, 8.56)],  # (z_α + z_β)² of textbooks
)
def test_means_equal_the_multipliers_of_textbooks(quantile: float, power: float, multiplier: float) -> None:
    assert num_rows(Spread(10.0, False), 0.1, 0.0, quantile, power) / 100**2 == pytest.approx(multiplier, abs=0.005)
    assert num_rows(Spread(10.0, False), 0.3, 0.2, quantile, power) == pytest.approx(multiplier * 100**2, rel=1e-3)


@pytest.mark.parametrize(
    ("discordance", "gain", "margin"),
    [(0.5, 0.05, 0.0), (0.2, 0.1, 0.05), (0.3, 0.0, -0.05), (0.1, 0.05, 0.0), (0.5, 0.3, 0.1)],
)
def test_so_many_rows_show_the_gain_in_eight_of_ten_cases(discordance: float, gain: float, margin: float) -> None:
    """By Newcombe's interval, as the gate judges."""
    rows, random = num_rows(Spread(discordance, True), gain, margin, 0.95), np.random.default_rng(0)
    shares = [(discordance + gain) / 2, (discordance - gain) / 2, 0.6 * (1 - discordance), 0.4 * (1 - discordance)]
    passed = 0
    for _ in range(400):
        cell = random.choice(4, size=rows, p=shares)  # ours alone is right, theirs alone, both, neither
        passed += newcombe((cell == 0) | (cell == 2), (cell == 1) | (cell == 2), 0.9)[0] >= margin
    assert 0.74 <= passed / 400 <= 0.87


@pytest.mark.parametrize("spread", [Spread(0.5, True), Spread(0.1, True), Spread(3.0, False)])
@pytest.mark.parametrize("margin", [0.0, 0.02, -0.05])
def test_smallest_gain_is_the_inverse(spread: Spread, margin: float) -> None:
    gain = smallest_gain(spread, 700, margin, 0.95)
    assert gain is not None
    assert num_rows(spread, gain + 1e-9, margin, 0.95) in (699, 700)


def test_what_no_rows_can_show() -> None:
    assert smallest_gain(Spread(0.5, True), 3, 0.9, 0.95) is None
    assert smallest_gain(Spread(0.5, True), 10**6, 1.0, 0.95) is None
    with pytest.raises(ValueError, match=r"no number of rows shows that 0.1 is above 0.1"):
        num_rows(Spread(0.5, True), 0.1, 0.1, 0.95)


def test_spread_is_measured_on_the_rows_of_both() -> None:
    ours, theirs = [True] * 30 + [False] * 10, [True] * 25 + [False] * 15
    assert spread_of(share(ours), share(theirs)) == Spread(5 / 40, True)
    assert spread_of(share(ours), share(ours)) is None
    assert spread_of(share(ours[:5]), share(theirs[-5:])) is None
    random = np.random.default_rng(0)
    before = random.normal(0, 1, 400)
    after = before + random.normal(0.5, 2, 400)
    ones = [1.0] * 400
    measured = spread_of(ratio(after.tolist(), ones), ratio(before.tolist(), ones))
    assert measured is not None
    assert measured.value == pytest.approx(float(np.std(after - before)), rel=0.1)
    assert not measured.is_share
    assert spread_of(ratio(ones, ones), ratio(ones, ones)) is None
