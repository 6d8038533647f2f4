"""Rules of a gate that judge what is shown and not what was measured: the lower bound of the gain over another model on the
same rows, at a stated confidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from forge_ray.config.gate import BetterThan, NoWorseThan
from forge_ray.errors import ConfigError
from forge_ray.evaluate.chance import MIN_ROWS, Difference, rows_to_show
from forge_ray.evaluate.items import labels_of
from forge_ray.evaluate.measures import differences
from forge_ray.evaluate.summary import slice_of
from forge_ray.records import Check, EvalReport

Rows = Callable[[EvalReport], Sequence[dict[str, Any]]]  # the items of a report


def shown(
    rule: BetterThan | NoWorseThan, report: EvalReport, other: EvalReport, rows: Rows, lower_is_better: bool, of: str = ""
) -> Check:
    """Whether the gain is at least `margin`, or the loss at most `tolerance`, at the rule's confidence. `of`: the slice."""
    assert rule.confidence is not None
    labels = labels_of(report)
    ours, theirs = rows(report), rows(other)
    if of and isinstance(rule, NoWorseThan):
        ours = [item for item in ours if slice_of(item, rule.slices, labels) == of]
    by_metric = differences(ours, theirs, labels, 2 * rule.confidence - 1)  # one-sided: only the lower bound is judged
    if by_metric and rule.metric not in by_metric:
        raise ConfigError(
            f"release.gate judges {rule.metric} with a confidence, and no rows say by how much chance moves it",
            hint=f"leave `confidence` out, or judge one of {', '.join(sorted(by_metric))}",
        )
    is_gain = isinstance(rule, BetterThan)
    margin, words = (rule.margin, "better than") if isinstance(rule, BetterThan) else (-rule.tolerance, "no worse than")
    place = f"{rule.metric} of {rule.slices}={of}" if of and isinstance(rule, NoWorseThan) else rule.metric
    name = f"{place} {words} {rule.incumbent} at {rule.confidence:.0%}"
    gain = by_metric.get(rule.metric)
    if gain is None:
        reason = f"{place}: too few rows to bound the difference from {rule.incumbent}; at least {MIN_ROWS} are needed"
        return Check(name=name, value=None, bound=margin, passed=False, reason=reason)
    if lower_is_better:
        gain = Difference(-gain.value, -gain.high, -gain.low, gain.num_rows)
    passed = gain.low >= margin and (gain.low > 0 or not is_gain)
    reason = "" if passed else _why(place, rule, gain, margin)
    return Check(name=name, value=gain.low, bound=margin, passed=passed, reason=reason)


def _why(place: str, rule: BetterThan | NoWorseThan, gain: Difference, margin: float) -> str:
    goal = (
        f"better than {rule.incumbent} by {margin:g}"
        if isinstance(rule, BetterThan)
        else f"at most {-margin:g} worse than {rule.incumbent}"
    )
    reason = (
        f"{place} is not shown to be {goal} at {rule.confidence:.0%}: it gains {gain.value:+.4g} on {gain.num_rows} rows,"
        f" and at least {gain.low:+.4g}"
    )
    needed = rows_to_show(gain, margin)
    return f"{reason}; about {needed} rows would show it" if needed else reason
