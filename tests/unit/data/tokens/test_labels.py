"""The documents of `data.form: labels`."""

from __future__ import annotations

from typing import Any

import pytest

from forge_ray.data.record.schema import DataRecord, Reject, parse_record
from forge_ray.data.tokens.chat import encode_batch, prompt_ids
from forge_ray.data.tokens.labels import NO_LABEL, PAD_AT_END, label_text
from tests.conftest import tiny_tokenizer

pytestmark = pytest.mark.unit
ROW = {"text": "How do I reset my password?", "label": "accounts"}


def encoded(row: dict[str, Any], length: int = 64, overlong: str = "reject", tokenizer: Any = None) -> Any:
    (result,) = encode_batch(tokenizer or tiny_tokenizer(), [parse_record(row)], length, overlong, form="labels")
    return result


def test_the_document_is_what_serving_sends_and_its_last_token_is_read() -> None:
    (document,) = encoded(ROW)
    assert document.ids.tolist() == prompt_ids(tiny_tokenizer(), [{"role": "user", "content": ROW["text"]}])
    assert document.loss_mask.tolist() == [0] * (len(document.ids) - 1) + [1]
    assert not document.truncated


def test_the_label_is_the_last_answer() -> None:
    assert label_text(parse_record(ROW).content) == "accounts"
    several = parse_record({"text": "x", "labels": {"team": "cards", "urgent": ["a", "b"]}})
    assert label_text(several.content) == '{"team": "cards", "urgent": "a, b"}'


def test_long_prompts_go_by_overlong() -> None:
    assert str(encoded(ROW, 10)) == "longer than sequence_length"
    (document,) = encoded(ROW, 10, "truncate")
    assert len(document.ids) == 10
    assert document.truncated
    assert document.loss_mask[-1] == 1


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a text alone"},
        {"messages": [{"role": "user", "content": "?"}], "chosen": "a", "rejected": "b"},
    ],
)
def test_rows_without_a_label_are_rejected(row: dict[str, Any]) -> None:
    assert str(encoded(row)) == NO_LABEL


def test_calls_are_no_label() -> None:
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x", "tool_calls": [call]}]
    (result,) = encode_batch(tiny_tokenizer(), [DataRecord({"messages": turns})], 64, "reject", form="labels")
    assert str(result) == NO_LABEL


def test_a_prompt_that_ends_with_the_pad_token_is_rejected() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|pad|>"
    result = encoded(ROW, tokenizer=tokenizer)
    assert isinstance(result, Reject)
    assert str(result) == PAD_AT_END
