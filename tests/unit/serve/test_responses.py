"""OpenAI's /v1/responses, the part of it without state, over HTTP: its items, its events, its refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted import ids_of
from scripted_api import CALL, TEMPLATE, Api, reset, running_with

from forge_ray.errors import EngineError, RequestError

pytestmark = pytest.mark.unit

THINKING = (
    TEMPLATE.replace(
        "{{ m.content or '' }}",
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}",
    )
    + "{% if style %}{{ style }}{% endif %}"
)
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ADD = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {}}}, "strict": False}
PATH = "/v1/responses"
ALLOWED = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}


@pytest.fixture(scope="module")
def running_api(tiny_model_dir: Path) -> Iterator[Api]:
    with running_with(tiny_model_dir, THINKING) as api:
        yield api


@pytest.fixture
def api(running_api: Api) -> Api:
    return reset(running_api)


def respond(api: Api, **body: Any) -> Response:
    """The response, which conforms to OpenAI's own type."""
    response = api.post(PATH, **{"input": "hi", **body})
    assert response.status_code == 200, response.text
    return Response.model_validate(response.json(), strict=True)


def refused(api: Api, **body: Any) -> Any:
    return api.refused(PATH, **{"input": "hi", **body})


def events(api: Api, **body: Any) -> list[Any]:
    """The events of a stream, each of OpenAI's own type, numbered in order and named as they are."""
    response = api.post(PATH, stream=True, **{"input": "hi", **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    pairs = [block.split("\n", 1) for block in response.text.split("\n\n") if block and not block.startswith(":")]
    payloads = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name.removeprefix("event: ") for name, _ in pairs] == [payload["type"] for payload in payloads]
    assert [payload["sequence_number"] for payload in payloads] == list(range(len(payloads)))
    return [EVENT.validate_python(payload) for payload in payloads]


def prompt_text(api: Api) -> str:
    return api.tokenizer.decode(api.asked().prompt_ids)


# ---------------------------------------------------------------- requests


def test_a_text_and_a_list_of_items(api: Api) -> None:
    respond(api, instructions="Be brief.", input="hi", max_output_tokens=7, temperature=0, top_p=0.5, user="b")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert list(api.asked().prompt_ids) == api.tokenizer.prompt_ids(turns)
    asked = api.asked()
    assert (asked.max_new_tokens, asked.temperature, asked.top_p, asked.adapter) == (7, 0, 0.5, "adapter-2")
    parts = [{"type": "input_text", "text": "h"}, {"type": "input_text", "text": "i"}]
    respond(
        api, input=[{"role": "developer", "content": "Be brief."}, {"type": "message", "role": "user", "content": parts}]
    )
    assert list(api.asked().prompt_ids) == api.tokenizer.prompt_ids(turns)


def test_items_of_an_answer_are_one_turn(api: Api) -> None:
    items = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "call_2", "name": "add", "arguments": '{"a": 2}', "status": "completed"},
        {"type": "function_call_output", "call_id": "call_1", "output": "3"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "4"}]},
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "So."}], "encrypted_content": None},
        {"role": "assistant", "content": "Seven."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Sure?"},
    ]
    respond(api, input=items, tools=[ADD])
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": "add", "arguments": f'{{"a": {n}}}'}} for n in (1, 2)
    ]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
        {"role": "tool", "tool_call_id": "call_2", "content": "4"},
        {"role": "assistant", "content": "Seven.", "reasoning_content": "So."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Sure?"},
    ]
    tools = [{"type": "function", "function": {key: value for key, value in ADD.items() if key not in ("type", "strict")}}]
    assert list(api.asked().prompt_ids) == api.tokenizer.prompt_ids(turns, tools)


@pytest.mark.parametrize(
    ("sent", "schema"),
    [
        ({"format": {"type": "text"}, "verbosity": "medium"}, ""),
        ({"format": {"type": "json_object"}}, '{"type": "object"}'),
        (
            {"format": {"type": "json_schema", "name": "n", "schema": {"type": "integer"}, "strict": True}},
            '{"type": "integer"}',
        ),
    ],
)
def test_formats_reach_the_engine(api: Api, sent: Any, schema: str) -> None:
    assert respond(api, text=sent).text is not None
    assert api.asked().json_schema == schema


@pytest.mark.parametrize(
    "sent",
    [
        {"store": False, "previous_response_id": None, "conversation": None, "background": False, "truncation": "disabled"},
        {
            "store": None,
            "include": ["reasoning.encrypted_content"],
            "metadata": None,
            "prompt": None,
            "max_tool_calls": None,
        },
        {"reasoning": {"effort": "none", "summary": "auto"}, "include": [], "top_logprobs": 0},
        {"prompt_cache_key": "k", "safety_identifier": "s", "service_tier": "auto", "prompt_cache_retention": "24h"},
        {"tool_choice": "auto", "tools": [], "parallel_tool_calls": True},
        {"include": ["web_search_call.results", "reasoning.encrypted_content"], "moderation": None},
        {"prompt_cache_options": {"mode": "explicit", "ttl": "12h"}, "reasoning": {"context": "auto", "mode": "standard"}},
        {"access_programs": None, "background_options": {}, "image": {}, "moderation": None},
    ],
)
def test_what_asks_for_nothing_is_accepted(api: Api, sent: dict[str, Any]) -> None:
    respond(api, **sent)
    assert list(api.asked().prompt_ids) == api.tokenizer.prompt_ids([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include.0"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
        ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 64000}, "max_output_tokens"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": "x " * 5000}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input.0"),
        ({"input": ["hi"]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0.type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}]}, "input.0.encrypted_content"),
        ({"input": [{"type": "function_call", "call_id": "c", "arguments": "{}"}]}, "input.0.name"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "name": "has blanks"}]}, "tools.0.name"),
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "name": "divide"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {**ALLOWED, "tools": [{"type": "function", "name": "divide"}]}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {**ALLOWED, "tools": []}}, "tool_choice.tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}, "verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_object"}}, "tools": [ADD]}, "text.format"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(api: Api, sent: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        error = refused(api, **sent, stream=stream)
        assert error["param"] == param
        assert param in error["message"] or param == "input"
    assert not api.engine.requests


def test_an_item_by_its_id_is_refused_with_the_remedy(api: Api) -> None:
    error = refused(api, input=[{"role": "user", "content": "hi"}, {"type": "item_reference", "id": "msg_1"}])
    assert error["param"] == "input.1"
    assert "send the whole conversation" in error["message"]
    assert "`store: false`" in error["message"]


def test_a_refusal_and_marks_of_another_server_come_back(api: Api) -> None:
    breakpoint_ = {"type": "input_text", "text": "hi", "prompt_cache_breakpoint": {"mode": "explicit"}}
    direct = {"caller": {"type": "direct"}, "namespace": None}
    logprob = {"token": "N", "bytes": [78], "logprob": -0.5, "top_logprobs": []}
    items = [
        {"role": "user", "content": [breakpoint_]},
        {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": "{}", **direct},
        {"type": "function_call_output", "call_id": "call_1", "output": "3", **direct},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "phase": "commentary"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "N", "logprobs": [logprob], "annotations": []}]},
        {"role": "user", "content": "Sure?"},
    ]
    respond(api, input=items, tools=[ADD | {"allowed_callers": ["direct"], "defer_loading": False}])
    assert "assistant\nNo.<|im_end|>\n<|im_start|>assistant\nN<|im_end|>" in prompt_text(api)


def test_a_schema_that_the_engine_refuses(api: Api) -> None:
    api.engine.script = lambda request: [RequestError("json_schema cannot be compiled: no", hint="x")]
    error = refused(api, text={"format": {"type": "json_object"}})
    assert (error["param"], error["message"]) == ("text.format", "json_schema cannot be compiled: no")


# ---------------------------------------------------------------- answers


def test_a_text(api: Api) -> None:
    response = respond(api, metadata={"k": "v"}, instructions="Be brief.")
    (item,) = response.output
    assert (item.type, response.output_text, response.status, response.error) == ("message", "hello", "completed", None)
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (
        len(api.asked().prompt_ids),
        len(ids_of(api.tokenizer, "hello")),
    )
    assert (response.metadata, response.instructions, response.model) == ({"k": "v"}, "Be brief.", "tiny")
    assert response.previous_response_id is None
    assert api.tally.closed[-1][2] == 200
    assert api.post(PATH, input="hi").headers["x-forge-model-version"] == "mv_0"


def test_reasoning_text_and_calls_are_items(api: Api) -> None:
    api.says(f"<think>\nHm.\n</think>\n\nLook: {CALL}\n{CALL}")
    response = respond(api, tools=[ADD])
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    reasoning, _, call, other = response.output
    assert reasoning.content[0].text == "Hm."  # type: ignore[union-attr, index]
    assert response.output_text == "Look: "
    assert (call.name, json.loads(call.arguments)) == ("add", {"a": 1})  # type: ignore[union-attr]
    assert call.call_id != other.call_id  # type: ignore[union-attr]
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    again = [{"role": "user", "content": "hi"}, *(item.model_dump(exclude_none=True) for item in response.output)]
    outputs = [{"type": "function_call_output", "call_id": item.call_id, "output": "2"} for item in (call, other)]  # type: ignore[union-attr]
    respond(api, input=[*again, *outputs], tools=[ADD])
    assert "<think>\nHm.\n</think>\n\nLook: <tool_call>" in prompt_text(api)


def test_a_call_that_is_required(api: Api) -> None:
    api.engine.script = lambda request: ids_of(api.tokenizer, '{"name": "add", "arguments": {"a": 1}}\n</tool_call>')
    for choice in ("required", {"type": "function", "name": "add"}):
        (call,) = respond(api, tools=[ADD], tool_choice=choice).output
        assert call.type == "function_call"
        assert api.asked().json_schema


def test_the_tools_that_may_be_called_are_those_allowed(api: Api) -> None:
    tools = [ADD, ADD | {"name": "divide"}]
    api.engine.script = lambda request: ids_of(api.tokenizer, '{"name": "add", "arguments": {"a": 1}}\n</tool_call>')
    for mode in ("required", "auto"):
        response = respond(api, tools=tools, tool_choice={**ALLOWED, "mode": mode})
        assert "divide" not in prompt_text(api) + api.asked().json_schema
        assert '"name": "add"' in prompt_text(api)
        assert bool(api.asked().json_schema) == (mode == "required")
        assert [tool.name for tool in response.tools] == ["add", "divide"]  # type: ignore[union-attr]
        assert response.tool_choice.type == "allowed_tools"  # type: ignore[union-attr]


def test_an_answer_that_is_cut(api: Api) -> None:
    api.says("one two three four five six")
    response = respond(api, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert events(api, max_output_tokens=3)[-1].type == "response.incomplete"
    assert api.post(PATH, input="hi", max_output_tokens=1025).headers["x-forge-max-tokens"] == "1024"


def test_an_answer_without_a_token_has_an_empty_text(api: Api) -> None:
    api.says("")
    assert respond(api).output_text == ""
    assert events(api)[-1].response.output_text == ""


# ---------------------------------------------------------------- streams


def test_events_of_reasoning_text_and_calls(api: Api) -> None:
    api.says(f"<think>\nHm, so.\n</think>\n\nLook: {CALL}")
    streamed = events(api, tools=[ADD])
    order: list[str] = []
    for event in streamed:
        kind = event.type.removeprefix("response.")
        if not order or order[-1] != kind:
            order.append(kind)
    text = ["output_item.added", "content_part.added", "{}.delta", "{}.done", "content_part.done", "output_item.done"]
    assert order == [
        "created",
        "in_progress",
        *(name.format("reasoning_text") for name in text),
        *(name.format("output_text") for name in text),
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    deltas = {
        kind: "".join(e.delta for e in streamed if e.type == f"response.{kind}.delta")
        for kind in ("reasoning_text", "output_text")
    }
    assert deltas == {"reasoning_text": "Hm, so.", "output_text": "Look: "}
    items = [event.item for event in streamed if event.type == "response.output_item.done"]
    final = streamed[-1].response
    assert final.output == items
    assert [item.id for item in items] == [e.item.id for e in streamed if e.type == "response.output_item.added"]
    assert {event.response.id for event in streamed if hasattr(event, "response")} == {final.id}
    assert final.usage.output_tokens == api.tally.closed[-1][1]
    whole = respond(api, tools=[ADD])
    assert [item.type for item in whole.output] == [item.type for item in final.output]
    assert whole.output_text == final.output_text


def test_an_engine_that_fails_half_way(api: Api) -> None:
    api.engine.script = lambda request: [*ids_of(api.tokenizer, "half"), EngineError("the engine died", hint="x")]
    last = events(api)[-1]
    assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", "server_error")
    assert last.response.error.message == "the engine died"
    api.engine.script = lambda request: [ValueError("secret detail")]
    assert api.refused(PATH, status=500, input="hi")["message"] == "internal error"
