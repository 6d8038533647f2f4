"""The gate: every rule passes, fails with its slice, values and bound, and lets nothing through that is not a number."""

from __future__ import annotations

import math
from typing import Any

import pytest

from forge_ray.config.base import apply_overrides, parse
from forge_ray.config.gate import Gate
from forge_ray.config.run import RunConfig
from forge_ray.errors import ConfigError
from forge_ray.evaluate.summary import only_finite, slice_scores
from forge_ray.records import Check, EvalReport, ModelVersion
from forge_ray.release.gate import checks, incumbents_of, judge

pytestmark = pytest.mark.unit
NAN = math.nan


def report(metrics: dict[str, float], **more: Any) -> EvalReport:
    fixed = {"subject": "run_1", "subject_digest": "sha256:0", "dataset": "ds_1", "split": "test", "config": {}}
    return EvalReport(**fixed, num_examples=1, metrics=metrics, per_class={}, items_sha256="0", **more)


def sliced(**exact: tuple[float, int]) -> EvalReport:
    per_slice = {"label": {of: {"exact_match": value, "count": float(count)} for of, (value, count) in exact.items()}}
    return report({"exact_match": 0.9}, per_slice=per_slice)


def rule(**values: Any) -> Gate:
    return parse(Gate, {"no_worse_than": [{"incumbent": "prod", **values}]})


TOLERANT = {"slices": "label", "tolerance": 0.1}


@pytest.mark.parametrize(
    ("gate", "ours", "theirs", "reasons"),
    [
        (rule(), report({"exact_match": 0.5}), report({"exact_match": 0.5}), ()),
        (
            rule(),
            report({"exact_match": 0.49}),
            report({"exact_match": 0.5}),
            ("exact_match=0.49 is worse than prod (0.5) by more than 0",),
        ),
        (rule(metric="loss", tolerance=0.1), report({"loss": 1.1}), report({"loss": 1.0}), ()),
        (
            rule(metric="loss", tolerance=0.1),
            report({"loss": 1.2}),
            report({"loss": 1.0}),
            ("loss=1.2 is worse than prod (1) by more than 0.1",),
        ),
        (rule(**TOLERANT), sliced(a=(0.8, 5), b=(1.0, 5)), sliced(a=(0.9, 5), b=(0.9, 5)), ()),  # 0.9 - 0.8 > 0.1 in binary
        (
            rule(**TOLERANT),
            sliced(a=(0.7, 5), b=(1.0, 5)),
            sliced(a=(0.9, 5), b=(0.9, 5)),
            ("exact_match of label=a=0.7 is worse than prod (0.9) by more than 0.1",),
        ),
        (rule(**TOLERANT, min_examples=6), sliced(a=(0.1, 5)), sliced(a=(0.9, 5)), ()),
        (
            rule(**TOLERANT, min_examples=5),
            sliced(a=(0.1, 5)),
            sliced(a=(0.9, 5)),
            ("exact_match of label=a=0.1 is worse than prod (0.9) by more than 0.1",),
        ),
        (
            rule(**TOLERANT),
            sliced(a=(0.9, 5)),
            sliced(a=(0.9, 5), b=(0.1, 1)),
            ("label=b has no examples in the report of ",),
        ),
        (rule(**TOLERANT), sliced(a=(0.1, 5)), None, ()),  # the alias points nowhere yet
    ],
)
def test_no_regression(gate: Gate, ours: EvalReport, theirs: EvalReport | None, reasons: tuple[str, ...]) -> None:
    assert judge(gate, ours, {"prod": theirs}) == reasons


@pytest.mark.parametrize(
    "gate",
    [
        {"thresholds": {"loss": {"max": 9.0}}},
        {"thresholds": {"loss": {"min": 0.0}}},
        {"better_than": [{"incumbent": "base", "metric": "loss"}]},
        {"no_worse_than": [{"metric": "loss", "tolerance": 100.0}]},
        {"no_worse_than": [{"metric": "loss", "tolerance": 100.0, "slices": "label"}]},
        {"budgets": {"latency_ms_per_token": 1e9}},
        {"leak": {"max_auc": 1.0}},
        {"leak": {"max_exposure": 99.0}},
    ],
)
@pytest.mark.parametrize("as_stored", [False, True])
def test_nan_never_passes(gate: dict[str, Any], as_stored: bool) -> None:
    """As computed, and as a report has it, which names it and leaves it out. A rival that diverged proves nothing either."""
    slices = {"label": {"a": {"loss": NAN, "count": 3.0}, "b": {"loss": 1.0, "count": 3.0}}}
    metrics, leak = {"loss": NAN, "exact_match": 0.1}, {"leak_auc": NAN, "exposure_max": NAN}
    costs = {"latency_ms_per_token": NAN}
    bad, bad_leak = report(metrics, per_slice=slices, costs=costs), report(leak)
    if as_stored:
        kept, per_slice, undefined = only_finite(metrics, slices)
        bad = report(kept, per_slice=per_slice, undefined=undefined).sealed()
        bad_leak = report({}, undefined=("leak_auc", "exposure_max")).sealed()
    fine = report({"loss": 1.0}, per_slice={"label": {of: {"loss": 1.0, "count": 3.0} for of in "ab"}})
    assert judge(parse(Gate, gate), bad, {"base": fine}, bad_leak)
    if "better_than" in gate or "no_worse_than" in gate:
        assert judge(parse(Gate, gate), fine, {"base": bad})


def test_budget_and_leak_reasons_name_value_and_bound() -> None:
    gate = parse(
        Gate,
        {
            "budgets": {"size_bytes": 100, "latency_ms_per_token": 5},
            "leak": {"max_auc": 0.6, "max_auc_gain": 0.1, "max_exposure_mean": 3, "max_extraction_gain": 0},
            "thresholds": {"leak_gap": {"max": 0.5}, "size_bytes": {"max": 100}},
        },
    )
    costs = {"size_bytes": 100.0, "latency_ms_per_token": 5.0}
    leak = {"leak_auc": 0.6, "leak_auc_gain": 0.1, "exposure_mean": 3.0, "extraction_gain": 0.0, "leak_gap": 0.5}
    assert judge(gate, report({}, costs=costs), {}, report(leak)) == ()  # a bound itself passes
    over = report({}, costs={"size_bytes": 101.0, "latency_ms_per_token": 6.25})
    worse = report({"leak_auc": 0.9, "leak_auc_gain": 0.4, "extraction_gain": 0.25, "leak_gap": 2.0})
    assert judge(gate, over, {}, worse) == (
        "leak_gap=2 is above the maximum 0.5",
        "size_bytes=101 is above the maximum 100",
        "size_bytes=101 is over the budget 100",
        "latency_ms_per_token=6.25 is over the budget 5",
        "leak_auc=0.9 is above the maximum 0.6",
        "leak_auc_gain=0.4 is above the maximum 0.1",
        "exposure_mean is not known, its bound is 3: no canary is among the training rows",
        "extraction_gain=0.25 is above the maximum 0",
    )
    unmeasured = judge(parse(Gate, {"budgets": {"size_bytes": 1}, "leak": {"max_auc": 1}}), report({}), {})
    assert unmeasured == (
        "size_bytes was not measured in , its budget is 1",
        "leak_auc was not measured, its bound is 1: eval.leak is not set",
    )


def test_every_check_is_kept_with_value_and_bound() -> None:
    gate = parse(
        Gate,
        {
            "thresholds": {"exact_match": {"min": 0.5, "max": 0.8}},
            "no_worse_than": [{"incumbent": "prod", "slices": "label", "min_examples": 2}],
        },
    )
    assert incumbents_of(gate) == ("prod",)
    assert checks(gate, sliced(a=(0.5, 4), b=(0.0, 1)), {"prod": sliced(a=(0.25, 4), b=(0.5, 1))}) == (
        Check(name="exact_match", value=0.9, bound=0.5, passed=True),
        Check(name="exact_match", value=0.9, bound=0.8, passed=False, reason="exact_match=0.9 is above the maximum 0.8"),
        Check(name="exact_match of label=a no worse than prod", value=0.5, bound=0.25, passed=True),
        Check(
            name="exact_match of label=b no worse than prod",
            value=None,
            bound=None,
            passed=True,
            reason="label=b has 1 examples, fewer than min_examples=2: not judged",
        ),
    )


def version(**more: Any) -> ModelVersion:
    fixed: Any = {"name": "v", "status": "accepted", "weights": "full", "files": (), "files_digest": "sha256:0"}
    return ModelVersion(**fixed, licence="", **more).sealed()


def test_older_records_keep_their_ids_and_times_are_not_part_of_them() -> None:
    assert "checks" not in version().identity()
    assert not {"per_slice", "undefined", "costs"} & set(report({}).identity())
    assert report({}, costs={"size_bytes": 1.0}).sealed().id == report({}).sealed().id
    first, second = (
        version(checks=(Check(name="latency_ms_per_token", value=value, bound=9.0, passed=True),)) for value in (1.0, 2.0)
    )
    assert first.id == second.id != version().id
    assert first.id != version(checks=(Check(name="latency_ms_per_token", value=1.0, bound=8.0, passed=True),)).id


def test_slices_are_scored_separately() -> None:
    def item(reference: str, prediction: str, source: str) -> dict[str, Any]:
        answer = {"reference": reference, "prediction": prediction, "source": source}
        return {**answer, "likeliest": prediction[0].lower(), "logprob": -1.0, "num_tokens": 2}

    items = [item("a", "A.", "x"), item("a", "b", "y"), item("b", "b", "y"), item("neither", "b", "y")]
    scores = slice_scores(items, ("a", "b"), ("label", "source"))
    assert {of: (s["exact_match"], s["count"]) for of, s in scores["label"].items()} == {
        "(other)": (0.0, 1.0),
        "a": (0.5, 2.0),
        "b": (1.0, 1.0),
    }
    assert scores["source"]["y"]["exact_match"] == pytest.approx(1 / 3)
    assert scores["source"]["x"] == {
        "exact_match": 1.0,
        "loss": 0.5,
        "perplexity": math.exp(0.5),
        "label_likelihood": 1.0,
        "count": 1.0,
    }


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        (("release.gate.leak.max_auc=0.6",), "release.gate.leak has bounds for the leak audit", "set eval.leak={}"),
        (
            ("release.gate.no_worse_than=[{slices: source}]",),
            "compares slices=source, but eval.slices=[] does not list it",
            "add source to eval.slices",
        ),
        (("eval.slices=[label]",), "eval.labels is not set", "set labels=from_data"),
    ],
)
def test_a_gate_without_its_measurement_is_refused(overrides: tuple[str, ...], message: str, hint: str) -> None:
    minimal = {"name": "a", "base_model": "b", "data": {"sources": [{"path": "c"}]}, "release": {"alias": "d"}}
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")) as caught:
        parse(RunConfig, apply_overrides(minimal, overrides))
    assert hint in caught.value.hint


def test_a_report_without_the_slices_or_the_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match="slices=label, which") as caught:
        judge(rule(slices="label"), report({"exact_match": 1.0}), {"prod": sliced(a=(1.0, 1))})
    assert "eval.slices" in caught.value.hint
    with pytest.raises(ConfigError, match="metric 'accuracy', which slices") as caught:
        judge(rule(slices="label", metric="accuracy"), sliced(a=(1.0, 1)), {"prod": sliced(a=(1.0, 1))})
    assert caught.value.hint == "one of exact_match"


def test_newer_settings_do_not_change_the_digest_of_a_report() -> None:
    """A report of before is found again; each new setting makes another one."""
    from forge_ray.config.release import EvalConfig

    before = {"split", "max_examples", "max_new_tokens", "labels", "engine", "cpus", "gpus"}
    assert set(EvalConfig().scoring()) == before
    assert set(parse(EvalConfig, {"leak": {}}).scoring()) == before
    asked = parse(EvalConfig, {"slices": ["source"], "safety": ["a.jsonl"], "contamination": {}}).scoring()
    assert set(asked) - before == {"slices", "safety", "safety_max_new_tokens", "contamination"}
