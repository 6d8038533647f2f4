"""How many held-out rows show a gain: sample sizes of comparisons on the same rows (pure).

With the true gain g, the margin m that is to be shown (below 0 for "no worse"), quantiles z of the one-sided confidence and
of the power, and the variance v of the rows' differences at either gain:

    rows = ((z_confidence √v(m) + z_power √v(g)) / (g − m))²

- Shares: a row's difference is −1, 0 or 1. With the discordance ψ, the share of rows on which one of the two alone is right,
  v(x) = ψ − x². For m = 0 this is the formula of R. J. Connor, Biometrics 43 (1987) 207, for McNemar's test; for other
  margins the variance of the null hypothesis is that of its own gain.
- Means: v is the square of the standard deviation of the rows' differences, at either gain (the paired test in the normal
  approximation; e.g. J. M. Lachin, Controlled Clinical Trials 2 (1981) 93).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from forge_ray.evaluate.chance import CONFIDENCE, MIN_ROWS, Statistic, difference

POWER = 0.8
STEPS = 60  # of halving an interval: beyond what a float resolves


@dataclass(frozen=True)
class Spread:
    """How much the difference of two models varies from row to row: the discordance of a share, else the standard
    deviation."""

    value: float
    is_share: bool

    def variance(self, gain: float) -> float:
        """A discordance is at least the gain."""
        return max(self.value, abs(gain)) - gain**2 if self.is_share else self.value**2


def num_rows(spread: Spread, gain: float, margin: float, confidence: float, power: float = POWER) -> int:
    """Rows on which a true `gain` is shown to be above `margin` with probability `power`. Raises `ValueError` where it is
    not above it."""
    if gain <= margin:
        raise ValueError(f"no number of rows shows that {gain} is above {margin}")
    at_margin, at_gain = (math.sqrt(spread.variance(value)) for value in (margin, gain))
    return max(1, math.ceil(((_z(confidence) * at_margin + _z(power) * at_gain) / (gain - margin)) ** 2))


def smallest_gain(spread: Spread, rows: int, margin: float, confidence: float, power: float = POWER) -> float | None:
    """The smallest true gain that so many rows show to be above `margin`; None where no possible one is."""
    if not spread.is_share:
        return margin + (_z(confidence) + _z(power)) * spread.value / math.sqrt(rows)
    low, high = margin, 1.0
    if margin >= 1 or num_rows(spread, high, margin, confidence, power) > rows:
        return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        if middle > margin and num_rows(spread, middle, margin, confidence, power) <= rows:
            high = middle
        else:
            low = middle
    return high


def spread_of(ours: Statistic, theirs: Statistic) -> Spread | None:
    """As measured on the rows of two statistics; None where they do not differ, or are too few to say. Of what is no share,
    from the width of the bootstrap's interval."""
    if ours.right is not None and theirs.right is not None:
        discordance = float(np.mean(ours.right != theirs.right)) if ours.num_rows >= MIN_ROWS else 0.0
        return Spread(discordance, True) if discordance else None
    change = difference(ours, theirs)
    if change is None or change.low == change.high:
        return None
    standard_error = (change.high - change.low) / (2 * _z((1 + CONFIDENCE) / 2))
    return Spread(standard_error * math.sqrt(change.num_rows), False)


def _z(probability: float) -> float:
    return NormalDist().inv_cdf(probability)
