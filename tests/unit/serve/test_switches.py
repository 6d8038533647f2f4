"""Switches of chat templates, and lengths and penalties of an answer, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_api import TEMPLATE, TOOLS, USER, Api, reset, running_with

from forge_ray.serve.switches import MAX_SETTINGS, switches_of

pytestmark = pytest.mark.unit

THINKS = TEMPLATE.replace(
    "{{ m.content or '' }}",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}",
)
ON_OFF = THINKS + (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{{ '' }}{% endif %}"
)
EFFORT = (
    "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
    "{% macro level(name) %}{{ name }}: {{ reasoning_effort }}{% endmacro %}"
    "{% if messages | length > 1 %}{% set first = bos_token %}{% endif %}"
    "<|im_start|>system\n{{ level('Reasoning') }}{{ style }}{{ first }}<|im_end|>\n" + TEMPLATE
)


of_effort = pytest.mark.parametrize("running_api", ["effort"], indirect=True)
of_on_off = pytest.mark.parametrize("running_api", ["on_off"], indirect=True)


@pytest.fixture(scope="module", params=["plain", "on_off", "effort"])
def running_api(tiny_model_dir: Path, request: pytest.FixtureRequest) -> Iterator[Api]:
    with running_with(tiny_model_dir, {"plain": TEMPLATE, "on_off": ON_OFF, "effort": EFFORT}[request.param]) as api:
        api.template = request.param
        yield api


@pytest.fixture
def api(running_api: Api) -> Api:
    return reset(running_api)


def prompt_text(api: Api) -> str:
    return api.tokenizer.decode(api.asked().prompt_ids)


def test_the_switches_of_a_template(api: Api) -> None:
    switches = {"plain": set(), "on_off": {"enable_thinking"}, "effort": {"reasoning_effort", "style"}}
    assert switches_of(api.tokenizer) == switches[api.template]


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"reasoning_effort": None},
        {"chat_template_kwargs": None},
        {"chat_template_kwargs": {}},
        {"chat_template_kwargs": {"no_such_switch": None, "thinking": False}},
    ],
)
def test_neutral_values_change_nothing(api: Api, sent: dict[str, Any]) -> None:
    api.chat(**sent)
    assert list(api.asked().prompt_ids) == api.tokenizer.prompt_ids(USER)


def test_no_effort_turns_reasoning_off_where_it_can_be(api: Api) -> None:
    api.chat(reasoning_effort="none")
    text = prompt_text(api)
    endings = {"plain": "assistant\n", "on_off": "assistant\n<think>\n\n</think>\n\n", "effort": "assistant\n"}
    assert text.endswith(endings[api.template])
    assert ("Reasoning: none" in text) == (api.template == "effort")


def test_an_effort_reaches_the_template_or_is_refused_by_name(api: Api) -> None:
    for effort in ("low", "high"):
        if api.template == "effort":
            api.chat(reasoning_effort=effort, tools=TOOLS)
            assert f"Reasoning: {effort}<|im_end|>" in prompt_text(api)
            continue
        error = api.refused(reasoning_effort=effort)
        assert (error["param"], error["code"]) == ("reasoning_effort", "unsupported_parameter")
        assert "has no switch 'reasoning_effort'" in error["message"]
        assert ("enable_thinking" in error["message"]) == (api.template == "on_off")
    assert api.refused(reasoning_effort="utmost")["param"] == "reasoning_effort"


def test_a_switch_reaches_the_template_or_is_refused_by_name(api: Api) -> None:
    if api.template == "on_off":
        api.chat(chat_template_kwargs={"enable_thinking": False})
        assert prompt_text(api).endswith("<think>\n\n</think>\n\n")
        api.chat(chat_template_kwargs={"enable_thinking": True})
        assert list(api.asked().prompt_ids) == api.tokenizer.prompt_ids(USER)
    else:
        api.chat(chat_template_kwargs={"enable_thinking": False})
        error = api.refused(chat_template_kwargs={"enable_thinking": True})
        assert error["param"] == "chat_template_kwargs.enable_thinking"
    for name in ("messages", "tools", "add_generation_prompt", "bos_token", "raise_exception", "first", "m"):
        assert api.refused(chat_template_kwargs={name: "x"})["param"] == f"chat_template_kwargs.{name}"


@of_effort
def test_a_switch_is_a_value_and_no_template(api: Api) -> None:
    for value in ('" %}{{ 7 * 7 }}', "{{ messages }}", "a" * 65, "\n", "é"):
        assert api.refused(chat_template_kwargs={"style": value})["param"] == "chat_template_kwargs.style"
    assert (api.refused(chat_template_kwargs={"style": ["a"]})["param"] or "").startswith("chat_template_kwargs")
    for value, written in (("calm, short", "calm, short"), (7, "7"), (1.5, "1.5"), (True, "True"), ("", "")):
        api.chat(chat_template_kwargs={"style": value})
        assert f"Reasoning: medium{written}<|im_end|>" in prompt_text(api)


@of_effort
def test_two_names_of_one_switch_must_agree(api: Api) -> None:
    api.chat(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "low"})
    error = api.refused(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"})
    assert "contradicts" in error["message"]


@of_effort
def test_settings_that_are_kept_are_few(api: Api) -> None:
    for number in (*range(2 * MAX_SETTINGS), True, 1):
        api.chat(chat_template_kwargs={"style": number})
        assert f"medium{number}<|im_end|>" in prompt_text(api)


@of_on_off
def test_reasoning_is_split_from_an_answer_with_the_switch_that_it_was_asked_with(api: Api) -> None:
    api.says("<think>\nHm.\n</think>\n\nYes.")
    message = api.chat(chat_template_kwargs={"enable_thinking": True})["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    api.says("Yes.")
    message = api.chat(reasoning_effort="none")["choices"][0]["message"]
    assert "reasoning_content" not in message
    assert message["content"] == "Yes."


# ---------------------------------------------------------------- lengths, penalties, fields without a meaning


def test_more_tokens_than_the_deployment_allows_are_cut(api: Api) -> None:
    api.says("word " * 3000)
    for name in ("max_tokens", "max_completion_tokens"):
        response = api.post("/v1/chat/completions", messages=USER, **{name: 1025})
        assert response.status_code == 200
        assert response.headers["x-forge-max-tokens"] == "1024"
        assert response.json()["choices"][0]["finish_reason"] == "length"
        assert response.json()["usage"]["completion_tokens"] == 1024 == api.asked().max_new_tokens
    response = api.post("/v1/chat/completions", messages=USER, max_tokens=4096, stream=True)
    assert response.headers["x-forge-max-tokens"] == "1024"
    assert '"finish_reason":"length"' in response.text
    response = api.post("/v1/completions", prompt="hi", max_tokens=2000)
    assert (response.headers["x-forge-max-tokens"], response.json()["choices"][0]["finish_reason"]) == ("1024", "length")


def test_as_many_as_it_allows_are_not_cut(api: Api) -> None:
    for sent in ({}, {"max_tokens": 1024}, {"max_tokens": None}):
        assert "x-forge-max-tokens" not in api.post("/v1/chat/completions", messages=USER, **sent).headers


def test_more_than_the_context_holds_is_refused(api: Api) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        error = api.refused(**{name: 64000})
        assert (error["param"], error["code"]) == (name, "context_length_exceeded")
        assert "4096" in error["message"]
    long = [{"role": "user", "content": "x " * 1900}]
    assert api.refused(messages=long, max_tokens=1024)["code"] == "context_length_exceeded"
    assert api.refused(max_tokens=0)["param"] == "max_tokens"


def test_min_p_and_repetition_penalty_reach_the_engine_or_are_refused(api: Api) -> None:
    api.chat(min_p=0.05, repetition_penalty=1.1)
    assert (api.asked().min_p, api.asked().repetition_penalty) == (0.05, 1.1)
    api.chat()
    assert (api.asked().min_p, api.asked().repetition_penalty) == (0.0, 1.0)
    api.engine.lacks = {"min_p": "vllm", "repetition_penalty": "vllm"}
    api.chat(min_p=0, repetition_penalty=1)
    api.chat(min_p=None, repetition_penalty=None)
    for name in ("min_p", "repetition_penalty"):
        assert api.refused(**{name: 0.5})["param"] == name
    for name, value in (("min_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0), ("repetition_penalty", 11)):
        assert api.refused(**{name: value})["param"] == name


@pytest.mark.parametrize("name", ["prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier"])
def test_fields_without_a_meaning_here_are_read_and_ignored(api: Api, name: str) -> None:
    api.chat(**{name: "flex"})
    assert api.refused(**{name: 5})["param"] == name
