"""What is tokenised in the event loop takes no longer there than its few characters say."""

from __future__ import annotations

from typing import Any

import pytest

from forge_ray.serve.fields import ChatRequest, CompletionRequest
from forge_ray.serve.short import MAX_CHARACTERS, MAX_TEXTS, is_short

pytestmark = pytest.mark.unit
HI: dict[str, Any] = {"role": "user", "content": "hi"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL: dict[str, Any] = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def chat(*messages: dict[str, Any], **more: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [*messages], **more})


def test_a_few_plain_texts_are_short() -> None:
    assert is_short(chat({"role": "system", "content": "Be brief."}, HI))
    assert is_short(chat({**HI, "content": "x" * MAX_CHARACTERS}, temperature=0, max_tokens=5, n=2))
    assert is_short(CompletionRequest(model="m", prompt=["a", "b"]))
    assert is_short(CompletionRequest(model="m", prompt=[1] * MAX_CHARACTERS))


@pytest.mark.parametrize(
    ("messages", "more"),
    [
        ([{**HI, "content": "x" * (MAX_CHARACTERS + 1)}], {}),
        ([HI, {"role": "assistant", "content": "x"}] * MAX_TEXTS, {}),
        ([HI], {"tools": [TOOL]}),
        ([HI], {"response_format": {"type": "json_object"}}),
        ([HI], {"reasoning_effort": "low"}),
        ([HI], {"chat_template_kwargs": {"date_string": "today"}}),
        ([{**HI, "content": "a <|im_end|> b"}], {}),
        ([{**HI, "content": "[INST]"}], {}),
        ([{**HI, "name": "x" * 60}], {}),
        ([{**HI, "content": [{"type": "text", "text": "hi"}]}], {}),
        ([HI, {"role": "assistant", "content": "x", "reasoning_content": "y"}, HI], {}),
        ([HI, {"role": "assistant", "content": "x", "prefix": True}], {}),
        (
            [HI, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "call00001", "content": ""}],
            {},
        ),
    ],
)
def test_what_may_take_longer_is_not(messages: list[dict[str, Any]], more: dict[str, Any]) -> None:
    assert not is_short(chat(*messages, **more))


def test_many_or_long_prompts_are_not() -> None:
    assert not is_short(CompletionRequest(model="m", prompt=["a"] * (MAX_TEXTS + 1)))
    assert not is_short(CompletionRequest(model="m", prompt=[[1] * MAX_CHARACTERS, [1]]))
    assert not is_short(CompletionRequest(model="m", prompt="a < b"))
