"""What a release must pass: pure, from reports to checks. What is not a number never passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from forge_ray.config.gate import Gate, LeakBounds, NoWorseThan
from forge_ray.config.measurements import GENERAL
from forge_ray.errors import ConfigError
from forge_ray.records import Check, EvalReport
from forge_ray.release.bounds import Rows, shown

OF_ROWS = ("loss", "perplexity", "text_loss", "text_perplexity", "bits_per_byte", "contamination")
LOWER_IS_BETTER = frozenset(
    {name for of_rows in OF_ROWS for name in (of_rows, f"{GENERAL}{of_rows}")}
    | {"kl", "needless_calls", "size_bytes", "latency_ms_per_token", "leak_auc", "leak_auc_gain", "leak_gap"}
    | {"extraction_rate", "extraction_gain", "exposure_mean", "exposure_max"}
)
Incumbents = dict[str, EvalReport | None]


def is_lower_better(report: EvalReport, metric: str) -> bool:
    """Which way a metric is better; of the user's own as the settings of the report say (`lower_is_better`), whatever they
    are called."""
    is_own = metric in report.num_scored
    is_calibration = not is_own and f"_{metric}".endswith(("_ece", "_ece_uncalibrated"))  # of a classifier's target
    return (
        metric in LOWER_IS_BETTER
        or is_calibration
        or any(metric in one["lower_is_better"] for one in report.config.get("metrics", []))
    )


def incumbents_of(gate: Gate) -> tuple[str, ...]:
    """The names that the gate compares with, each once."""
    return tuple(dict.fromkeys(rule.incumbent for rule in gate.comparisons))


def no_rows(report: EvalReport) -> Sequence[dict[str, Any]]:
    """For gates without a rule of a confidence."""
    raise AssertionError(f"the items of {report.id} are needed")


def judge(
    gate: Gate, report: EvalReport, incumbents: Incumbents, leak: EvalReport | None = None, rows: Rows = no_rows
) -> tuple[str, ...]:
    """Reasons why `report` does not pass; empty when it does."""
    return reasons(checks(gate, report, incumbents, leak, rows))


def reasons(judged: tuple[Check, ...]) -> tuple[str, ...]:
    return tuple(check.reason for check in judged if not check.passed)


def checks(
    gate: Gate, report: EvalReport, incumbents: Incumbents, leak: EvalReport | None = None, rows: Rows = no_rows
) -> tuple[Check, ...]:
    """Everything that `gate` looks at, in the order of the run file. `incumbents` maps the names in the gate to their
    reports, None for an alias that points nowhere yet; `leak` is the report of the leak audit; `rows` gives the items of a
    report, for rules with a confidence."""
    return (
        *_thresholds(gate, report, leak),
        *_better_than(gate, report, incumbents, rows),
        *(check for rule in gate.no_worse_than for check in _no_worse_than(rule, report, incumbents, rows)),
        *_budgets(gate, report),
        *_leak(gate.leak, leak),
    )


def _thresholds(gate: Gate, report: EvalReport, leak: EvalReport | None) -> Iterator[Check]:
    for name, threshold in gate.thresholds.items():
        value = _metric(report, name, leak)
        if threshold.min is not None:
            reason = f"{name}={value:.4g} is below the minimum {threshold.min:g}"
            yield _check(name, value, threshold.min, value >= threshold.min, reason)
        if threshold.max is not None:
            reason = f"{name}={value:.4g} is above the maximum {threshold.max:g}"
            yield _check(name, value, threshold.max, value <= threshold.max, reason)


def _better_than(gate: Gate, report: EvalReport, incumbents: Incumbents, rows: Rows) -> Iterator[Check]:
    for rule in gate.better_than:
        other = incumbents[rule.incumbent]
        if other is None:
            yield _unset(rule.metric, rule.incumbent)
            continue
        value, rival = _metric(report, rule.metric), _metric(other, rule.metric)
        lower = is_lower_better(report, rule.metric)
        if rule.confidence is not None:
            yield shown(rule, report, other, rows, lower)
            continue
        gain = rival - value if lower else value - rival
        reason = f"{rule.metric}={value:.4g} is not better than {rule.incumbent} ({rival:.4g}) by {rule.margin:g}"
        bound = rival - rule.margin if lower else rival + rule.margin
        yield _check(f"{rule.metric} better than {rule.incumbent}", value, bound, gain >= rule.margin and gain > 0, reason)


def _no_worse_than(rule: NoWorseThan, report: EvalReport, incumbents: Incumbents, rows: Rows) -> Iterator[Check]:
    other = incumbents[rule.incumbent]
    if other is None:
        yield _unset(rule.metric, rule.incumbent)
        return
    lower = is_lower_better(report, rule.metric)
    if rule.slices == "none":
        name = f"{rule.metric} no worse than {rule.incumbent}"
        value, rival = _metric(report, rule.metric), _metric(other, rule.metric)
        if rule.confidence is None:
            yield _regression(rule, name, rule.metric, value, rival, lower)
        else:
            yield shown(rule, report, other, rows, lower)
        return
    ours, theirs = _slices(report, rule), _slices(other, rule)
    for of in sorted(ours.keys() | theirs.keys()):
        name, place = f"{rule.metric} of {rule.slices}={of} no worse than {rule.incumbent}", f"{rule.slices}={of}"
        if of not in ours or of not in theirs:
            lacking = report.id if of not in ours else rule.incumbent
            yield _check(name, math.nan, None, False, f"{place} has no examples in the report of {lacking}")
            continue
        count = ours[of]["count"]
        if count < rule.min_examples:
            reason = f"{place} has {count:.0f} examples, fewer than min_examples={rule.min_examples}: not judged"
            yield Check(name=name, value=None, bound=None, passed=True, reason=reason)
            continue
        if rule.confidence is not None:
            yield shown(rule, report, other, rows, lower, of)
            continue
        value, rival = (_of_slice(scores[of], rule.metric) for scores in (ours, theirs))
        yield _regression(rule, name, f"{rule.metric} of {place}", value, rival, lower)


def _slices(report: EvalReport, rule: NoWorseThan) -> dict[str, dict[str, float]]:
    if rule.slices not in report.per_slice:
        raise ConfigError(
            f"release.gate.no_worse_than judges slices={rule.slices}, which {report.id} does not have",
            hint=f"add {rule.slices} to eval.slices",
        )
    slices = report.per_slice[rule.slices]
    metrics = {name for scores in slices.values() for name in scores} - {"count"}
    if rule.metric not in metrics and not any(f"{rule.slices}:{of}:{rule.metric}" in report.undefined for of in slices):
        raise ConfigError(
            f"release.gate.no_worse_than names the metric {rule.metric!r}, which slices do not have",
            hint=f"one of {', '.join(sorted(metrics))}",
        )
    return slices


def _of_slice(scores: dict[str, float], metric: str) -> float:
    return scores.get(metric, math.nan)  # what is not finite was left out of the report


def _regression(rule: NoWorseThan, name: str, what: str, value: float, rival: float, lower: bool) -> Check:
    bound = rival + rule.tolerance if lower else rival - rule.tolerance
    loss = value - rival if lower else rival - value
    passed = loss <= rule.tolerance + _ulp(value, rival)
    reason = f"{what}={value:.4g} is worse than {rule.incumbent} ({rival:.4g}) by more than {rule.tolerance:g}"
    return _check(name, value, bound, passed, reason)


def _ulp(value: float, rival: float) -> float:
    """0.8 is no more than 0.1 below 0.9, whatever binary fractions say."""
    return 4 * max(math.ulp(value), math.ulp(rival)) if math.isfinite(value) and math.isfinite(rival) else 0.0


def _budgets(gate: Gate, report: EvalReport) -> Iterator[Check]:
    for name, bound in gate.budgets.model_dump().items():
        if bound is None:
            continue
        if name not in report.costs:
            yield _check(name, math.nan, bound, False, f"{name} was not measured in {report.id}, its budget is {bound:g}")
            continue
        value = report.costs[name]
        measured = f"{value:.0f}" if name == "size_bytes" else f"{value:.4g}"
        limit = f"{bound}" if name == "size_bytes" else f"{bound:g}"
        yield _check(name, value, bound, value <= bound, f"{name}={measured} is over the budget {limit}")


LEAK_METRICS = {
    "max_auc": "leak_auc",
    "max_auc_gain": "leak_auc_gain",
    "max_exposure_mean": "exposure_mean",
    "max_exposure": "exposure_max",
    "max_extraction_gain": "extraction_gain",
}


def _leak(bounds: LeakBounds, leak: EvalReport | None) -> Iterator[Check]:
    for setting, bound in bounds.model_dump().items():
        if bound is None:
            continue
        name = LEAK_METRICS[setting]
        value = leak.metrics.get(name, math.nan) if leak else math.nan
        if leak is None:
            reason = f"{name} was not measured, its bound is {bound:g}: eval.leak is not set"
        elif name.startswith("exposure") and name not in leak.metrics and name not in leak.undefined:
            reason = f"{name} is not known, its bound is {bound:g}: no canary is among the training rows"
        else:
            reason = f"{name}={value:.4g} is above the maximum {bound:g}"
        yield _check(name, value, bound, value <= bound, reason)


def _check(name: str, value: float, bound: float | None, passed: bool, reason: str) -> Check:
    finite = [number if number is not None and math.isfinite(number) else None for number in (value, bound)]
    return Check(name=name, value=finite[0], bound=finite[1], passed=passed, reason="" if passed else reason)


def _unset(metric: str, incumbent: str) -> Check:
    reason = f"{incumbent} points at no other version yet: not judged"
    return Check(name=f"{metric} against {incumbent}", value=None, bound=None, passed=True, reason=reason)


def _metric(report: EvalReport, name: str, leak: EvalReport | None = None) -> float:
    """NaN where the metric came out as no finite number."""
    metrics = {**report.costs, **(leak.metrics if leak else {}), **report.metrics}
    if name in report.undefined or (leak and name in leak.undefined):
        return math.nan
    if name not in metrics:
        raise ConfigError(
            f"release.gate names the metric {name!r}, which {report.id} does not have",
            hint=f"one of {', '.join(sorted(metrics))}",
        )
    return metrics[name]
