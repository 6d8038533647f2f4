"""Settings that Mistral's newer tokenizers write into a prompt: as mistral-common writes them, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mistral_common
import pytest

from forge_ray.config.release import Limits
from forge_ray.data.tokens.mistral import MistralChat, load_mistral
from forge_ray.serve.fields import ChatRequest
from forge_ray.serve.openai import ApiError, parse_request
from forge_ray.serve.prompt import prompts_of
from forge_ray.serve.switches import switches_of

pytestmark = pytest.mark.unit

DATA = Path(mistral_common.__file__).parent / "data"
EFFORT = {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]}
FORMAT = {"type": "json_schema", "accepts_none": False, "default": None}
SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}}
JSON_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": SCHEMA, "description": "x", "strict": True},
}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> MistralChat:
    """The beginning of a tekken of mistral-common's wheel as one of version 15, with every special token."""
    from mistral_common.tokens.tokenizers.base import SpecialTokens
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    model = json.loads((DATA / "tekken_240911.json").read_bytes())
    first = [one["token_str"] for one in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    names = [*first, *(one.value for one in SpecialTokens if one.value not in first)]
    num_special = model["config"]["default_num_special_tokens"]
    model["config"] |= {"version": "v15", "default_vocab_size": num_special + 2000}
    model["vocab"] = model["vocab"][:2000]
    model["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    model.pop("multimodal", None)
    model["model_settings_builder"] = {"reasoning_effort": EFFORT, "json_schema": FORMAT}
    path = tmp_path_factory.mktemp("newer") / "tekken.json"
    path.write_text(json.dumps(model), encoding="utf-8")
    return load_mistral(path)


@pytest.fixture(scope="module")
def older() -> MistralChat:
    return load_mistral(DATA / "mistral_instruct_tokenizer_241114.model.v7")


def prompt(tokenizer: MistralChat, **more: Any) -> str:
    body = {"model": "bot", "messages": MESSAGES, **more}
    (prompt,) = prompts_of(tokenizer, parse_request(ChatRequest, json.dumps(body).encode(), Limits()))
    return tokenizer.decode(prompt.ids)


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "high"},
        {"reasoning_effort": "high", "tools": [TOOL]},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": JSON_SCHEMA, "reasoning_effort": "high"},
    ],
)
def test_a_prompt_is_that_of_mistral_common(newer: MistralChat, sent: dict[str, Any]) -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    request: Any = ChatCompletionRequest.from_openai(MESSAGES, model="bot", **sent)  # type: ignore[arg-type]
    text = prompt(newer, **sent)
    assert text == newer.decode(newer.serving.encode_chat_completion(request).tokens)
    effort = sent.get("reasoning_effort", "none")
    assert f'"reasoning_effort": "{effort}"' in text
    assert ("größe" in text) == ("json_schema" in sent.get("response_format", {}))


def test_the_effort_may_come_as_a_switch(newer: MistralChat) -> None:
    assert switches_of(newer) == {"reasoning_effort"}
    assert prompt(newer, chat_template_kwargs={"reasoning_effort": "high"}) == prompt(newer, reasoning_effort="high")
    assert prompt(newer, chat_template_kwargs={"enable_thinking": False}) == prompt(newer)


@pytest.mark.parametrize(
    ("sent", "param", "rule"),
    [
        ({"reasoning_effort": "low"}, "reasoning_effort", "not one of this model's: none, high"),
        ({"chat_template_kwargs": {"reasoning_effort": 3}}, "chat_template_kwargs.reasoning_effort", "none, high"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking", "reasoning_effort"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "text"}}}},
            "response_format",
            "draft 7",
        ),
    ],
)
def test_what_the_file_does_not_know_is_refused_by_name(newer: MistralChat, sent: Any, param: str, rule: str) -> None:
    with pytest.raises(ApiError, match=rule) as caught:
        prompt(newer, **sent)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_older_tokenizers_have_no_settings(older: MistralChat) -> None:
    assert switches_of(older) == frozenset()
    assert prompt(older, reasoning_effort="none", response_format=JSON_SCHEMA) == prompt(older)
    with pytest.raises(ApiError, match="no switch 'reasoning_effort'") as caught:
        prompt(older, reasoning_effort="high")
    assert caught.value.param == "reasoning_effort"


def test_rows_are_taught_with_the_setting_that_prompts_have_by_default(newer: MistralChat) -> None:
    (document,) = newer.encode_chats([([*MESSAGES, {"role": "assistant", "content": "ho"}], None)])
    (encoded,) = document  # type: ignore[misc]
    assert newer.decode(encoded.ids) == prompt(newer) + "ho</s>"
    assert newer.decode(encoded.ids[encoded.loss_mask == 1]) == "ho</s>"
