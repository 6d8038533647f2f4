"""The wire formats: a field is honoured or refused by name, never ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest

from forge_ray.config.release import Limits
from forge_ray.inference.engine import Token
from forge_ray.serve.fields import ChatRequest, CompletionRequest, EmbeddingRequest, TokenizeRequest
from forge_ray.serve.openai import NO_OP, REASONS, ApiError, parse_request
from forge_ray.serve.reply import Part, Reply, sse, usage
from forge_ray.serve.text import Piece
from forge_ray.serve.tools import Call

pytestmark = pytest.mark.unit

CHAT: dict[str, Any] = {"model": "bot", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "bot", "prompt": "hi"}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("add", "multiply")
]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer"}}}
LIMITS = Limits()


def chat(**more: Any) -> ChatRequest:
    return parse_request(ChatRequest, json.dumps(CHAT | more).encode(), LIMITS)


def completion(**more: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps(TEXT | more).encode(), LIMITS)


def refusal(model: Any, body: Any, limits: Limits = LIMITS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_request(model, body if isinstance(body, bytes) else json.dumps(body).encode(), limits)
    assert caught.value.status == 400
    return caught.value


def test_defaults() -> None:
    request = chat()
    assert (request.temperature, request.top_p, request.seed, request.stops) == (None, None, None, ())
    assert request.token_limit == ("max_tokens", None)
    assert (request.num_choices, request.num_logprobs, request.offered, request.forced) == (1, None, [], [])
    assert completion().token_limit == ("max_tokens", None)


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


def test_mistral_s_names_mean_the_same() -> None:
    assert chat(random_seed=7).first_seed == chat(seed=7).first_seed == 7
    assert chat(tools=TOOLS, tool_choice="any").forced == chat(tools=TOOLS, tool_choice="required").forced != []
    assert chat(top_k=-1).top_k == -1


def test_tools_that_may_and_that_must_be_called() -> None:
    assert [tool.function.name for tool in chat(tools=TOOLS).offered] == ["add", "multiply"]
    assert (chat(tools=TOOLS).forced, chat(tools=TOOLS, tool_choice="none").offered) == ([], [])
    named = chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "multiply"}})
    assert [function.name for function in named.forced] == ["multiply"]
    assert len(named.offered) == 2


def test_formats_of_the_answer() -> None:
    assert chat(response_format={"type": "text"}).response_format.text == ""  # type: ignore[union-attr]
    assert json.loads(chat(response_format={"type": "json_object"}).response_format.text) == {"type": "object"}  # type: ignore[union-attr]
    assert json.loads(chat(response_format=SCHEMA).response_format.text) == {"type": "integer"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_one_or_several(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


def test_turns_reach_the_template_with_their_calls() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    as_object = {"id": "call_2", "function": {"name": "g", "arguments": {"b": "é"}}, "index": 1}
    request = chat(
        messages=[
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []},
            {"role": "assistant", "content": None, "tool_calls": [call, as_object]},
            {"role": "tool", "content": "d", "tool_call_id": "call_1", "name": "f"},
        ]
    )
    assert [message.for_template() for message in request.messages] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {
            "role": "assistant",
            "tool_calls": [call, {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": '{"b": "é"}'}}],
        },
        {"role": "tool", "content": "d", "tool_call_id": "call_1", "name": "f"},
    ]


OFFERED = {
    "logprobs",
    "reasoning_effort",
    "response_format",
    "tools",
    "tool_choice",
    "top_logprobs",
}  # by one endpoint and not by the other


@pytest.mark.parametrize(
    ("field", "value"), [(name, value) for name, values in NO_OP.items() if name not in OFFERED for value in (None, *values)]
)
def test_no_op_values_are_accepted(field: str, value: Any) -> None:
    assert chat(**{field: value}) == chat()


@pytest.mark.parametrize("field", sorted(OFFERED))
def test_null_is_the_default(field: str) -> None:
    assert chat(**{field: None}) == chat()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio", {"voice": "x"}),
        ("best_of", 2),
        ("best_of", True),
        ("echo", True),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("moderation", {"model": "x"}),
        ("min_tokens", 5),
        ("modalities", ["audio"]),
        ("prediction", {"type": "content", "content": "x"}),
        ("prompt_mode", "reasoning"),
        ("safe_prompt", True),
        ("store", True),
        ("suffix", "end"),
        ("verbosity", "low"),
        ("web_search_options", {}),
    ],
)
def test_a_field_that_is_not_offered_is_refused(field: str, value: Any) -> None:
    error = refusal(ChatRequest, CHAT | {field: value})
    assert (error.param, error.code) == (field, "unsupported_parameter")
    assert field in error.message
    assert REASONS.get(field, "") in error.message


def test_fields_of_the_other_endpoint_are_refused() -> None:
    assert refusal(CompletionRequest, TEXT | {"tools": TOOLS}).param == "tools"
    assert refusal(CompletionRequest, TEXT | {"response_format": {"type": "json_object"}}).param == "response_format"
    assert refusal(CompletionRequest, TEXT | {"messages": []}).code == "unknown_parameter"
    assert refusal(EmbeddingRequest, {"model": "bot", "input": "a", "dimensions": 8}).param == "dimensions"
    assert refusal(TokenizeRequest, {"model": "bot", "prompt": "a", "messages": CHAT["messages"]}).param == "prompt"


def test_an_unknown_field_is_refused_even_if_null() -> None:
    assert refusal(ChatRequest, CHAT | {"top_q": None}).param == "top_q"
    assert refusal(ChatRequest, CHAT | {"top_q": 5}).code == "unknown_parameter"


@pytest.mark.parametrize(
    ("limit", "change", "param"),
    [
        ({"max_n": 2}, {"n": 3}, "n"),
        ({"max_stops": 1}, {"stop": ["a", "b"]}, "stop"),
        ({"max_logprobs": 3}, {"logprobs": True, "top_logprobs": 4}, "top_logprobs"),
        ({"max_messages": 1}, {"messages": CHAT["messages"] * 2}, "messages"),
        ({"max_tools": 1}, {"tools": TOOLS}, "tools"),
    ],
)
def test_limits_of_the_deployment(limit: dict[str, int], change: dict[str, Any], param: str) -> None:
    assert parse_request(ChatRequest, json.dumps(CHAT | change).encode(), LIMITS)
    error = refusal(ChatRequest, CHAT | change, Limits(**limit))
    assert error.param == param
    assert str(next(iter(limit.values()))) in error.message


def test_limits_of_completions() -> None:
    assert refusal(CompletionRequest, TEXT | {"logprobs": 21}).param == "logprobs"
    assert refusal(CompletionRequest, TEXT | {"prompt": ["a"] * 65}).param == "prompt"
    assert refusal(CompletionRequest, TEXT | {"echo": True, "logprobs": 1}).param == "echo"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages.0.tool_calls.0.function"),
        ({"messages": [{"role": "user", "content": "x", "name": "n" * 65}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "x", "prefix": True}]}, "messages.0.prefix"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "content": "x", "prefix": True}, *CHAT["messages"]]}, "messages"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 1 << 63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"n": True}, "n"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 1, "random_seed": 2}, "random_seed"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"user": 5}, "user"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "has blanks"}}]}, "tools.0.function.name"),
        ({"tools": TOOLS * 2}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "divide"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": SCHEMA, "tools": TOOLS}, "response_format"),
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


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}",
        b'{"a": "\\ud800"}',
    ],
)
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    assert refusal(ChatRequest, body).param is None


@pytest.mark.parametrize("prompt", ["", [], ["a", ""], [1, "a"], [[1], []], [[1], "a"], 5])
def test_invalid_prompts_are_refused(prompt: Any) -> None:
    assert (refusal(CompletionRequest, {"model": "bot", "prompt": prompt}).param or "").startswith("prompt")


def test_error_shape() -> None:
    assert ApiError(404, "no such model", "model", "model_not_found").body() == {
        "error": {"message": "no such model", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    }
    assert ApiError(503, "down").body()["error"]["type"] == "server_error"


def test_headers_of_an_error() -> None:
    assert ApiError(429, "later", headers={"retry-after": "2"}).headers == {"retry-after": "2"}


class Letters:
    """Token 65 is A; 200 is the first byte of a longer character."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


PIECES = (
    Piece(Token(65, None, -0.5, ((65, -0.5), (66, -1.5))), 0),
    Piece(Token(200, None, float("-inf"), ((200, float("-inf")),)), 1),
)


def test_replies_parse_as_openai_s_own_types() -> None:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    part = Part("hi", (), PIECES, 2, "stop")
    chat_reply = Reply("chat", "bot", "fp_1", Letters(), 2, {"k": "v"})  # type: ignore[arg-type]
    chat_whole = ChatCompletion.model_validate(chat_reply.whole([part, part], usage(3, 4)), strict=True)
    assert chat_whole.usage is not None
    assert (chat_whole.usage.total_tokens, [choice.index for choice in chat_whole.choices]) == (7, [0, 1])
    text_reply = Reply("text", "bot", "fp_1", Letters(), 2)  # type: ignore[arg-type]
    assert Completion.model_validate(text_reply.whole([part], usage(3, 4)), strict=True).choices[0].text == "hi"
    Completion.model_validate(text_reply.chunk(1, part), strict=True)
    chunks = [chat_reply.first_chunk(0), chat_reply.chunk(0, part), chat_reply.usage_chunk(usage(1, 1))]
    assert len({ChatCompletionChunk.model_validate(chunk, strict=True).id for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chat_reply.chunk(0, Part(finish_reason="stop"))["choices"][0]["delta"] == {}
    assert chat_reply.whole([part], usage(1, 1))["metadata"] == chunks[0]["metadata"] == {"k": "v"}


def test_log_probabilities_of_a_chat_and_of_a_text() -> None:
    part = Part("A", (), PIECES, 2, "stop")
    content = Reply("chat", "b", "f", Letters(), 2).whole([part], usage(1, 2))["choices"][0]["logprobs"]["content"]  # type: ignore[arg-type]
    assert content[0] == {
        "token": "A",
        "bytes": [65],
        "logprob": -0.5,
        "top_logprobs": [
            {"token": "A", "bytes": [65], "logprob": -0.5},
            {"token": "B", "bytes": [66], "logprob": -1.5},
        ],
    }
    assert (content[1]["bytes"], content[1]["token"], content[1]["logprob"]) == ([200], "\ufffd", -9999.0)
    columns = Reply("text", "b", "f", Letters(), 2).whole([part], usage(1, 2))["choices"][0]["logprobs"]  # type: ignore[arg-type]
    assert columns == {
        "tokens": ["A", "bytes:\\xc8"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"A": -0.5, "B": -1.5}, {"bytes:\\xc8": -9999.0}],
        "text_offset": [0, 1],
    }


def test_calls_in_an_answer_and_in_a_stream() -> None:
    part = Part("", (Call("abcdefghi", "add", '{"a": 1}'),), (), 5, "tool_calls")
    expected = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    message = Reply("chat", "b", "f").whole([part], usage(1, 5))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": None, "refusal": None, "tool_calls": [expected]}
    delta = Reply("chat", "b", "f").chunk(0, part, num_calls=2)["choices"][0]["delta"]
    assert delta == {"tool_calls": [{"index": 2} | expected]}


def test_server_sent_events_keep_characters_and_lines() -> None:
    assert sse("[DONE]") == b"data: [DONE]\n\n"
    assert sse({"a": "é\n"}) == 'data: {"a":"é\\n"}\n\n'.encode()


def test_characters_that_some_clients_take_for_line_ends_are_escaped() -> None:
    text = "a\u2028b\u2029c\x85d\r\ne"
    event = sse({"text": text}, "response.created")
    assert event.decode().splitlines() == ["event: response.created", event.decode().splitlines()[1], ""]
    assert json.loads(event.decode().splitlines()[1].removeprefix("data: ")) == {"text": text}
