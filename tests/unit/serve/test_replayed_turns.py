"""Conversations as clients send them back, over HTTP: read as what they mean, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from scripted_api import TEMPLATE, TOOLS, USER, Api, reset, running_with

from forge_ray.data.tokens.mistral import load_mistral
from forge_ray.serve.fields import Message
from forge_ray.serve.prompt import chat_ids
from forge_ray.serve.replayed import as_ours, is_empty
from forge_ray.serve.tool_fields import Tool

pytestmark = pytest.mark.unit

THINKING = TEMPLATE.replace(
    "{{ m.content or '' }}",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}",
).replace("<|im_start|>{{ m.role }}", "<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}")
THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "First "}, {"type": "text", "text": "add."}]}


@pytest.fixture(scope="module")
def running_api(tiny_model_dir: Path) -> Iterator[Api]:
    with running_with(tiny_model_dir, THINKING) as api:
        yield api


@pytest.fixture
def api(running_api: Api) -> Api:
    return reset(running_api)


def conversation(**answer: Any) -> list[dict[str, Any]]:
    return [*USER, {"role": "assistant", "content": "Three.", **answer}, {"role": "user", "content": "Sure?"}]


def prompt_text(api: Api) -> str:
    return api.tokenizer.decode(api.asked().prompt_ids)


@pytest.mark.parametrize(
    "answer",
    [
        {"reasoning_content": "First add."},
        {"reasoning": "First add."},
        {"thinking": "First add."},
        {"reasoning_content": "First add.", "reasoning": "First add.", "thinking": ""},
        {"reasoning_details": [{"type": "reasoning.text", "text": "First add.", "format": "x", "index": 0, "id": None}]},
        {"reasoning": "First add.", "reasoning_details": [{"type": "reasoning.summary", "summary": "First\nadd."}]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "First add.", "signature": "c2ln"}]},
        {
            "provider_specific_fields": {"reasoning_content": "First add.", "refusal": None},
            "reasoning_content": "First add.",
        },
        {"content": [THOUGHT, {"type": "text", "text": "Three."}]},
        {
            "content": [
                {"type": "thinking", "thinking": "First add.", "signature": "c2ln"},
                {"type": "text", "text": "Three."},
            ]
        },
        {"content": [THOUGHT | {"closed": True}, {"type": "text", "text": "Three."}], "reasoning_content": "First add."},
        {"content": "<think>\nFirst add.\n</think>\n\nThree."},
    ],
)
def test_reasoning_is_one_thing_under_every_name(api: Api, answer: Any) -> None:
    api.chat(messages=conversation(**answer))
    assert "<|im_start|>assistant\n<think>\nFirst add.\n</think>\n\nThree.<|im_end|>" in prompt_text(api)


@pytest.mark.parametrize(
    "answer",
    [
        {"reasoning_content": ""},
        {"reasoning_content": None, "reasoning": None, "thinking": None},
        {"reasoning_details": [], "thinking_blocks": None},
        {"reasoning_details": None, "thinking_blocks": []},
        {"provider_specific_fields": {}},
        {"provider_specific_fields": {"refusal": None, "citations": [], "nested": {"a": ""}}},
        {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": []},
        {"refusal": "", "annotations": None, "audio": {}, "tool_calls": None, "name": "", "prefix": False},
        {"images": [], "citations": None, "extra_content": {}, "cache_control": {"type": "ephemeral"}},
        {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "Three."}]},
        {"content": [{"type": "text", "text": "Three.", "cache_control": {"type": "ephemeral"}, "annotations": []}]},
        {"content": [{"type": "text", "text": "Thr", "id": None}, {"type": "text", "text": "ee."}]},
        {"content": "<think>\n\n</think>\n\nThree."},
        {"content": [{"type": "text", "text": "Three.", "prompt_cache_breakpoint": {"mode": "explicit"}}]},
        {"content": None, "refusal": "Three."},
        {"content": [{"type": "refusal", "refusal": "Three."}]},
    ],
)
def test_what_is_empty_asks_for_nothing(api: Api, answer: Any) -> None:
    api.chat(messages=conversation(**answer))
    assert list(api.asked().prompt_ids) == api.tokenizer.prompt_ids(conversation())


@pytest.mark.parametrize(
    ("answer", "param"),
    [
        ({"refusal": "No."}, "messages.1.refusal"),
        ({"annotations": [{"type": "url_citation", "url_citation": {"url": "x"}}]}, "messages.1.annotations"),
        ({"audio": {"id": "audio_1"}}, "messages.1.audio"),
        ({"content": None, "refusal": 5}, "messages.1.refusal"),
        ({"content": [{"type": "refusal", "refusal": 5}]}, "messages.1.content.0.text"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "messages.1.function_call"),
        ({"provider_specific_fields": {"citations": ["x"]}}, "messages.1.provider_specific_fields"),
        ({"reasoning": "a", "reasoning_content": "b"}, "messages.1.reasoning"),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}, "messages.1.reasoning_details.0"),
        ({"thinking_blocks": [{"type": "redacted_thinking", "data": "x"}]}, "messages.1.thinking_blocks.0"),
        ({"reasoning_content": 5}, "messages.1.reasoning_content"),
        ({"content": [{"type": "redacted_thinking", "data": "x"}]}, "messages.1.content.0"),
        ({"content": [{"type": "thinking", "thinking": [{"type": "reference"}]}]}, "messages.1.content.0"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.1.content.0.type"),
        ({"content": [{"type": "text", "text": "x", "annotations": [1]}]}, "messages.1.content.0.annotations"),
        ({"name": "n" * 65}, "messages.1.name"),
    ],
)
def test_what_asks_for_something_is_refused_by_name(api: Api, answer: Any, param: str) -> None:
    error = api.refused(messages=conversation(**answer))
    assert error["param"] == param
    assert error["message"].startswith(param)
    assert not api.engine.requests


def test_reasoning_belongs_to_the_assistant(api: Api) -> None:
    error = api.refused(messages=[{"role": "user", "content": "hi", "thinking": "hm"}])
    assert error["param"] == "messages.0.reasoning_content"


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_a_name_is_given_to_the_template(api: Api, role: str) -> None:
    name = "ops bot/7"
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    before = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}] if role == "tool" else []
    more = {"tool_call_id": "call_1"} if role == "tool" else {}
    api.chat(
        messages=[*before, {"role": role, "content": "x", "name": name, **more}, *USER], tools=TOOLS if before else None
    )
    written = "system" if role == "developer" else role
    assert f"<|im_start|>{written} {name}\nx<|im_end|>" in prompt_text(api)


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_content_may_be_parts_in_every_role(api: Api, role: str) -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    api.chat(messages=[{"role": role, "content": parts}, *USER])
    assert "\nab<|im_end|>" in prompt_text(api)


@pytest.mark.parametrize(
    "ids",
    [("call_a1", "call_b2"), ("toolu_01A", "toolu_01B"), ("functions.add:0", "functions.add:1"), ("", ""), (None, None)],
)
@pytest.mark.parametrize("content", [None, "", [], "Let me see."])
def test_calls_of_any_server_come_back(api: Api, ids: tuple[str | None, str | None], content: Any) -> None:
    calls = [
        {"id": name, "type": "function", "function": {"name": "add", "arguments": arguments}, "index": None, "extra": {}}
        for name, arguments in zip(ids, ('{"a": 1}', {"a": 2}), strict=True)
    ]
    results = [{"role": "tool", "tool_call_id": name, "content": text} for name, text in zip(ids, ("r1", "r2"), strict=True)]
    api.chat(messages=[*USER, {"role": "assistant", "content": content, "tool_calls": calls}, *results], tools=TOOLS)
    text = prompt_text(api)
    assert text.index('"a": 1') < text.index('"a": 2') < text.index("r1") < text.index("r2")


def test_a_call_without_arguments_and_a_result_without_content(api: Api) -> None:
    for arguments in ("", None, {}, "{}"):
        call = {"id": "call_1", "function": {"name": "add", "arguments": arguments}}
        result = {"role": "tool", "tool_call_id": "call_1", "content": None}
        api.chat(messages=[*USER, {"role": "assistant", "tool_calls": [call]}, result], tools=TOOLS)
        assert '"arguments": {}' in prompt_text(api)


def test_arguments_keep_what_is_false_or_empty() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": {"sure": False, "text": "", "none": None}}}
    turn = as_ours({"role": "assistant", "tool_calls": [call]})
    assert turn["tool_calls"][0]["function"]["arguments"] == '{"sure": false, "text": "", "none": null}'
    assert is_empty({"sure": False, "text": "", "none": None, "list": [{}]})
    assert not is_empty({"number": 0})


def test_an_answer_that_was_reasoning_alone_comes_back(api: Api) -> None:
    api.says("<think>\nHm.")
    message = api.chat()["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm."
    for content in ("", None):
        api.chat(messages=conversation(content=content, reasoning_content="Hm."))
        assert "<think>\nHm.\n</think>" in prompt_text(api)


def test_an_answer_is_replayed_as_it_was_sent(api: Api) -> None:
    api.says("<think>\nFirst add.\n</think>\n\nThree.")
    message = api.chat()["choices"][0]["message"]
    api.chat(messages=[*USER, message, {"role": "user", "content": "Sure?"}])
    expected = api.tokenizer.prompt_ids(conversation(reasoning_content="First add."))
    assert list(api.asked().prompt_ids) == expected


@pytest.mark.parametrize("file", ["tekken_240911.json", "mistral_instruct_tokenizer_241114.model.v7"])
@pytest.mark.parametrize("ids", [("call_1", "call_2"), ("toolu_01A", "toolu_01B"), (None, None)])
def test_mistral_s_own_tokenizers_take_turns_of_other_servers(file: str, ids: tuple[str | None, str | None]) -> None:
    tokenizer = load_mistral(Path(mistral_common.__file__).parent / "data" / file)
    calls = [{"id": name, "function": {"name": "add", "arguments": "{}"}} for name in ids]
    results = [{"role": "tool", "tool_call_id": name, "content": text} for name, text in zip(ids, ("r1", "r2"), strict=True)]
    more = {"name": "ops bot", "reasoning_content": "Hm.", "refusal": None}
    messages = [
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": calls, **more},
        *results,
        {"role": "assistant", "content": "Three.", **more},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    tools = [Tool.model_validate(tool) for tool in TOOLS]
    text = tokenizer.decode(chat_ids(tokenizer, [Message.model_validate(message) for message in messages], tools))
    assert text.index("r1") < text.index("r2") < text.index("Three.") < text.index("Sure?")
    assert "Hm." not in text  # these have no place for it


def test_requests_of_open_webui(api: Api) -> None:
    """What its router for OpenAI's API sends: the list of models, a chat with a tool's result, a title in one piece."""
    who = {"X-OpenWebUI-User-Name": "M%C3%BCller", "X-OpenWebUI-User-Id": "7", "X-OpenWebUI-Chat-Id": "c1"}
    listed = api.client.get("/v1/models", headers=who).json()["data"]
    assert "tiny" in [model["id"] for model in listed]
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "system", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    ]
    settings = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "seed": 0, "stop": ["<END>"], "frequency_penalty": 0.1}
    body = {"stream_options": {"include_usage": True}, "tools": TOOLS, **settings, "messages": turns}
    *pieces, usage, done = api.events(**body)
    assert done == "data: [DONE]"
    assert usage["usage"]["completion_tokens"] > 0
    text = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"])
    assert text == "hello"
    assert "Be brief." in prompt_text(api)
    assert '"a": 1' in prompt_text(api)
    title = api.chat(messages=[{"role": "user", "content": "A title?"}], stream=False, max_completion_tokens=1000)
    assert title["choices"][0]["message"]["content"] == "hello"
