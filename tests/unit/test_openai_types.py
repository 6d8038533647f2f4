"""The wire formats: a field is honoured or refused by name, never ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest

from forge_ray.serve.openai import (
    NO_OP,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Reply,
    parse_request,
    sse,
    usage,
)

pytestmark = pytest.mark.unit

CHAT: dict[str, Any] = {"model": "bot", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "bot", "prompt": "hi"}


def chat(**more: Any) -> ChatRequest:
    return parse_request(ChatRequest, json.dumps(CHAT | more).encode())


def refusal(model: Any, body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_request(model, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value


def test_defaults() -> None:
    request = chat()
    assert (request.temperature, request.top_p, request.seed, request.stops) == (None, None, None, ())
    assert request.token_limit == ("max_tokens", None)
    assert parse_request(CompletionRequest, json.dumps(TEXT).encode()).token_limit == ("max_tokens", 16)


def test_supported_fields_arrive() -> None:
    request = chat(
        max_completion_tokens=5,
        temperature=0,
        top_p=0.5,
        seed=-3,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
    )
    assert request.token_limit == ("max_completion_tokens", 5)
    assert (request.temperature, request.top_p, request.seed) == (0, 0.5, -3)
    assert request.stops == ("a", "b")
    assert request.include_usage
    assert chat(stop="one").stops == ("one",)


def test_text_parts_are_joined_and_a_tools_answer_keeps_its_id() -> None:
    request = chat(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []},
            {"role": "tool", "content": "d", "tool_call_id": "call_1"},
        ]
    )
    assert [message.for_template() for message in request.messages] == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "d", "tool_call_id": "call_1"},
    ]


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in NO_OP.items() for value in (None, *values)])
def test_a_value_that_asks_for_nothing_is_accepted(field: str, value: Any) -> None:
    assert chat(**{field: value}) == chat()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", True),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logprobs", True),
        ("logprobs", 0),
        ("top_logprobs", 3),
        ("logit_bias", {"1": 5}),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("user", "me"),
        ("metadata", {"a": "b"}),
        ("best_of", 2),
    ],
)
def test_a_field_that_is_not_offered_is_refused(field: str, value: Any) -> None:
    error = refusal(ChatRequest, CHAT | {field: value})
    assert (error.param, error.code) == (field, "unsupported_parameter")
    assert field in error.message


def test_an_unknown_field_is_refused_even_if_null() -> None:
    assert refusal(ChatRequest, CHAT | {"top_k": None}).param == "top_k"
    assert refusal(ChatRequest, CHAT | {"top_k": 5}).code == "unknown_parameter"
    assert refusal(CompletionRequest, TEXT | {"messages": []}).param == "messages"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages.0"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 1 << 63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"chunked": True}}, "stream_options.chunked"),
    ],
)
def test_a_wrong_value_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    error = refusal(ChatRequest, CHAT | change)
    assert (error.param or "").startswith(param)
    assert error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_field_is_named(missing: str) -> None:
    body = {key: value for key, value in CHAT.items() if key != missing}
    assert refusal(ChatRequest, body).param == missing


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    assert refusal(ChatRequest, body).param is None


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [1, "a"], [[1]], 5])
def test_only_one_prompt(prompt: Any) -> None:
    assert (refusal(CompletionRequest, {"model": "bot", "prompt": prompt}).param or "").startswith("prompt")


def test_error_shape() -> None:
    assert ApiError(404, "no such model", "model", "model_not_found").body() == {
        "error": {"message": "no such model", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    }
    assert ApiError(503, "down").body()["error"]["type"] == "server_error"


def test_replies_parse_as_openais_own_types() -> None:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    for kind, whole, piece in (("chat", ChatCompletion, ChatCompletionChunk), ("text", Completion, Completion)):
        reply = Reply(kind, "bot", "fp_1")  # type: ignore[arg-type]
        assert whole.model_validate(reply.whole("hi", "stop", usage(3, 4))).usage.total_tokens == 7
        chunks = [reply.chunk("", first=True), reply.chunk("hi"), reply.usage_chunk(usage(1, 1))]
        assert len({piece.model_validate(chunk).id for chunk in chunks if kind == "chat"}) <= 1
    assert Reply("chat", "bot", "fp").chunk("", first=True)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert Reply("chat", "bot", "fp").chunk("", "stop")["choices"][0]["delta"] == {}


def test_server_sent_events_keep_characters_and_lines() -> None:
    assert sse("[DONE]") == b"data: [DONE]\n\n"
    assert sse({"a": "é\n"}) == 'data: {"a":"é\\n"}\n\n'.encode()
