"""Scores and the gate: hand-computed confusion, fairness of normalisation, every way to fail."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from forge_ray.config.base import parse
from forge_ray.config.classify import normalise
from forge_ray.config.gate import Gate
from forge_ray.config.release import EvalConfig
from forge_ray.data.tokens.text_tools import Tools, write_form
from forge_ray.errors import ConfigError
from forge_ray.evaluate.examples import Example, label_forms
from forge_ray.evaluate.publish import plot_confusion
from forge_ray.evaluate.score import score_examples, tokenizer_for
from forge_ray.evaluate.summary import summarise
from forge_ray.inference.engine import EngineHealth, Generation, GenerationRequest, Question, Score, Token
from forge_ray.records import DatasetManifest, EvalReport
from forge_ray.release.gate import judge
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit


def item(reference: str, prediction: str, likeliest: str = "", logprob: float = -1.0) -> dict[str, Any]:
    likeliest = likeliest or reference
    return {
        "reference": reference,
        "prediction": prediction,
        "likeliest": likeliest,
        "logprob": logprob,
        "num_tokens": 2,
    }


def test_normalise_ignores_format_but_not_content() -> None:
    assert normalise("  Web \n server. ") == "web server"
    assert normalise("web-server") != normalise("web server")


def test_metrics_equal_those_computed_by_hand() -> None:
    items = [item("a", "A."), item("a", "b", "b"), item("b", "b"), item("b", "neither", "a"), item("c", "c")]
    metrics, per_class = summarise(items, ("a", "b", "c", "unused"))
    assert metrics["exact_match"] == pytest.approx(3 / 5)
    assert metrics["label_likelihood"] == pytest.approx(3 / 5)
    assert metrics["loss"] == pytest.approx(0.5)  # 5 × 1 nat over 5 × 2 tokens
    assert metrics["perplexity"] == pytest.approx(1.6487, rel=1e-4)
    assert per_class["a"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2.0}
    assert per_class["b"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2.0}
    assert per_class["unused"]["f1"] == 0.0
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 0.5 + 1) / 3)  # classes that occur


def test_without_labels_there_are_no_class_scores() -> None:
    metrics, per_class = summarise([item("some text", "other text")], ())
    assert set(metrics) == {"exact_match", "loss", "perplexity"}
    assert per_class == {}


def report(**metrics: float) -> EvalReport:
    return EvalReport(
        subject="run_1",
        subject_digest="sha256:0",
        dataset="ds_1",
        split="test",
        config={},
        num_examples=1,
        metrics=metrics,
        per_class={},
        items_sha256="0",
    )


def gate(**values: Any) -> Gate:
    return parse(Gate, values)


@pytest.mark.parametrize(
    ("rules", "reasons"),
    [
        ({"thresholds": {"exact_match": {"min": 0.5}}}, ()),
        ({"thresholds": {"exact_match": {"min": 0.7}}}, ("exact_match=0.6 is below the minimum 0.7",)),
        ({"thresholds": {"loss": {"max": 1}}}, ("loss=2 is above the maximum 1",)),
        ({"better_than": [{"incumbent": "base", "margin": 0.2}]}, ()),
        (
            {"better_than": [{"incumbent": "base", "margin": 0.4}]},
            ("exact_match=0.6 is not better than base (0.3) by 0.4",),
        ),
        ({"better_than": [{"incumbent": "base", "metric": "loss", "margin": 0.5}]}, ()),
        (
            {"better_than": [{"incumbent": "base", "metric": "loss", "margin": 1.5}]},
            ("loss=2 is not better than base (3) by 1.5",),
        ),
        ({"better_than": [{"incumbent": "same"}]}, ("exact_match=0.6 is not better than same (0.6) by 0",)),
        ({"better_than": [{"incumbent": "unset"}]}, ()),
    ],
)
def test_a_failed_gate_gives_its_reasons(rules: dict[str, Any], reasons: tuple[str, ...]) -> None:
    tuned = report(exact_match=0.6, loss=2.0)
    incumbents = {"base": report(exact_match=0.3, loss=3.0), "same": tuned, "unset": None}
    assert judge(gate(**rules), tuned, incumbents) == reasons


def test_a_metric_that_the_report_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="'accuracy'") as caught:
        judge(gate(thresholds={"accuracy": {"min": 0.5}}), report(loss=1.0), {})
    assert caught.value.hint == "one of loss"


class Echo:
    """An engine that answers `blue` to everything and finds label number n to have log-probability -n."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.prompts: list[str] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        self.prompts += [self.tokenizer.decode(request.prompt_ids) for request in requests]
        return [Generation(tuple(self.tokenizer("blue")["input_ids"]), "stop") for _ in requests]

    def stream(self, request: GenerationRequest) -> AsyncIterator[Token]:
        raise AssertionError("not used")

    def score(self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        return [Score(-float(number), len(ids)) for number, ids in enumerate(continuations)]

    def score_all(self, questions: Sequence[Question]) -> list[list[Score]]:
        return [self.score(*question) for question in questions]

    def health(self) -> EngineHealth:
        return EngineHealth(True, "", 0, 0)

    def close(self) -> None: ...


def test_prompts_equal_those_of_training_and_labels_end_with_the_turn(tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    engine = Echo(tokenizer)
    chats = [
        Example("rec_1", ({"role": "user", "content": "sky?", "weight": 0},), None, "Blue"),
        Example("rec_2", ({"role": "user", "content": "grass?", "weight": 0},), None, "green"),
        Example("rec_3", ({"role": "user", "content": "snow?", "weight": 0},), None, "white"),
    ]
    items = list(score_examples(engine, tokenizer, chats, {"blue": "blue", "green": "green"}, EvalConfig()))
    assert engine.prompts[0] == "<|im_start|>user\nsky?<|im_end|>\n<|im_start|>assistant\n"
    assert [i["prediction"] for i in items] == ["blue"] * 3
    assert [i["likeliest"] for i in items] == ["blue"] * 3
    assert [i["logprob"] for i in items] == [0.0, -1.0, -2.0]  # a reference outside the label set is scored too
    green = len(tokenizer("green")["input_ids"]) + 1
    assert items[1]["num_tokens"] == green


def test_a_pair_whose_other_answer_has_no_place_in_the_template_is_left_out_by_name(tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    calls = [{"function": {"name": "pour", "arguments": "{}"}}]
    chats = [
        Example(
            "rec_1", ({"role": "user", "content": "tea?"},), None, "yes", rejected={"role": "assistant", "content": "no"}
        ),
        Example(
            "rec_2",
            ({"role": "user", "content": "milk?"},),
            None,
            "yes",
            rejected={"role": "assistant", "tool_calls": calls},
        ),
    ]
    left_out, pair = score_examples(Echo(tokenizer), tokenizer, chats, (), EvalConfig())
    assert (pair["logprob"], pair["rejected_logprob"]) == (0.0, -1.0)
    assert left_out["record"] == "rec_2"
    assert "tool calls" in left_out["left_out"]


def test_labels_with_capitals_are_written_as_they_are_and_compared_without(tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = EvalConfig(labels=("Blue", "Green"))
    forms = label_forms(Store("/nowhere"), DatasetManifest.model_construct(), config)
    assert forms == {"blue": "Blue", "green": "Green"}
    chats = [Example("rec_1", ({"role": "user", "content": "sky?", "weight": 0},), None, "Blue")]
    (one,) = score_examples(Echo(tokenizer), tokenizer, chats, forms, config)
    assert one["likeliest"] == "blue"
    assert one["num_tokens"] == len(tokenizer("Blue")["input_ids"]) + 1
    metrics, per_class = summarise([one], tuple(forms))
    assert (metrics["label_likelihood"], metrics["macro_f1"], metrics["exact_match"]) == (1.0, 1.0, 1.0)
    assert set(per_class) == {"blue", "green"}


def test_the_confusion_matrix_is_a_picture(tmp_path: Path) -> None:
    plot_confusion([item("a", "b"), item("b", "b"), item("a", "?")], ("a", "b"), tmp_path / "c.png", "t")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_models_are_given_tools_as_the_dataset_or_as_they_were_trained(tiny_model_dir: Path, tmp_path: Path) -> None:
    def style(tools: dict[str, str], adapter: Path | None) -> str:
        manifest = DatasetManifest.model_construct(config=tools)
        return tokenizer_for(manifest, tiny_model_dir, adapter).call_style

    plain, text = tmp_path / "plain", tmp_path / "text"
    forms: list[tuple[Path, Tools]] = [(plain, "template"), (text, "text")]
    for folder, tools in forms:
        folder.mkdir()
        write_form(folder, tools)
    assert [style({}, adapter) for adapter in (None, plain, text)] == ["", "", "hermes"]
    assert [style({"tools": "text"}, adapter) for adapter in (None, plain, text)] == ["hermes"] * 3
