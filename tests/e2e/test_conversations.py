"""Conversations of several turns by other clients, offline: reasoning, a call, its result, an answer, another question.

`agent` reasons and calls `paint`, then answers; `tiny` is the tiny model, which follows a schema.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx2
import jsonschema
import openai
import pytest
from http_server import ENGINE, Fixed, deployment, running
from pydantic import BaseModel, ConfigDict
from scripted import Scripted, ids_of, loaded

from forge_ray.config.base import parse
from forge_ray.config.release import EngineConfig
from forge_ray.data.tokens.chat import load_tokenizer_dir
from forge_ray.inference.choose import open_engine
from forge_ray.inference.engine import GenerationRequest
from forge_ray.serve.http import build_http
from forge_ray.serve.loaded import Loaded
from tests.unit.inference.test_schemas import SCHEMAS

pytestmark = pytest.mark.e2e

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }} <tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHT = "<think>\nPaint it.\n</think>\n\n"
CALL = THOUGHT + '<tool_call>\n{"name": "paint", "arguments": {"colour": "red", "sure": true}}\n</tool_call>'
FIRST, SECOND = "It is red\u2028now.", "Still red."
QUESTION, AGAIN = "Which colour?", "And now?"


class Verdict(BaseModel):
    """An answer that even a model of random weights can finish."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "blue"]
    sure: bool


SCHEMA = Verdict.model_json_schema()
PAINT: Any = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """What reached the model `agent`."""
    return []


@pytest.fixture(scope="module")
def url(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory, prompts: list[str]) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("conversations") / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = folder / "config.json"  # tools and their schemas are long in a vocabulary of 400
    longer = json.loads(config.read_text(encoding="utf-8")) | {"max_position_embeddings": 2048}
    config.write_text(json.dumps(longer), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tokenizer = load_tokenizer_dir(folder)

    def script(request: GenerationRequest) -> list[int]:
        prompts.append(tokenizer.decode(request.prompt_ids))
        if AGAIN in prompts[-1]:
            return ids_of(tokenizer, SECOND)
        return ids_of(tokenizer, THOUGHT + FIRST if "painted" in prompts[-1] else CALL)

    engine = open_engine(folder, None, parse(EngineConfig, ENGINE), use_gpu=False)
    tiny = Loaded("mv_0", "sha256:" + "0" * 64, engine, "", tokenizer, (tokenizer.end_of_turn_id,))
    try:
        names = Fixed(tiny=tiny, agent=loaded(tokenizer, Scripted(script)))
        with running(build_http(deployment(names))) as url:
            yield url
    finally:
        engine.close()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


def holds_the_conversation(prompt: str) -> None:
    """The last prompt has every turn in order: question, call, result, answer, question."""
    places = [prompt.index(text) for text in (QUESTION, '"colour": "red"', "painted", FIRST, AGAIN)]
    assert places == sorted(places)


def test_openai_chat(client: openai.OpenAI, prompts: list[str]) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    asked: Any = {"model": "agent", "tools": [PAINT]}
    called = client.chat.completions.create(**asked, messages=messages).choices[0].message
    (call,) = called.tool_calls or []
    messages += [called, {"role": "tool", "tool_call_id": call.id, "content": "painted"}]  # as a client sends it back: whole
    with client.chat.completions.stream(**asked, messages=messages) as stream:
        stream.until_done()
        answered = stream.get_final_completion().choices[0].message
    assert answered.content == FIRST
    messages += [answered.model_dump(), {"role": "user", "content": AGAIN}]
    assert client.chat.completions.create(**asked, messages=messages).choices[0].message.content == SECOND
    holds_the_conversation(prompts[-1])
    assert prompts[-1].count("<think>\nPaint it.\n</think>") == 2


def test_openai_responses(client: openai.OpenAI, prompts: list[str]) -> None:
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    tool: Any = {"type": "function", "strict": False} | PAINT["function"]
    asked: Any = {"model": "agent", "tools": [tool], "store": False, "include": ["reasoning.encrypted_content"]}
    called = client.responses.create(**asked, input=items)
    reasoning, call = called.output
    assert (reasoning.type, call.type) == ("reasoning", "function_call")
    items += [*called.output, {"type": "function_call_output", "call_id": call.call_id, "output": "painted"}]  # type: ignore[union-attr]
    with client.responses.stream(**asked, input=items) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        answered = stream.get_final_response()
    assert deltas == answered.output_text == FIRST
    items += [*answered.output, {"role": "user", "content": AGAIN}]
    assert client.responses.create(**asked, input=items).output_text == SECOND
    holds_the_conversation(prompts[-1])
    assert prompts[-1].count("<think>\nPaint it.\n</think>") == 2
    parsed = client.responses.parse(model="tiny", input=QUESTION, text_format=Verdict, max_output_tokens=900)
    assert isinstance(parsed.output_parsed, Verdict)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="agent", input="hi", previous_response_id=answered.id)
    assert refused.value.param == "previous_response_id"


def test_mistral(url: str, prompts: list[str]) -> None:
    from mistralai.client import Mistral

    with Mistral(api_key="none", server_url=url) as mistral:
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        asked: Any = {"model": "agent", "tools": [PAINT]}
        called: Any = mistral.chat.complete(**asked, messages=messages).choices[0].message
        messages += [
            called,
            {"role": "tool", "tool_call_id": called.tool_calls[0].id, "name": "paint", "content": "painted"},
        ]
        with mistral.chat.stream(**asked, messages=messages) as events:
            text = "".join(str(c.delta.content or "") for event in events for c in event.data.choices)
        assert text == FIRST
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": AGAIN}]
        assert mistral.chat.complete(**asked, messages=messages).choices[0].message.content == SECOND  # type: ignore[union-attr]
        holds_the_conversation(prompts[-1])
        thought = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": FIRST}]
        replayed: Any = [*messages[:1], {"role": "assistant", "content": thought}, {"role": "user", "content": AGAIN}]
        mistral.chat.complete(model="agent", messages=replayed)
        assert f"<think>\nHm.\n</think>\n\n{FIRST}" in prompts[-1]
        parsed = mistral.chat.parse(response_format=Verdict, model="tiny", messages=messages[:1], max_tokens=900)
        assert isinstance(parsed.choices[0].message.parsed, Verdict)  # type: ignore[index,union-attr]


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_langchain(url: str, prompts: list[str], api: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    more: Any = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "use_responses_api": api == "responses"}
    agent: Any = ChatOpenAI(model="agent", **more).bind_tools([PAINT])
    messages: list[Any] = [HumanMessage(QUESTION)]
    called = agent.invoke(messages)
    messages += [called, ToolMessage("painted", tool_call_id=called.tool_calls[0]["id"], name="paint")]
    pieces = list(agent.stream(messages))
    answered = pieces[0]
    for piece in pieces[1:]:
        answered += piece
    assert answered.text == FIRST
    messages += [answered, HumanMessage(AGAIN)]
    assert agent.invoke(messages).text == SECOND
    holds_the_conversation(prompts[-1])
    structured = ChatOpenAI(model="tiny", max_tokens=900, **more).with_structured_output(Verdict, method="json_schema")  # type: ignore[call-arg]
    assert isinstance(structured.invoke(QUESTION), Verdict)


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_pydantic_ai(url: str, prompts: list[str], api: str) -> None:
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    kind: Any = OpenAIChatModel if api == "chat" else OpenAIResponsesModel
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none", http_client=httpx2.AsyncClient())

    def paint(colour: Literal["red", "blue"], sure: bool) -> str:
        """Paints."""
        return f"painted {colour}"

    async def converse() -> None:
        agent: Any = Agent(kind("agent", provider=provider), tools=[paint], system_prompt="Be brief.")
        first = await agent.run(QUESTION)
        assert first.output == FIRST
        async with agent.run_stream(AGAIN, message_history=first.all_messages()) as second:
            assert await second.get_output() == SECOND
        holds_the_conversation(prompts[-1])
        judge: Any = Agent(kind("tiny", provider=provider), output_type=NativeOutput(Verdict))
        verdict = await judge.run(QUESTION, model_settings={"max_tokens": 900})
        assert isinstance(verdict.output, Verdict)

    asyncio.run(converse())


def test_schemas_as_agents_send_them(url: str) -> None:
    """Each answer conforms if it ended by itself; the tiny model ends most of them."""
    ended = 0
    for name, (schema, _, _) in SCHEMAS.items():
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 600, "seed": 1}
        started = time.monotonic()
        response = httpx2.post(f"{url}/v1/chat/completions", json=body | {"response_format": form}, timeout=120)
        assert response.status_code == 200, (name, response.text)
        assert time.monotonic() - started < 60
        choice = response.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            ended += 1
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    assert ended > len(SCHEMAS) / 2


@pytest.mark.parametrize("keyword", ["propertyNames", "uniqueItems", "not", "if"])
def test_a_keyword_that_cannot_be_kept_is_a_400_by_name(url: str, keyword: str) -> None:
    schema: Any = {"type": "array", keyword: {"type": "string"} if keyword != "uniqueItems" else True}
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}]}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    error = httpx2.post(f"{url}/v1/chat/completions", json=body | {"response_format": form}).json()["error"]
    assert error["param"] == "response_format"
    assert keyword in error["message"]
    text = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    error = httpx2.post(f"{url}/v1/responses", json={"model": "tiny", "input": QUESTION, "text": text}).json()["error"]
    assert error["param"] == "text.format"
    assert keyword in error["message"]
