"""Classifiers over HTTP: the bodies of their endpoints, what is refused, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from classifiers import TOPIC, TOXIC, loaded_classifier, make_classifier
from http_server import Fixed, deployment, running
from scripted import Scripted, loaded, saying
from transformers import AutoModelForSequenceClassification

from forge_ray.config.classify import Target
from forge_ray.data.tokens.chat import load_tokenizer_dir
from forge_ray.serve.calibration import ClassHead
from forge_ray.serve.class_results import classification, holding, moderation
from forge_ray.serve.context import Caller, Chosen
from forge_ray.serve.http import build_http

pytestmark = pytest.mark.unit
TEXTS = ["The quick brown fox", "How do I reset my password?", "one two three", "Paris"]
TEMPERATURES = {"topic": 2.0, "toxic": 0.5}


class Tally:
    def __init__(self) -> None:
        self.closed: list[tuple[int, int, int]] = []

    async def admit(self, caller: Caller, chosen: Chosen, prompt_tokens: int, max_new_tokens: int) -> Tally:
        return self

    def close(self, prompt_tokens: int, completion_tokens: int, status: int) -> None:
        self.closed.append((prompt_tokens, completion_tokens, status))


TALLY = Tally()


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tiny_model_dir, tmp_path_factory.mktemp("classifier") / "model", TOPIC, TOXIC)


@pytest.fixture(scope="module")
def url(folder: Path, tiny_model_dir: Path) -> Iterator[str]:
    kinds = {
        "topics": loaded_classifier(folder, TOPIC, TOXIC, temperatures=TEMPERATURES, max_batch_tokens=64),
        "toxic": loaded_classifier(
            folder, TOPIC, TOXIC, thresholds={"toxic/threat": 0.0}, flags=("toxic/insult", "toxic/threat")
        ),
    }
    tokenizer = load_tokenizer_dir(tiny_model_dir)
    chat = loaded(tokenizer, Scripted(saying(tokenizer, "hello")))
    context = deployment(Fixed(**kinds, chat=chat), limits={"max_prompt_tokens": 40, "max_messages": 3})
    with running(build_http(replace(context, admit=TALLY.admit))) as url:
        yield url
    for one in kinds.values():
        one.engine.close()


def logits_of(folder: Path, text: str) -> np.ndarray[Any, Any]:
    """By transformers' own class, one text a pass."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = load_tokenizer_dir(folder).prompt_ids([{"role": "user", "content": text}])
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().numpy()


def softmax(values: Any) -> list[float]:
    return (np.exp(values) / np.exp(values).sum()).tolist()


def sigmoid(values: Any) -> list[float]:
    return (1 / (1 + np.exp(-values))).tolist()


def test_probabilities_are_those_of_transformers_after_the_temperature(url: str, folder: Path) -> None:
    answer = httpx.post(f"{url}/v1/classifications", json={"model": "topics", "input": TEXTS, "metadata": {"k": "v"}})
    body = answer.json()
    assert body.keys() == {"id", "model", "results", "usage", "metadata"}
    assert len(body["results"]) == len(TEXTS)
    for text, result in zip(TEXTS, body["results"], strict=True):
        logits = logits_of(folder, text)
        assert list(result["topic"]["scores"].values()) == pytest.approx(softmax(logits[:3] / 2.0), abs=1e-5)
        assert list(result["toxic"]["scores"].values()) == pytest.approx(sigmoid(logits[3:] / 0.5), abs=1e-5)
        assert result["topic"]["labels"] == [TOPIC.labels[int(logits[:3].argmax())]]
        assert result["toxic"]["labels"] == [
            name for name, value in zip(TOXIC.labels, logits[3:], strict=True) if value >= 0
        ]
    assert answer.headers["x-forge-model-version"] == "mv_c"
    tokenizer = load_tokenizer_dir(folder)
    num_tokens = sum(len(tokenizer.prompt_ids([{"role": "user", "content": text}])) for text in TEXTS)
    assert body["usage"] == {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens}
    assert TALLY.closed[-1] == (num_tokens, 0, 200)
    one = httpx.post(f"{url}/v1/classifications", json={"model": "topics", "input": TEXTS[1]}).json()["results"]
    assert [list(target["scores"].values()) for target in one[0].values()] == [
        pytest.approx(list(target["scores"].values()), abs=1e-6) for target in body["results"][1].values()
    ]


def test_a_conversation_is_read_by_the_chat_template(url: str, folder: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two"}]
    whole = {"model": "topics", "input": [{"messages": messages}, {"messages": messages[1:]}]}
    results = httpx.post(f"{url}/v1/chat/classifications", json=whole).json()["results"]
    plain = httpx.post(f"{url}/v1/classifications", json={"model": "topics", "input": "one two"}).json()["results"][0]
    assert results[1]["topic"]["scores"] == pytest.approx(plain["topic"]["scores"], abs=1e-6)
    assert results[0]["topic"]["scores"] != pytest.approx(plain["topic"]["scores"], abs=1e-4)
    single = httpx.post(f"{url}/v1/chat/classifications", json=whole | {"input": {"messages": messages}}).json()["results"]
    assert single[0]["topic"]["scores"] == pytest.approx(results[0]["topic"]["scores"], abs=1e-6)


def test_moderations_flag_by_the_declared_labels_and_thresholds(url: str, folder: Path) -> None:
    body = httpx.post(f"{url}/v1/moderations", json={"model": "toxic", "input": TEXTS}).json()
    for text, result in zip(TEXTS, body["results"], strict=True):
        scores = sigmoid(logits_of(folder, text)[3:])
        assert list(result["category_scores"]) == ["toxic/insult", "toxic/threat"]
        assert list(result["category_scores"].values()) == pytest.approx(scores, abs=1e-5)
        assert result["categories"] == {"toxic/insult": scores[0] >= 0.5, "toxic/threat": True}  # from a threshold of 0
        assert result["flagged"] is True
        assert result["category_applied_input_types"] == {"toxic/insult": ["text"], "toxic/threat": ["text"]}
    parts = [{"type": "text", "text": TEXTS[0][:5]}, {"type": "text", "text": TEXTS[0][5:]}]  # one input, as at OpenAI
    joined = httpx.post(f"{url}/v1/moderations", json={"model": "toxic", "input": parts}).json()["results"]
    assert [one["category_scores"] for one in joined] == [pytest.approx(body["results"][0]["category_scores"], abs=1e-6)]
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    for sent in (chats, chats[0]):
        results = httpx.post(f"{url}/v1/chat/moderations", json={"model": "toxic", "input": sent}).json()["results"]
        assert results[0]["category_scores"] == pytest.approx(body["results"][0]["category_scores"], abs=1e-6)


CHAT = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("path", "sent", "param", "says"),
    [
        ("chat/completions", {"model": "topics", "messages": CHAT}, "model", "is a classifier, which generates no text"),
        ("completions", {"model": "topics", "prompt": "x"}, "model", "/v1/chat/classifications"),
        ("responses", {"model": "topics", "input": "x"}, "model", "is a classifier"),
        ("embeddings", {"model": "topics", "input": "x"}, "model", "is a classifier"),
        ("classifications", {"model": "chat", "input": "x"}, "model", "'chat' generates text"),
        ("moderations", {"model": "chat", "input": "x"}, "model", "'chat' generates text"),
        ("moderations", {"model": "topics", "input": "x"}, "model", "not declared as a moderation model"),
        ("classifications", {"model": "topics", "input": []}, "input", "empty"),
        ("classifications", {"model": "topics", "input": ["x", ""]}, "input", "empty"),
        ("classifications", {"model": "topics", "input": ["x"] * 2049}, "input", "limit of 2048"),
        ("classifications", {"model": "topics", "input": ["x", "one two " * 40]}, "input", "text 1 has"),
        ("classifications", {"model": "topics", "input": "x", "user": "me"}, "user", "unknown field"),
        ("classifications", {"model": "topics"}, "input", "required"),
        ("chat/classifications", {"model": "topics", "input": []}, "input", "empty"),
        ("chat/classifications", {"model": "topics", "input": {"messages": CHAT * 4}}, "input", "limit of 3"),
        ("chat/moderations", {"model": "toxic", "input": [[]]}, "input", "empty"),
        (
            "chat/classifications",
            {"model": "topics", "input": {"messages": [*CHAT, {"role": "assistant", "content": "a", "prefix": True}]}},
            "input",
            "a classifier writes none",
        ),
        ("moderations", {"model": "toxic", "input": [{"type": "text", "text": ""}]}, "input", "empty"),
        (
            "moderations",
            {"model": "toxic", "input": [{"type": "image_url", "image_url": {"url": "data:"}}]},
            "input",
            "input.0.type: input should be 'text'",
        ),
        ("classifications", {"model": "topics", "input": [{"type": "text", "text": "x"}]}, "input", "string"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(url: str, path: str, sent: Any, param: str, says: str) -> None:
    response = httpx.post(f"{url}/v1/{path}", json=sent)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].partition(".")[0] == param
    assert says in error["message"]


def test_logits_that_are_no_numbers_are_an_error_by_name_and_no_answer(folder: Path) -> None:
    one = loaded_classifier(folder, TOPIC, TOXIC)
    with torch.no_grad():
        one.classifier[0].classifier.model.score.weight[0, 0] = float("nan")
    context = deployment(Fixed(topics=one))
    try:
        with running(build_http(replace(context, admit=TALLY.admit))) as url:
            answer = httpx.post(f"{url}/v1/classifications", json={"model": "topics", "input": "x"})
    finally:
        one.classifier[0].close()
    assert answer.status_code == 503
    assert "mv_c gives logits that are not finite numbers" in answer.json()["error"]["message"]
    assert TALLY.closed[-1][1:] == (0, 503)


def test_tokens_of_a_classifier_can_be_counted(url: str) -> None:
    assert httpx.post(f"{url}/tokenize", json={"model": "topics", "prompt": "one two"}).json()["max_model_len"] > 0


# ---------------------------------------------------------------- results, pure


def logit(share: float) -> float:
    return float(np.log(share / (1 - share)))


def test_labels_hold_by_their_thresholds_or_from_one_half() -> None:
    head = ClassHead((TOXIC,), thresholds={"insult": 0.9})
    assert holding(head, np.array([0.89, 0.5])) == ("threat",)
    assert holding(head, np.array([0.9, 0.49])) == ("insult",)
    assert classification(head, np.array([logit(0.95), logit(0.1)]))["toxic"]["labels"] == ["insult"]


def test_safe_label_is_no_category_and_a_threshold_counts_before_the_likeliest() -> None:
    target = Target(name="kind", labels=("fine", "rude"))
    logits = np.log(np.array([0.4, 0.6]))
    one = moderation(ClassHead((target,), flags=("rude",)), logits)
    assert (one["flagged"], one["categories"]) == (True, {"rude": True})
    strict = moderation(ClassHead((target,), flags=("rude",), thresholds={"rude": 0.7}), logits)
    assert (strict["flagged"], strict["category_scores"]) == (False, {"rude": pytest.approx(0.6)})
