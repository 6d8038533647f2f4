"""The settings of classifiers: what contradicts itself is refused with its remedy."""

from __future__ import annotations

from typing import Any

import pytest

from forge_ray.config.base import parse, resolved
from forge_ray.config.classify import Target, class_names, columns_of, metrics_of
from forge_ray.config.run import RunConfig
from forge_ray.config.thresholds import Goal, goals_of
from forge_ray.errors import ConfigError

pytestmark = pytest.mark.unit
TARGETS = [{"labels": ["spam", "ham"]}]
REWARD = {"kind": "reward"}


def run_of(method: dict[str, Any] | str, form: str = "labels", **sections: Any) -> RunConfig:
    data = {"sources": [{"path": "rows.jsonl"}], "form": form}
    run = {"name": "n", "base_model": "m", "data": data, "train": {"method": method}, "release": {"alias": "a"}}
    return parse(RunConfig, run | sections)


def classify(**settings: Any) -> dict[str, Any]:
    return {"kind": "classify", "targets": TARGETS, **settings}


@pytest.mark.parametrize(
    ("method", "message", "hint"),
    [
        (classify(targets=[]), "train.method.targets=[]: tuple should have at least 1 item", ""),
        (classify(lable_smoothing=0.1), "train.method.lable_smoothing=0.1: unknown key", "'train.method.label_smoothing'"),
        (classify(targets=[{"lables": ["a"]}]), "train.method.targets.0.lables", "'train.method.targets.0.labels'"),
        (classify(targets=[{"labels": ["a", "a"]}]), "lists the label 'a' twice", "remove one"),
        (classify(targets=[{"labels": ["a", ""]}]), "has an empty label", "remove it"),
        (classify(targets=[{"labels": ["a"]}]), "has one label, 'a'", "list the other labels"),
        (classify(targets=[{"labels": ["a", "none"], "loss": "multi"}]), "cannot have the label 'none'", "rename the label"),
        (classify(targets=[{"labels": ["a, b"], "loss": "multi"}]), "cannot have the label 'a, b'", "rename the label"),
        (classify(targets=[*TARGETS, *TARGETS]), "do not have distinct names", "a name of its own"),
        (classify(class_weights={"egg": 2.0}), "class_weights names 'egg'", "correct the name"),
        (classify(class_weights={"ham": 0.0}), "class_weights.ham=0.0 is not above 0", "leave out rows"),
        ({"kind": "clasify"}, "Input tag 'clasify'", ""),
    ],
)
def test_contradictions_are_refused(method: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(method)
    assert message.lower() in caught.value.message.lower()
    assert hint in caught.value.hint


def test_the_form_of_the_rows_belongs_to_the_method() -> None:
    with pytest.raises(ConfigError, match=r"train.method=classify with data.form=answers") as caught:
        run_of(classify(), form="answers")
    assert caught.value.hint == "set data.form=labels"
    with pytest.raises(ConfigError, match=r"train.method=sft with data.form=labels"):
        run_of("sft")


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"eval": {"json_schema": "schema.json"}}, "eval.json_schema"),
        ({"release": {"alias": "a", "gate": {"budgets": {"latency_ms_per_token": 5}}}}, "release.gate.budgets.latency"),
        ({"eval": {"leak": {}}}, "eval.leak"),
        ({"eval": {"general": {"rows": "chats"}}}, "eval.general"),
        ({"eval": {"engine": {"kind": "vllm"}}}, "eval.engine.kind=vllm"),
    ],
)
def test_settings_of_generated_answers_are_refused(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(classify(), **sections)
    assert named in caught.value.message
    assert "is for models that generate text" in caught.value.message


def gated(**rules: Any) -> dict[str, Any]:
    return {"release": {"alias": "a", "gate": rules}}


@pytest.mark.parametrize(
    ("method", "sections", "says", "hint"),
    [
        (classify(), gated(thresholds={"loss": {"max": 1}}), "release.gate judges loss, which", "average_precision"),
        (classify(), gated(better_than=[{"metric": "label_ece"}]), "judges label_ece", "ece"),
        (classify(), gated(no_worse_than=[{"metric": "safety_pass_rate"}]), "judges safety_pass_rate", "exact_match"),
        ("sft", gated(thresholds={"ece": {"max": 0.1}}), "train.method=sft does not measure", "head over labels"),
        (
            classify(),
            gated(no_worse_than=[{"metric": "macro_f1", "slices": "label"}])
            | {"eval": {"slices": ["label"], "labels": "from_data"}},
            "compares macro_f1 of slices",
            "slices: none",
        ),
        (
            classify(targets=[{"name": "a", "labels": ["x", "y"]}, {"name": "b", "labels": ["x", "y"]}]),
            gated(no_worse_than=[{"metric": "b_temperature", "slices": "source"}]) | {"eval": {"slices": ["source"]}},
            "compares b_temperature of slices",
            "slices: none",
        ),
        ("sft", {"eval": {"thresholds": {"precision": 0.9}}}, "eval.thresholds is for classifiers", "remove"),
        (REWARD, {"eval": {"thresholds": {"precision": 0.9}}}, "eval.thresholds is for classifiers", "remove"),
        (REWARD, {"release": {"alias": "a", "moderation": {}}}, "release.moderation is for classifiers", "remove"),
        (REWARD, {"eval": {"labels": "from_data"}}, "a reward model has none", "remove eval.labels"),
        (REWARD, {"deploy": {"name": "d", "models": ["a"]}}, "deploy is for models that generate text", "remove"),
        (REWARD, gated(thresholds={"exact_match": {"min": 1}}), "judges exact_match", "pair_accuracy, reward_margin"),
        (REWARD, {"train": {"method": REWARD, "neftune_alpha": 5}}, "different noise", "neftune_alpha=0"),
        (
            classify(targets=[{"labels": ["a", "b"], "loss": "pair"}]),
            {},
            "loss=pair is that of a reward model",
            "kind: reward",
        ),
        (classify(), {"eval": {"thresholds": {"egg": {"precision": 0.9}}}}, "eval.thresholds names 'egg'", "correct"),
        (classify(), {"eval": {"thresholds": {"ham": {}}}}, "exactly one of them", "precision"),
        (
            classify(),
            {"eval": {"thresholds": {"precision": 0.9}, "split": "validation"}},
            "fitted on the rows",
            "split=test",
        ),
        ("sft", {"release": {"alias": "a", "moderation": {}}}, "release.moderation is for classifiers", "remove"),
        (classify(), {"release": {"alias": "a", "moderation": {"safe": ["egg"]}}}, "safe names 'egg'", "correct"),
        (classify(), {"release": {"alias": "a", "moderation": {"safe": ["ham", "spam"]}}}, "leaves no label", "fewer"),
        ("sft", {"eval": {"labels": ["Spam", "spam."]}}, "lists 'Spam' and 'spam.', which are one", "list one"),
    ],
)
def test_what_a_release_would_refuse_is_refused_at_load(method: Any, sections: dict[str, Any], says: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(method, form="answers" if method in ("sft", REWARD) else "labels", **sections)
    assert says in caught.value.message
    assert hint in caught.value.hint


def test_classifier_may_be_gated_by_all_that_it_measures_and_deployed() -> None:
    several = [{"name": "a", "labels": ["x", "y"]}, {"name": "b", "labels": ["z"], "loss": "multi"}]
    for targets in (TARGETS, several):
        names = metrics_of(run_of(classify(targets=targets)).train.targets)
        run = run_of(classify(targets=targets), **gated(thresholds={name: {"min": 0} for name in names}))
        assert run.release.gate.thresholds.keys() == names
    assert {"a_accuracy", "b_ece", "b_temperature"} <= names
    assert "label_likelihood" not in names
    deploy = {"name": "d", "models": ["a"], "engine": {"max_adapters": 0}}
    adapter = {"method": classify(), "adapter": {"r": 8, "alpha": 16}}
    assert run_of(classify(), deploy=deploy, train=adapter).deploy is not None


def test_thresholds_and_moderation_change_no_ids() -> None:
    plain, more = run_of(classify()), run_of(classify(), eval={"thresholds": {"precision": 0.9}})
    assert "thresholds" not in plain.eval.scoring()
    assert more.eval.scoring()["thresholds"] == {"all": {"precision": 0.9, "recall": None}}
    assert plain.train.identity() == more.train.identity()
    declared = run_of(classify(), release={"alias": "a", "moderation": {"safe": ["ham"]}})
    assert (plain.flags, declared.flags) == ((), ("spam",))


def test_base_is_scored_on_the_labels_as_the_rows_write_them() -> None:
    config = run_of(classify(targets=[{"labels": ["Spam", "Not spam."]}]))
    assert config.scoring.labels == ("Spam", "Not spam.")
    assert run_of(classify()).scoring.labels == ("spam", "ham")


def test_goals_are_of_all_labels_or_of_one() -> None:
    goals = goals_of({"all": Goal(recall=0.5), "a": Goal(precision=0.9)}, ("a", "b"))
    assert {name: goal.text for name, goal in goals.items()} == {"a": "precision 0.9", "b": "recall 0.5"}
    assert goals_of({"a": Goal(recall=1)}, ("a", "b")).keys() == {"a"}


def test_a_classifier_is_not_trained_with_parts_of_documents() -> None:
    train = {"method": classify(), "sequence_parallel": 2, "scaling": {"num_workers": 2}}
    with pytest.raises(ConfigError, match="kind=classify with sequence_parallel=2"):
        run_of(classify(), train=train)


def test_ids_of_older_datasets_stay() -> None:
    assert "form" not in resolved(run_of("sft", form="answers").data)
    assert resolved(run_of(classify()).data)["form"] == "labels"


def test_logits_of_several_targets_stand_side_by_side() -> None:
    targets = (Target(name="topic", labels=("card", "loan"), loss="multi"), Target(name="urgent", labels=("yes", "no")))
    assert class_names(targets) == ("topic/card", "topic/loan", "urgent/yes", "urgent/no")
    assert class_names(targets[:1]) == ("card", "loan")
    assert columns_of(targets) == (slice(0, 2), slice(2, 4))
