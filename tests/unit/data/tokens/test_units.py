"""Judged answers as documents: what of them is trained, and that a pair fits a row whole or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import tiny_tokenizer

from forge_ray.data.record.schema import DataRecord, Reject, parse_record
from forge_ray.data.record.tables import from_arrow, to_arrow
from forge_ray.data.tokens.chat import encode_batch
from forge_ray.data.tokens.template import Encoded
from forge_ray.data.tokens.units import CUT_AWAY, SAME_IDS, SEVERAL, together

pytestmark = pytest.mark.unit
PAIR = {"prompt": "How do I reset my password?", "chosen": "Open the settings.", "rejected": "No."}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def trained(tokenizer: Any, document: Encoded) -> str:
    return str(tokenizer.decode(document.ids[document.loss_mask > 0]))


def test_of_a_pair_both_answers_are_trained_and_nothing_else(tokenizer: Any) -> None:
    record = parse_record(PAIR)
    (documents,) = encode_batch(tokenizer, [record], 200, "reject")
    assert not isinstance(documents, Reject)
    assert [trained(tokenizer, document) for document in documents] == ["Open the settings.<|im_end|>", "No.<|im_end|>"]


def test_earlier_answers_of_a_prompt_are_context(tokenizer: Any) -> None:
    turns = [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "And now?"},
    ]
    record = parse_record({"prompt": turns, "completion": "Paris.", "label": True})
    assert record.kind == "feedback"
    (documents,) = encode_batch(tokenizer, [record], 200, "reject")
    assert not isinstance(documents, Reject)
    assert [trained(tokenizer, document) for document in documents] == ["Paris.<|im_end|>"]


def test_pair_and_chat_in_one_batch_keep_their_places(tokenizer: Any) -> None:
    chat = parse_record({"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]})
    results = encode_batch(tokenizer, [parse_record(PAIR), chat, DataRecord({"text": "three"}, "text")], 200, "reject")
    assert [len(result) for result in results if not isinstance(result, Reject)] == [2, 1, 1]


def document(prompt: int, answer: int, first: int = 0) -> Encoded:
    ids = np.arange(first, first + prompt + answer, dtype=np.int32)
    return Encoded(ids, np.array([0] * prompt + [1] * answer, np.int8))


def test_pair_that_is_longer_than_a_row_is_refused_or_cut_on_both_sides() -> None:
    long, short = document(4, 20), document(4, 6, first=100)
    refused = together([[long], [short]], 30, "reject")
    assert str(refused) == "a pair, both answers together, is longer than sequence_length"
    cut = together([[long], [short]], 30, "truncate")
    assert not isinstance(cut, Reject)
    assert [len(half.ids) for half in cut] == [20, 10]
    assert [half.truncated for half in cut] == [True, False]
    both = together([[long], [document(4, 20, first=100)]], 30, "truncate")
    assert not isinstance(both, Reject)
    assert [len(half.ids) for half in both] == [15, 15]


def test_pair_without_a_difference_is_refused() -> None:
    same = together([[document(3, 5)], [document(3, 5)]], 30, "reject")
    assert str(same) == SAME_IDS
    ends = document(4, 20), Encoded(np.append(np.arange(23, dtype=np.int32), 99), document(4, 20).loss_mask)
    assert str(together([[ends[0]], [ends[1]]], 30, "truncate")) == CUT_AWAY  # they differ in what is cut away
    assert str(together([[document(20, 3)], [document(20, 9, first=50)]], 30, "truncate")) == CUT_AWAY


def test_answer_of_several_documents_is_refused() -> None:
    assert str(together([[document(3, 5), document(3, 5)], [document(3, 5)]], 30, "reject")) == SEVERAL
    why = Reject("it has no place")
    assert together([[document(3, 5)], why], 30, "reject") is why


@pytest.mark.parametrize(
    ("more", "margin"),
    [({"margin": 2}, 2.0), ({"score_chosen": 9, "score_rejected": 4.5}, 4.5), ({}, None)],
)
def test_margin_of_a_pair_is_read(more: dict[str, Any], margin: float | None) -> None:
    assert parse_record(PAIR | more).content.get("margin") == margin


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"margin": "much"}, "a string"),
        ({"margin": True}, "a boolean"),
        ({"margin": [1]}, "a list"),
        ({"margin": 10**400}, f"1{'0' * 41}"),
        ({"score_chosen": "high", "score_rejected": 1}, "a string less 1"),
        ({"score_chosen": 1.7e308, "score_rejected": -1.7e308}, "1.7e+308 less -1.7e+308"),
    ],
)
def test_margin_that_is_no_number_stays_as_its_text(more: dict[str, Any], text: str) -> None:
    """The pair is trained on by the losses that read no margin."""
    record = parse_record(PAIR | more)
    assert "margin" not in record.content
    assert record.content["unusable_margin"] == text
    assert next(from_arrow(to_arrow([record]))) == record.content


def test_margin_beyond_fp32_is_read() -> None:
    assert parse_record(PAIR | {"margin": 1e39}).content["margin"] == 1e39
