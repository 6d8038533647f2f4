"""Messages as programs export them: roles by other names, reasoning in many spellings, keys that say nothing."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from forge_ray.config.data import Mapping
from forge_ray.data.record.columns import SPEAKERS
from forge_ray.data.record.normal import row_form
from forge_ray.data.record.schema import DataRecord, Reject, parse_record, texts, with_texts

pytestmark = pytest.mark.unit
Row = dict[str, Any]
USER: Row = {"role": "user", "content": "2+2?"}
ANSWER: Row = {"role": "assistant", "content": "4"}
PLAIN = parse_record({"messages": [USER, ANSWER]})


def answered(**fields: Any) -> DataRecord:
    return parse_record({"messages": [USER, ANSWER | fields]})


def reason_of(row: Any) -> str:
    with pytest.raises(Reject) as error:
        parse_record(row)
    return str(error.value)


# ---------------------------------------------------------------- roles


@pytest.mark.parametrize("name", [name for name, role in SPEAKERS.items() if role == "assistant"])
def test_names_of_roles_in_any_case_are_one_record(name: str) -> None:
    for role, asker in itertools.product((name, name.upper(), name.title(), f" {name} "), ("user", "Human", "USER")):
        for messages in (
            [{"role": asker, "content": "2+2?"}, {"role": role, "content": "4"}],
            [{"from": asker, "value": "2+2?"}, {"from": role, "value": "4"}],
            [{"from": asker, "content": "2+2?"}, {"role": role, "value": "4"}],
        ):
            assert parse_record({"messages": messages}) == PLAIN
            assert parse_record({"conversations": messages}) == PLAIN


def test_assistants_by_other_names_in_a_prompt_are_not_trained() -> None:
    prompt = [{"role": "Human", "content": "a"}, {"from": "bing", "value": "b"}, {"role": "USER", "content": "2+2?"}]
    messages = parse_record({"prompt": prompt, "completion": "4"}).messages
    assert [message.get("weight", 1) for message in messages] == [1, 0, 1, 1]
    labelled = parse_record({"messages": [{"role": "Human", "content": "a"}], "labels": {"mood": "calm"}})
    assert labelled.messages[-1] == {"role": "assistant", "content": "calm"}


def test_a_greeting_stays_in_the_context_untrained() -> None:
    greeting = {"role": "assistant", "content": "Hello!"}
    system = {"role": "system", "content": "Be brief."}
    for before in ([greeting], [system, greeting], [greeting, system]):
        messages = parse_record({"messages": [*before, USER, ANSWER]}).messages
        assert [message.get("weight", 1) for message in messages if message["role"] == "assistant"] == [0, 1]
    assert parse_record({"messages": [greeting | {"weight": 0}, USER, ANSWER]}) == parse_record(
        {"messages": [greeting | {"weight": 1}, USER, ANSWER]}
    )


def test_system_messages_may_stand_anywhere() -> None:
    row = {"messages": [USER, ANSWER, {"role": "system", "content": "Now in French."}, USER, ANSWER]}
    assert parse_record(row).content == row


@pytest.mark.parametrize("name", ["loss", "train", "weight"])
@pytest.mark.parametrize("value", [True, False, 1, 0, 1.0, 0.0, None])
def test_loss_and_train_are_the_weight(name: str, value: Any) -> None:
    if name == "weight" and isinstance(value, bool):
        return
    row = {"messages": [USER, ANSWER | {name: value}, USER, ANSWER]}
    assert parse_record(row).messages[1].get("weight", 1) == (1 if value is None else value)


def test_messages_as_text_and_as_an_object_of_lists() -> None:
    messages = PLAIN.content["messages"]
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    for row in (
        {"messages": json.dumps(messages)},
        {"messages": {"role": ["user", "assistant"], "content": ["2+2?", "4"]}},
        {"conversations": json.dumps(turns, indent=1)},
        {"conversations": {"from": ["human", "gpt"], "value": ["2+2?", "4"]}},
    ):
        assert parse_record(row) == PLAIN
        assert parse_record({"log": next(iter(row.values()))}, mapping=Mapping(messages="log")) == PLAIN
    assert reason_of({"messages": "[{]"}) == "`messages` is not a non-empty list: a string"
    assert reason_of({"messages": {"role": ["user"], "content": []}}) == "`messages` is not a non-empty list: an object"


# ---------------------------------------------------------------- keys that carry nothing


@pytest.mark.parametrize(
    "fields",
    [
        {"annotations": [], "audio": None, "refusal": None, "function_call": None, "tool_calls": []},
        {"annotations": None, "reasoning": "", "reasoning_content": None, "thinking": [], "refusal": ""},
        {"id": "msg_1", "status": "completed", "type": "message", "created_at": 1, "markdown": "**4**"},
        {"provider_specific_fields": {"a": 1}, "logprobs": None, "prefix": False, "thinking_blocks": None},
        {"content": [{"type": "output_text", "text": "4", "annotations": [], "logprobs": []}]},
    ],
)
def test_keys_that_carry_nothing_are_ignored(fields: Row) -> None:
    assert answered(**fields) == PLAIN


def test_exports_are_the_conversation_and_its_answer() -> None:
    call = {"id": "chatcmpl-tool-1", "type": "function", "index": 0, "function": {"name": "add", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "refusal": None, "audio": None, "tool_calls": [call], "reasoning": "hm"}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls", "stop_reason": None}
    tools = [{"type": "function", "function": {"name": "add"}}]
    request = {"model": "m", "messages": [USER, ANSWER, USER], "tools": tools, "temperature": 0}
    response = {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": {"total_tokens": 9}}
    expected = {
        "messages": [
            USER, ANSWER | {"weight": 0}, USER,
            {
                "role": "assistant", "reasoning_content": "hm",
                "tool_calls": [{"id": "chatcmpl-tool-1", "type": "function", "function": call["function"]}],
            },
        ],
        "tools": tools,
    }  # fmt: skip
    for row in (
        {"request": request, "response": response},
        {"request": {"method": "POST", "body": request}, "response": {"status_code": 200, "body": response}},
        request | response,
        request | {"response": response},
    ):
        assert parse_record(row).content == expected
    two = request | {"choices": [choice, choice]}
    assert reason_of(two) == "`choices` is not one answer with a `message`: 2 of them"


# ---------------------------------------------------------------- reasoning

THOUGHT = parse_record({"messages": [USER, ANSWER | {"reasoning_content": "two and two"}]})


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "\ntwo and two\n", "content": "\n\n4"},
        {"reasoning": "two and two"},
        {"thinking": "two and two"},
        {"thinking": "two and two", "reasoning": "two and two"},
        {"content": "<think>two and two</think>4"},
        {"content": "<think>\ntwo and two\n</think>\n\n4"},
        {"content": "<think>two and two</think>4", "reasoning": "two and two"},
        {"content": "<think></think><think>two and two</think>\n4"},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "two and two"}]},
                {"type": "text", "text": "4"},
            ]
        },
        {
            "content": [
                {"type": "thinking", "thinking": "two ", "signature": "x"},
                {"type": "reasoning", "text": "and two"},
                {"type": "text", "text": "4"},
            ]
        },
        {"reasoning": "two and two", "reasoning_details": [{"type": "reasoning.text", "text": "two", "index": 0}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "two and two", "signature": "x"}]},
    ],
    ids=range(12),
)
def test_reasoning_is_one_thing_in_every_spelling(fields: Row) -> None:
    assert answered(**fields) == THOUGHT
    assert THOUGHT.messages[1] == ANSWER | {"reasoning_content": "two and two"}
    assert parse_record(json.loads(THOUGHT.json)) == THOUGHT


def test_empty_reasoning_is_none() -> None:
    for fields in (
        {"content": "<think>\n\n</think>\n\n4"},
        {"reasoning": " \n"},
        {"thinking": [{"type": "text", "text": ""}]},
    ):
        assert answered(**fields) == PLAIN


def test_tags_elsewhere_stay_text() -> None:
    for content in ("4 <think>x</think>", "<think>unclosed", "`<think>x</think>`"):
        assert answered(content=content).messages[1] == {"role": "assistant", "content": content}
    asked = {"role": "user", "content": "<think>what does this tag do?</think>"}
    assert parse_record({"messages": [asked, ANSWER]}).messages[0] == asked


def test_text_behind_reasoning_keeps_its_indent() -> None:
    assert answered(content="<think>x</think>\n\n    return 4").messages[1]["content"] == "    return 4"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"reasoning": "a", "thinking": "b"},
            "a message has reasoning twice, and not the same: `reasoning` and `thinking`",
        ),
        (
            {"reasoning": "a", "content": "<think>b</think>4"},
            "a message has reasoning twice, and not the same: `reasoning` and `<think>`",
        ),
        (
            {"reasoning_content": "a", "content": [{"type": "thinking", "thinking": "a"}, {"type": "text", "text": "4"}]},
            "a message has reasoning twice: `reasoning_content` and a content part",
        ),
        ({"reasoning": 7}, "a message's `reasoning` is not a text: a number"),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
         "a message's `reasoning_details` is not a text: 'reasoning.encrypted'"),
        ({"content": "<think>a</think>\n"}, "an assistant turn is empty"),
        ({"content": [{"type": "text", "text": "4"}, {"type": "thinking", "thinking": "a"}]},
         "a content part of type 'thinking' comes after the answer began"),
    ],
    ids=range(7),
)  # fmt: skip
def test_reasoning_that_would_be_a_guess_is_refused(fields: Row, reason: str) -> None:
    assert reason_of({"messages": [USER, ANSWER | fields]}) == reason


def test_reasoning_is_of_assistants_alone() -> None:
    assert reason_of({"messages": [USER | {"reasoning": "a"}, ANSWER]}) == "`reasoning` is not of an assistant turn"


def test_reasoning_is_a_text_of_the_record() -> None:
    """Curation, masking and erasure walk over these."""
    assert texts(THOUGHT) == ["2+2?", "4", "two and two"]
    assert with_texts(THOUGHT, str.upper).messages[1]["reasoning_content"] == "TWO AND TWO"
    assert row_form(THOUGHT) == "2+2? 4 two and two"


# ---------------------------------------------------------------- identity


def called(arguments: Any, **tool: Any) -> DataRecord:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    tools = [{"type": "function", "function": {"name": "add", **tool}}]
    return parse_record({"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": tools})


def test_arguments_are_one_record_whatever_their_form() -> None:
    forms = [
        '{"b": 1, "a": "é"}',
        '{"a":"\\u00e9","b":1}',
        {"a": "é", "b": 1},
        {"b": 1, "a": "é"},
        '"{\\"b\\": 1, \\"a\\": \\"é\\"}"',
    ]
    records = [called(form) for form in forms]
    assert len({record.id for record in records}) == 1
    assert {DataRecord(json.loads(record.json)).id for record in records} == {records[0].id}
    assert len({called(form).id for form in ("{}", {}, "", " ", None)}) == 1
    assert len({called(form).id for form in ('{"a": null}', {"a": None})}) == 1
    assert len({called(form).id for form in ({}, {"a": None}, {"a": 1}, {"a": "1"}, {"a": [1, 2]}, {"a": [2, 1]})}) == 6


def test_order_of_keys_is_that_of_the_source() -> None:
    record = called({"b": 1, "a": 2}, parameters={"type": "object", "properties": {"b": {}, "a": {}}})
    stored = json.loads(record.json)
    assert stored["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"b": 1, "a": 2}'
    assert list(stored["tools"][0]["function"]["parameters"]) == ["type", "properties"]
    assert list(stored["tools"][0]["function"]["parameters"]["properties"]) == ["b", "a"]
    other = called({"a": 2, "b": 1}, parameters={"properties": {"a": {}, "b": {}}, "type": "object"})
    assert other.id == record.id
