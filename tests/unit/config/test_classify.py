"""The settings of classifiers: what contradicts itself is refused with its remedy."""

from __future__ import annotations

from typing import Any

import pytest

from forge_ray.config.base import parse, resolved
from forge_ray.config.classify import Target, class_names, columns_of
from forge_ray.config.run import RunConfig
from forge_ray.errors import ConfigError

pytestmark = pytest.mark.unit
TARGETS = [{"labels": ["spam", "ham"]}]


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
        ({"deploy": {"name": "d", "models": ["a"]}}, "deploy"),
    ],
)
def test_settings_of_generated_answers_are_refused(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(classify(), **sections)
    assert named in caught.value.message
    assert "is for models that generate text" in caught.value.message


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
