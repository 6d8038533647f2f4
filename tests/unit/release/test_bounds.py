"""Rules with a confidence: what is judged is the bound of the gain on the same rows."""

from __future__ import annotations

from typing import Any

import pytest

from forge_ray.config.base import parse
from forge_ray.config.gate import Gate
from forge_ray.errors import ConfigError
from forge_ray.evaluate.summary import summarise
from forge_ray.records import Check, EvalReport
from forge_ray.release.gate import checks

pytestmark = pytest.mark.unit

Items = list[dict[str, Any]]


def items(right: int, count: int, nats: float = 1.0, source: str = "a") -> Items:
    return [
        {"record": f"{source}{n}", "source": source, "reference": "x", "prediction": "x" if n < right else "y"}
        | {"likeliest": "", "logprob": -nats * (1 + n % 3), "num_tokens": 2}
        for n in range(count)
    ]


def report(name: str, rows: Items, **more: Any) -> EvalReport:
    fixed = {"subject": name, "subject_digest": "sha256:0", "dataset": "ds_1", "split": "test"} | {"config": {}} | more
    return EvalReport(**fixed, num_examples=len(rows), metrics=summarise(rows, ())[0], per_class={}, items_sha256="0")


def judged(rule: dict[str, Any], ours: Items, theirs: Items, better: bool = True, **more: Any) -> Check:
    rows = {"ours": ours, "theirs": theirs}
    reports = {name: report(name, rows[name], **more) for name in rows}
    gate = parse(Gate, {"better_than" if better else "no_worse_than": [{"incumbent": "base", **rule}]})
    (check,) = checks(gate, reports["ours"], {"base": reports["theirs"]}, rows=lambda one: rows[one.subject])
    return check


def test_a_gain_within_chance_is_no_gain() -> None:
    theirs = items(60, 100)  # ours: five of these wrong, seven others right
    ours = [*theirs[:55], *[{**item, "prediction": "y"} for item in theirs[55:60]], *items(67, 100)[60:]]
    assert judged({}, ours, theirs).passed
    check = judged({"confidence": 0.95}, ours, theirs)
    assert check.name == "exact_match better than base at 95%"
    assert not check.passed
    assert "it gains +0.02 on 100 rows, and at least -0.0" in check.reason
    assert "rows would show it" in check.reason


def test_a_gain_that_is_shown_passes_and_margins_count() -> None:
    ours, theirs = items(90, 100), items(60, 100)
    check = judged({"confidence": 0.95}, ours, theirs)
    assert check.passed
    assert check.value is not None
    assert 0.2 < check.value < 0.3
    assert judged({"confidence": 0.95, "margin": 0.2}, ours, theirs).passed
    assert not judged({"confidence": 0.95, "margin": 0.28}, ours, theirs).passed


def test_a_loss_is_better_where_it_is_lower() -> None:
    assert judged({"metric": "loss", "confidence": 0.95}, items(1, 50, 0.9), items(1, 50)).passed
    assert not judged({"metric": "loss", "confidence": 0.95}, items(1, 50, 1.1), items(1, 50)).passed


@pytest.mark.parametrize("confidence", [None, 0.95])
@pytest.mark.parametrize("better", [True, False])
def test_own_metrics_are_better_as_the_run_file_says(better: bool, confidence: float | None) -> None:
    polite, rude = ([{**item, "scores": {"rudeness": float(n)}} for item in items(1, 50)] for n in (1, 2))
    rule = {"metric": "rudeness", "confidence": confidence}
    settings = {"function": "tone", "sha256": "sha256:0"}
    lower = {"config": {"metrics": [{**settings, "lower_is_better": ["rudeness"]}]}}
    higher = {"config": {"metrics": [{**settings, "lower_is_better": []}]}}
    assert judged(rule, polite, rude, better, **lower).passed
    assert not judged(rule, rude, polite, better, **lower).passed
    assert judged(rule, rude, polite, better, **higher).passed
    assert not judged(rule, polite, rude, better, **higher).passed


def test_no_worse_is_judged_by_the_bound_too_and_by_slice() -> None:
    ours, theirs = items(28, 30), items(29, 30)
    rule = {"tolerance": 0.05, "confidence": 0.95}
    assert judged({"tolerance": 0.05}, ours, theirs, better=False).passed
    check = judged(rule, ours, theirs, better=False)
    assert not check.passed
    assert "is not shown to be at most 0.05 worse than base at 95%: it gains -0.03333 on 30 rows" in check.reason
    both = [*items(300, 300), *items(5, 30, source="b")]
    worse = [*items(300, 300), *items(3, 30, source="b")]
    slices = {"source": {"a": {"exact_match": 1.0, "count": 300.0}, "b": {"exact_match": 0.1, "count": 30.0}}}
    gate = parse(Gate, {"no_worse_than": [{"incumbent": "base", "slices": "source", **rule}]})
    rows = {"ours": worse, "theirs": both}
    reports = {name: report(name, rows[name], per_slice=slices) for name in rows}
    a, b = checks(gate, reports["ours"], {"base": reports["theirs"]}, rows=lambda one: rows[one.subject])
    assert (a.name, a.passed) == ("exact_match of source=a no worse than base at 95%", True)
    assert (b.name, b.passed) == ("exact_match of source=b no worse than base at 95%", False)
    assert "on 30 rows" in b.reason


def test_too_few_rows_or_none_in_common_pass_nothing() -> None:
    check = judged({"metric": "loss", "confidence": 0.95}, items(1, 5, 0.1), items(1, 5))
    assert (check.passed, check.value) == (False, None)
    assert "too few rows to bound the difference from base; at least 10" in check.reason
    assert not judged({"confidence": 0.95}, items(9, 9), items(0, 9, source="other")).passed


def test_what_no_rows_decide_has_no_confidence() -> None:
    rows = items(9, 20)
    gate = parse(Gate, {"better_than": [{"incumbent": "base", "metric": "size_bytes", "confidence": 0.95}]})
    one = report("ours", rows, costs={"size_bytes": 1.0})
    with pytest.raises(ConfigError, match="judges size_bytes with a confidence, and no rows say") as caught:
        checks(gate, one, {"base": one}, rows=lambda _: rows)
    assert "exact_match" in caught.value.hint
