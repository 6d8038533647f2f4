"""What chance may have done to a score: intervals, and paired intervals of differences on the same rows (pure).

- Shares: Wilson's interval (E. B. Wilson, JASA 22, 1927); differences of paired shares: method 10 of R. G. Newcombe,
  Statistics in Medicine 17 (1998) 2635, which holds for few rows and for shares of 0 and 1.
- Everything else: the percentile bootstrap over rows (B. Efron, 1979), `RESAMPLES` draws with a fixed seed, of at least
  `MIN_ROWS` rows, for it is too narrow below. Of a difference, both sides are drawn the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
CONFIDENCE = 0.95
RESAMPLES = 2000
BATCH = 100
MIN_ROWS = 10
SEED = 0


@dataclass(frozen=True)
class Statistic:
    """A score of `num_rows` rows, and as a function of how often each counts: (draws, rows) → (draws,). `right`: the rows
    that count, where the score is their share."""

    value: float
    num_rows: int
    of: Callable[[Floats], Floats]
    right: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Difference:
    """`value` of ours minus theirs on `num_rows` rows, and its interval."""

    value: float
    low: float
    high: float
    num_rows: int

    @property
    def is_chance(self) -> bool:
        return self.low <= 0 <= self.high


def share(right: Sequence[bool]) -> Statistic:
    rows = np.array(right, np.bool_)
    return Statistic(sum(right) / len(right), len(right), lambda counts: counts @ rows / counts.sum(axis=1), rows)


def ratio(above: Sequence[float], below: Sequence[float]) -> Statistic:
    """Sum over sum; 0 where the lower one is 0."""
    upper, lower = np.array(above, np.float64), np.array(below, np.float64)

    def of(counts: Floats) -> Floats:
        total = counts @ lower
        return np.divide(counts @ upper, total, out=np.zeros_like(total), where=total > 0)

    return Statistic(sum(above) / sum(below) if sum(below) else 0.0, len(above), of)


def mapped(statistic: Statistic, function: Callable[[float], float]) -> Statistic:
    """A function of a statistic."""
    return Statistic(
        function(statistic.value),
        statistic.num_rows,
        lambda counts: np.array([function(value) for value in statistic.of(counts).tolist()]),
    )


def interval(statistic: Statistic, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Two-sided; None where there are too few rows to say."""
    if statistic.right is not None:
        return wilson(int(statistic.right.sum()), statistic.num_rows, confidence)
    if statistic.num_rows < MIN_ROWS:
        return None
    return _percentiles(np.concatenate([statistic.of(counts) for counts in _draws(statistic.num_rows)]), confidence)


def difference(ours: Statistic, theirs: Statistic, confidence: float = CONFIDENCE) -> Difference | None:
    """Of two statistics over the same rows in the same order, two-sided; None where there are too few rows to say."""
    if ours.num_rows != theirs.num_rows:
        raise ValueError(f"{ours.num_rows} and {theirs.num_rows} rows are not the same rows")
    value = ours.value - theirs.value
    if ours.right is not None and theirs.right is not None:
        return Difference(value, *newcombe(ours.right, theirs.right, confidence), ours.num_rows)
    if ours.num_rows < MIN_ROWS:
        return None
    draws = np.concatenate([ours.of(counts) - theirs.of(counts) for counts in _draws(ours.num_rows)])
    bounds = _percentiles(draws, confidence)
    return Difference(value, *bounds, ours.num_rows) if bounds else None


def wilson(successes: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    z = _quantile(confidence)
    share_of, square = successes / count, z * z / count
    middle = (share_of + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share_of * (1 - share_of) / count + square / (4 * count))
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == count else middle + half)


def newcombe(ours: npt.NDArray[np.bool_], theirs: npt.NDArray[np.bool_], confidence: float) -> tuple[float, float]:
    """Of the difference of two shares of the same rows."""
    count = len(ours)
    both, only_ours = int((ours & theirs).sum()), int((ours & ~theirs).sum())
    only_theirs, none = int((~ours & theirs).sum()), int((~ours & ~theirs).sum())
    one, two = (both + only_ours) / count, (both + only_theirs) / count
    low_one, high_one = wilson(both + only_ours, count, confidence)
    low_two, high_two = wilson(both + only_theirs, count, confidence)
    margins = math.sqrt((both + only_ours) * (only_theirs + none) * (both + only_theirs) * (only_ours + none))
    product = both * none - only_ours * only_theirs  # corrected for continuity where it is positive
    phi = (max(product - count / 2, 0.0) if product > 0 else product) / margins if margins else 0.0
    below = (one - low_one) ** 2 - 2 * phi * (one - low_one) * (high_two - two) + (high_two - two) ** 2
    above = (high_one - one) ** 2 - 2 * phi * (high_one - one) * (two - low_two) + (two - low_two) ** 2
    return one - two - math.sqrt(max(0.0, below)), one - two + math.sqrt(max(0.0, above))


def rows_to_show(change: Difference, margin: float) -> int | None:
    """About how many rows would show a difference as large as this one to be above `margin`; None where it is not."""
    if change.value <= margin or change.value <= change.low:
        return None
    return math.ceil(change.num_rows * ((change.value - change.low) / (change.value - margin)) ** 2)


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _draws(num_rows: int) -> Iterator[Floats]:
    """How often each row is drawn, `BATCH` draws at a time."""
    random = np.random.default_rng(SEED)
    for _ in range(RESAMPLES // BATCH):
        yield random.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=BATCH).astype(np.float64)


def _percentiles(draws: Floats, confidence: float) -> tuple[float, float] | None:
    if not np.isfinite(draws).all():
        return None
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
