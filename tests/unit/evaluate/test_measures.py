"""Scores of texts, calls and objects, computed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, cast

import pytest

from forge_ray.data.tokens.template import ChatTokenizer
from forge_ray.evaluate.examples import TextExample
from forge_ray.evaluate.measures import differences, field_scores, intervals, leaves, statistics
from forge_ray.evaluate.summary import slice_scores, summarise
from forge_ray.evaluate.texts import score_texts, windows
from forge_ray.inference.engine import Engine, Score

pytestmark = pytest.mark.unit


def chat(reference: str, prediction: str, **more: Any) -> dict[str, Any]:
    fixed = {"record": f"rec_{reference}", "source": "a", "likeliest": "", "logprob": -1.0, "num_tokens": 2}
    return fixed | {"reference": reference, "prediction": prediction} | more


def call(*calls: tuple[str, Any], called: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    expected, got = ([{"name": name, "arguments": value} for name, value in each] for each in (calls, called))
    return chat("", "", kind="call", calls=expected, called=got, record=json.dumps([expected, got]))


def text(record: str, logprob: float, num_tokens: int, num_bytes: int, source: str = "b") -> dict[str, Any]:
    return {"kind": "text", "record": record, "source": source, "logprob": logprob, "num_tokens": num_tokens} | {
        "num_bytes": num_bytes
    }


def test_texts_have_bits_per_byte() -> None:
    metrics, per_class = summarise([text("1", -8 * math.log(2), 4, 4), text("2", -8 * math.log(2), 4, 12)], ())
    assert metrics == {
        "text_loss": pytest.approx(2 * math.log(2)),
        "text_perplexity": pytest.approx(4.0),
        "bits_per_byte": pytest.approx(1.0),
    }
    assert per_class == {}


def test_a_mix_has_the_scores_of_each_kind_and_slices_by_source() -> None:
    items = [chat("x", "x"), text("1", -2.0, 2, 2), call(("f", {}), called=[("f", {})])]
    metrics, _ = summarise(items, ())
    assert {"exact_match", "loss", "text_loss", "bits_per_byte", "calls_match"} <= set(metrics)
    assert metrics["exact_match"] == 1.0
    assert metrics["loss"] == pytest.approx(0.5)  # of the chat and the call
    slices = slice_scores(items, (), ("source",))["source"]
    assert slices["b"] == {"text_loss": 1.0, "text_perplexity": pytest.approx(math.e), "count": 1.0} | {
        "bits_per_byte": pytest.approx(1 / math.log(2))
    }
    assert "bits_per_byte" not in slices["a"]
    assert slice_scores(items, ("x",), ("label",))["label"].keys() == {"x"}


def test_calls_are_judged_as_a_whole_by_name_and_in_any_order() -> None:
    items = [
        call(("f", {"a": 1}), called=[("f", {"a": 1})]),
        call(("f", {"a": 1}), called=[("f", {"a": 2})]),
        call(("f", {}), ("g", {}), called=[("g", {}), ("f", {})]),
        call(("f", {"a": 1, "b": 2}), called=[("f", {"b": 2, "a": 1})]),
        call(("f", {}), called=[]),
    ]
    metrics, _ = summarise([*items, chat("no", "no", called=[]), chat("no", "f()", called=[{"name": "f"}])], ())
    assert metrics["calls_match"] == pytest.approx(2 / 5)
    assert metrics["calls_match_any_order"] == pytest.approx(3 / 5)
    assert metrics["call_names_match"] == pytest.approx(3 / 5)
    assert metrics["needless_calls"] == pytest.approx(1 / 2)


def test_objects_are_judged_by_field() -> None:
    items = [
        chat('{"name": "A", "sizes": [1, 2]}', '{"sizes": [1, 3], "name": "A"}'),
        chat('{"name": "B", "sizes": []}', "not an object"),
        chat('{"name": "C"}', '{"name": "C", "extra": {"deep": true}}'),
    ]
    metrics, fields = summarise(items, ())
    assert metrics["json_valid"] == pytest.approx(2 / 3)
    assert metrics["json_match"] == 0.0
    assert metrics["field_recall"] == pytest.approx(3 / 6)
    assert metrics["field_precision"] == pytest.approx(3 / 5)
    assert metrics["field_f1"] == pytest.approx(6 / 11)
    assert fields["name"] == {"precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(4 / 5), "support": 3.0}
    assert fields["sizes[]"]["support"] == 2.0
    assert fields["extra.deep"]["support"] == 0.0
    assert field_scores([*items, chat("plain", "plain")]) == {}
    assert "json_match" not in statistics([*items, chat("plain", "plain")], ())
    assert list(leaves({"a": {}, "b": [{"c": 1}]})) == [("a", "{}"), ("b[].c", "1")]


def test_only_common_rows_are_compared() -> None:
    ours = [chat(str(n), str(n)) for n in range(20)]
    theirs = [chat(str(n), "wrong") for n in range(10, 30)]
    change = differences(ours, theirs, (), 0.95)["exact_match"]
    assert change
    assert change.value == 1.0
    assert change.low > 0.5
    assert differences(ours, [chat("other", "x")], (), 0.95) == {}
    assert set(intervals(ours, ())) == {"exact_match", "loss", "perplexity"}
    assert set(intervals(ours[:5], ())) == {"exact_match"}


class Letters:
    """Every letter is a token; no begin token."""

    bos_id = None
    end_of_turn_id = 0

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]


class Counting:
    max_request_tokens = 64

    def __init__(self) -> None:
        self.scored: list[tuple[list[int], list[int]]] = []

    def score(self, prompt: list[int], continuations: list[list[int]]) -> list[Score]:
        self.scored += [(prompt, one) for one in continuations]
        return [Score(-float(len(one)), len(one)) for one in continuations]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12, 100])
def test_every_token_is_scored_once_with_half_a_window_before_it(length: int) -> None:
    engine, tokenizer = Counting(), cast(ChatTokenizer, Letters())
    letters = "".join(chr(97 + n % 26) for n in range(length))
    (item,) = score_texts(cast(Engine, engine), tokenizer, [TextExample("r", letters)], window=8)
    assert (item["logprob"], item["num_tokens"], item["num_bytes"]) == (-float(length), length, length)
    assert [token for _, scored in engine.scored for token in scored] == [ord(letter) for letter in letters]
    whole = [0, *map(ord, letters)]
    at = 1
    for number, (context, scored) in enumerate(engine.scored):
        assert len(context) + len(scored) <= 8
        assert context == whole[at - len(context) : at]
        assert number == 0 or len(context) >= 4
        at += len(scored)
    assert list(windows(tokenizer, [], 8)) == []
