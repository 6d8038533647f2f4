"""Scores of classifiers, compared with scikit-learn's definitions by hand, and temperatures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forge_ray.config.classify import Target
from forge_ray.config.thresholds import Goal
from forge_ray.data.dataset.labels import ABSENT
from forge_ray.evaluate.chance import difference
from forge_ray.evaluate.class_measures import by_class, class_statistics, reliability
from forge_ray.evaluate.class_thresholds import chosen, measured
from forge_ray.evaluate.classified import temperature_of
from forge_ray.evaluate.items import labels_of
from forge_ray.evaluate.measures import intervals, paired, statistics
from forge_ray.evaluate.summary import summarise
from forge_ray.inference.classifier import probabilities
from forge_ray.records import EvalReport
from forge_ray.release.gate import is_lower_better

pytestmark = pytest.mark.unit


def item(number: int, reference: str, shares: dict[str, float], raw: float) -> dict[str, Any]:
    prediction = max(shares, key=lambda name: shares[name])
    answer = {"confidence": [shares[prediction]], "raw_confidence": [raw], "right": [prediction == reference]}
    return {
        "record": f"rec_{number}",
        "source": "rows",
        "reference": reference,
        "prediction": prediction,
        "likeliest": prediction,
        "true": [reference],
        "predicted": [prediction],
        "probabilities": shares,
        "targets": {"label": {"reference": reference, "prediction": prediction, **answer}},
    }


def items() -> list[dict[str, Any]]:
    """Of 12: eight of a, of which two are taken for b, and four of b, of which one is taken for a."""
    shares = [0.9, 0.8, 0.85, 0.95, 0.7, 0.75, 0.4, 0.3, 0.1, 0.2, 0.15, 0.6]
    return [item(n, "a" if n < 8 else "b", {"a": p, "b": 1 - p}, 0.99) for n, p in enumerate(shares)]


def test_scores_of_each_class_and_their_mean() -> None:
    scores = by_class(items())
    assert scores["a"] == pytest.approx({"precision": 6 / 7, "recall": 6 / 8, "f1": 12 / 15, "support": 8})
    assert scores["b"] == pytest.approx({"precision": 3 / 5, "recall": 3 / 4, "f1": 6 / 9, "support": 4})
    by_metric = statistics(items(), ("a", "b"))
    assert by_metric["exact_match"].value == by_metric["label_likelihood"].value == 9 / 12
    assert by_metric["macro_f1"].value == pytest.approx((12 / 15 + 6 / 9) / 2)
    metrics, per_class = summarise(items(), ())
    assert per_class == scores
    assert "json_valid" not in metrics


def test_average_precision_is_the_area_under_precision_by_recall() -> None:
    """Of a: the positives stand at ranks 1 to 6, 8 and 9 of twelve; of b at 1, 2, 3 and 6."""
    of_a = (6 * 1.0 + 7 / 8 + 8 / 9) / 8
    of_b = (3 * 1.0 + 4 / 6) / 4
    assert class_statistics(items())["average_precision"].value == pytest.approx((of_a + of_b) / 2)


def test_rows_without_a_label_of_a_target_count_in_none_of_its_scores() -> None:
    """The names are those of all targets, whichever labels the rows at hand have, and a missing label is no negative."""
    rows = []
    for number, one in enumerate(items()):
        answer = one["targets"]["label"]
        shares = {f"size/{name}": share for name, share in one["probabilities"].items()} | {"has/x": 1 - number / 20}
        lacks = number % 2 == 0
        has = None if lacks else {"reference": "x", "prediction": "x", "confidence": [0.9], "raw_confidence": [0.9]}
        has = has and has | {"right": [True]}
        true = [f"size/{one['reference']}"] + ([] if lacks else ["has/x"])
        rows.append(one | {"probabilities": shares, "true": true, "targets": {"size": answer, "has": has}})
    by_metric = class_statistics(rows)
    assert {"size_ece", "has_ece", "size_accuracy", "has_accuracy"} <= by_metric.keys()
    assert by_metric["has_accuracy"].num_rows == 6
    of_size = class_statistics(items())["average_precision"].value
    assert by_metric["average_precision"].value == pytest.approx((2 * of_size + 1.0) / 3)  # all that are asked have x
    without = class_statistics([row for row in rows if row["targets"]["has"] is None])
    assert {"size_ece", "size_accuracy"} <= without.keys()
    assert "ece" not in without
    assert "has_ece" not in without


def test_labels_of_a_report_are_compared_as_answers_are() -> None:
    per_class = {"Mail": {}, "Sound FX": {}, "(other)": {}}
    report = EvalReport.model_construct(config={"labels": ["mail", "sound fx"]}, per_class=per_class)
    assert labels_of(report) == ("mail", "sound fx")
    assert labels_of(report.model_copy(update={"config": {}})) == ()
    written = [
        {"record": f"r{n}", "source": "s", "reference": "Mail", "prediction": p} for n, p in enumerate(("mail", "Mail."))
    ]
    assert statistics(written, labels_of(report))["macro_f1"].value == 1.0


def test_calibration_error_is_the_gap_of_confidence_and_accuracy() -> None:
    by_metric = class_statistics(items())
    assert by_metric["ece_uncalibrated"].value == pytest.approx(0.99 - 9 / 12)  # one bin
    points = reliability(items(), "label")
    assert sum(number for _, _, number in points) == 12
    gap = sum(abs(confidence - right) * number for confidence, right, number in points) / 12
    assert by_metric["ece"].value == pytest.approx(gap)
    assert {"ece", "macro_f1", "average_precision"} <= intervals(items(), ()).keys()


def test_a_classifier_is_compared_with_a_model_that_writes_labels() -> None:
    written = [
        {"record": one["record"], "reference": one["reference"], "prediction": "a", "likeliest": "a"} for one in items()
    ]
    pairs = paired(items(), written, ("a", "b"))
    assert {"exact_match", "label_likelihood", "macro_f1"} <= pairs.keys()
    change = difference(*pairs["exact_match"])
    assert change is not None
    assert change.value == pytest.approx(9 / 12 - 8 / 12)


def test_lower_calibration_errors_are_better() -> None:
    report = EvalReport.model_construct(config={})
    assert is_lower_better(report, "ece")
    assert is_lower_better(report, "urgent_ece_uncalibrated")
    assert not is_lower_better(report, "average_precision")
    own = EvalReport.model_construct(
        config={"metrics": [{"lower_is_better": ["noise"]}]}, num_scored={"my_ece": 3, "noise": 3}
    )
    assert not is_lower_better(own, "my_ece")  # the file says nothing of it
    assert is_lower_better(own, "noise")


@pytest.mark.parametrize("loss", ["single", "multi"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_labels_drawn_at_it_is_found_again(loss: Any, temperature: float) -> None:
    random = np.random.default_rng(0)
    target = Target(labels=("a", "b", "c"), loss=loss)
    logits = random.normal(0, 3, (4000, 3))
    shares = np.array([probabilities(target, row, temperature) for row in logits])
    if loss == "single":
        assert shares.sum(axis=1) == pytest.approx(np.ones(4000))
        drawn = np.array([random.choice(3, p=row) for row in shares])
        truth = np.eye(3)[drawn]
    else:
        truth = (random.random((4000, 3)) < shares).astype(np.float64)
    assert temperature_of(target, logits, truth) == pytest.approx(temperature, rel=0.1)


# ---------------------------------------------------------------- thresholds

SHARES = np.array([[0.9], [0.8], [0.8], [0.6], [0.4], [0.2], [0.95]])
TRUTH = np.array([[1.0], [1.0], [0.0], [1.0], [0.0], [0.0], [ABSENT]])  # the last row has no label of the target


@pytest.mark.parametrize(
    ("goal", "threshold"),
    [
        ({"precision": 0.75}, 0.6),  # 3 of 4
        ({"precision": 0.6}, 0.4),  # 3 of 5
        ({"precision": 0.99}, 0.9),  # 0.8 twice, of which one is wrong, holds as a whole or not at all
        ({"recall": 1}, 0.6),
        ({"recall": 0.5}, 0.8),
        ({"recall": 0.3}, 0.9),
    ],
)
def test_thresholds_are_as_low_or_as_high_as_the_goal_allows(goal: dict[str, float], threshold: float) -> None:
    result = chosen({"mail": Goal(**goal)}, ("mail",), SHARES, TRUTH)
    assert (result.values, result.unreached) == ({"mail": threshold}, {})
    (scores,) = measured(result.values, ("mail",), SHARES, TRUTH).values()
    name, share = next(iter(goal.items()))
    assert scores[f"{name}_at_threshold"] >= share
    assert scores["threshold"] == threshold


def test_goal_that_cannot_be_reached_is_said_by_name() -> None:
    goals = {"a": Goal(precision=0.99), "b": Goal(recall=0.5)}
    shares = np.array([[0.9, 0.5], [0.8, 0.5]])
    result = chosen(goals, ("a", "b"), shares, np.array([[0.0, 0.0], [1.0, 0.0]]))
    assert result.values == {}
    assert result.unreached == {
        "a": "precision 0.99: the highest on 2 validation rows is 0.5",
        "b": "recall 0.5: no validation row has the label",
    }
