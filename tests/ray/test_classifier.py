"""A classifier from rows to verdict: trained, scored next to the model that writes labels, released, and what serves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from forge_ray import pipeline
from forge_ray.config.base import parse
from forge_ray.config.release import DeployConfig, EvalConfig, Moderation
from forge_ray.config.run import RunConfig
from forge_ray.config.thresholds import Goal
from forge_ray.data.dataset.version import load_tokenizer
from forge_ray.errors import ConfigError
from forge_ray.evaluate.items import items_of
from forge_ray.evaluate.standalone import Compared
from forge_ray.export.leave import export_version
from forge_ray.models.class_head import targets_of
from forge_ray.serve.calibration import head_of
from forge_ray.serve.deploy import deployment_of
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
SIZES = ("small", "large")


def config_of(folder: Path, name: str, targets: list[dict[str, Any]], rows: list[dict[str, Any]], **train: Any) -> RunConfig:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "method": {"kind": "classify", "targets": targets, "class_weights": "balanced"},
        "epochs": 12,
        "global_batch": 4,
        "micro_batch_size": 4,
        "optimizer": {"lr": 5e-3},
        "engine": "torch",
        "zero_stage": 0,
        "precision": "fp32",
        "scaling": {"num_workers": 0},
    }
    splits = {"validation": 0.15, "test": 0.2}
    gate = {"better_than": [{"incumbent": "base"}, {"incumbent": "base", "metric": "macro_f1"}]} if len(targets) == 1 else {}
    values = {
        "name": name,
        "base_model": "tiny",
        "data": {"sources": [{"path": str(path)}], "form": "labels", "sequence_length": 128, "splits": splits},
        "train": settings | train,
        "eval": {"engine": {"precision": "fp32"}},
        "release": {"alias": name, "gate": gate},
    }
    return parse(RunConfig, values)


def test_classifier_is_trained_scored_released_and_may_be_served(store: Store, tmp_path: Path) -> None:
    words = {"small": "ant bee", "large": "ox elk"}
    rows = [{"text": f"{words[SIZES[n % 2]]} number {n}", "label": SIZES[n % 2]} for n in range(160)]
    config = config_of(tmp_path, "sizes", [{"labels": SIZES}], rows)
    scoring = config.eval.model_copy(update={"thresholds": {"all": Goal(precision=0.9)}})
    released = config.release.model_copy(update={"moderation": Moderation(safe=("small",))})
    config = parse(RunConfig, config.model_copy(update={"eval": scoring, "release": released}).model_dump(mode="json"))
    outcome = pipeline.run(config, store)
    report, version = outcome.report, outcome.version
    assert version.status == "accepted", version.reasons
    assert report.metrics["exact_match"] > 0.9
    assert outcome.base_report.metrics["exact_match"] < 0.5  # the model that writes labels, on the same rows
    assert set(report.per_class) == set(SIZES)
    assert report.per_class["small"]["recall"] > 0.8
    assert {"macro_f1", "average_precision", "ece", "ece_uncalibrated", "temperature"} <= report.metrics.keys()
    assert {"exact_match", "macro_f1", "ece"} <= report.intervals.keys()
    folder = store.local(f"evals/{report.id}")
    assert (folder / "confusion.png").is_file()
    assert (folder / "reliability.png").is_file()

    exported = store.local(f"models/{version.id}")
    model = AutoModelForSequenceClassification.from_pretrained(exported)
    tokenizer = load_tokenizer(store, version.id)
    for item in items_of(store, report)[:5]:
        messages = next(row for row in rows if row["label"] == item["reference"])
        ids = tokenizer.prompt_ids([{"role": "user", "content": messages["text"]}])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        assert model.config.id2label[int(logits.argmax())] == messages["label"]

    with Catalog.open(store) as catalog:
        served = parse(DeployConfig, {"name": "sizes", "models": ["sizes"]})
        assert deployment_of(served, catalog).model_version == version.id
        head = head_of(store, version, targets_of(exported))
        with pytest.raises(ConfigError, match="is a classifier: --form gguf"):
            export_version(catalog, "sizes", str(tmp_path / "gguf"), "gguf", None)
        left = export_version(catalog, "sizes", str(tmp_path / "left"), "merged", None)
    assert left.form == "merged"
    assert head.temperatures == {"label": report.metrics["temperature"]}
    assert (head.thresholds, head.flags, head.report) == (report.thresholds, ("large",), report.id)
    assert set(report.thresholds) == set(SIZES)
    assert report.per_class["large"].keys() >= {"threshold", "precision_at_threshold", "recall_at_threshold"}
    assert outcome.base_report.thresholds == {}
    assert "AutoModelForSequenceClassification" in (tmp_path / "left" / "README.md").read_text()

    on = config.model_copy(update={"base_model": "sizes", "name": "sizes-chat"})
    chat = {"train": on.train.model_copy(update={"method": "sft"}), "data": on.data.model_copy(update={"form": "answers"})}
    with pytest.raises(ConfigError, match=r"is a classifier: train.method=sft from it"):
        pipeline.train(on.model_copy(update=chat), store)

    name = f"{outcome.run.id}@last"
    (checkpoint,) = pipeline.evaluate_models(Compared((name,)), outcome.dataset.id, EvalConfig(cpus=1), store, {})
    assert checkpoint.evaluated == f"{outcome.run.id}@{outcome.run.num_steps}"
    (alone,) = pipeline.evaluate_models(Compared(("sizes",)), outcome.dataset.id, EvalConfig(cpus=1), store, {})
    assert alone.metrics["exact_match"] == report.metrics["exact_match"]
    general = parse(EvalConfig, {"safety": [str(_prompts(tmp_path))]})
    with pytest.raises(ConfigError, match=r"eval.safety asks for text"):
        pipeline.evaluate_models(Compared(("sizes",)), outcome.dataset.id, general, store, {})


def _prompts(folder: Path) -> Path:
    path = folder / "safety.jsonl"
    path.write_text(json.dumps({"prompt": "hello", "must": ["x"]}))
    return path


def test_several_targets_with_an_adapter(store: Store, tmp_path: Path) -> None:
    rows = []
    for n in range(160):
        animals = ["ant", "bee"] if n % 3 == 0 else ["ox"] if n % 3 == 1 else []
        labels = {"size": SIZES[n % 2], "animals": animals or "none"}
        text = f"{' '.join(animals) or 'nobody'} {'little' if n % 2 == 0 else 'huge'} {n}"
        rows.append({"text": text, "labels": labels if n % 8 else {"size": labels["size"]}})
    targets = [{"name": "size", "labels": SIZES}, {"name": "animals", "labels": ["ant", "bee", "ox"], "loss": "multi"}]
    adapter = {"r": 8, "alpha": 16}
    config = config_of(tmp_path, "animals", targets, rows, adapter=adapter, optimizer={"lr": 1e-2})
    outcome = pipeline.run(config, store)
    report = outcome.report
    assert outcome.version.weights == "adapter"
    assert {"size_accuracy", "animals_accuracy", "size_ece", "animals_temperature", "macro_f1"} <= report.metrics.keys()
    assert report.metrics["size_accuracy"] > 0.7
    assert set(report.per_class) == {"size/small", "size/large", "animals/ant", "animals/bee", "animals/ox"}
    items = items_of(store, report)
    assert all(set(item["targets"]) == {"size", "animals"} for item in items)
    assert any(item["targets"]["animals"] is None for item in items)
    assert all(item["reference"].startswith("{") for item in items)
    with Catalog.open(store) as catalog, pytest.raises(ConfigError, match="is a classifier: --form merged"):
        export_version(catalog, outcome.version.id, str(tmp_path / "merged"), "merged", None)


def test_reward_model_is_scored_by_pairs_and_served_by_nothing(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    answers = ("short and kind", "long rude words")
    rows = [{"prompt": f"question {n}", "chosen": answers[0], "rejected": answers[1]} for n in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config_of(tmp_path, "kind", [{"labels": SIZES}], []).model_dump(mode="json")
    train = settings["train"] | {"method": {"kind": "reward"}, "epochs": 4, "max_steps": 0}
    gate = {"thresholds": {"pair_accuracy": {"min": 0.9}}, "no_worse_than": [{"metric": "pair_accuracy"}]}
    data = settings["data"] | {"form": "answers", "sources": [{"path": str(path)}]}
    values = settings | {"train": train, "data": data, "release": {"alias": "kind", "gate": gate}}
    outcome = pipeline.run(parse(RunConfig, values), store)
    assert outcome.report.metrics["pair_accuracy"] == 1.0
    assert outcome.report.metrics["reward_margin"] > 0
    assert outcome.report.intervals["pair_accuracy"][0] > 0.5  # Wilson's, of a share
    assert {"pair_accuracy", "pair_margin", "loss"} <= outcome.base_report.metrics.keys()
    exported = store.local(f"models/{outcome.version.id}")
    assert AutoModelForSequenceClassification.from_pretrained(exported).config.num_labels == 1
    deployment = parse(DeployConfig, {"name": "kind", "models": [outcome.version.id]})
    with Catalog.open(store) as catalog, pytest.raises(ConfigError, match="is a reward model, which no endpoint serves"):
        deployment_of(deployment, catalog)
    labels = parse(EvalConfig, {"labels": ["a", "b"]})
    with pytest.raises(ConfigError, match=r"eval.labels asks for text or labels"):
        pipeline.evaluate_models(Compared((outcome.version.id,)), outcome.dataset.id, labels, store, {})
