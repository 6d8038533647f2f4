"""Conversations of several turns by other clients, offline: reasoning, a call, its result, an answer, another question."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx2
import jsonschema
import openai
import pytest
from conversations import AGAIN, FIRST, PAINT, QUESTION, SECOND, Conversed, Verdict, conversing

from tests.unit.inference.test_schemas import SCHEMAS

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def conversed(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conversed]:
    with conversing(tiny_model_dir, tmp_path_factory.mktemp("conversations") / "model") as conversed:
        yield conversed


@pytest.fixture(scope="module")
def url(conversed: Conversed) -> str:
    return conversed.url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


def test_openai_chat(client: openai.OpenAI, conversed: Conversed) -> None:
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
    conversed.holds_the_conversation()
    assert conversed.prompts[-1].count("<think>\nPaint it.\n</think>") == 2


def test_openai_responses(client: openai.OpenAI, conversed: Conversed) -> None:
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
    conversed.holds_the_conversation()
    assert conversed.prompts[-1].count("<think>\nPaint it.\n</think>") == 2
    parsed = client.responses.parse(model="tiny", input=QUESTION, text_format=Verdict, max_output_tokens=900)
    assert isinstance(parsed.output_parsed, Verdict)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="agent", input="hi", previous_response_id=answered.id)
    assert refused.value.param == "previous_response_id"


def test_mistral(url: str, conversed: Conversed) -> None:
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
        conversed.holds_the_conversation()
        thought = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": FIRST}]
        replayed: Any = [*messages[:1], {"role": "assistant", "content": thought}, {"role": "user", "content": AGAIN}]
        mistral.chat.complete(model="agent", messages=replayed)
        assert f"<think>\nHm.\n</think>\n\n{FIRST}" in conversed.prompts[-1]
        parsed = mistral.chat.parse(response_format=Verdict, model="tiny", messages=messages[:1], max_tokens=900)
        assert isinstance(parsed.choices[0].message.parsed, Verdict)  # type: ignore[index,union-attr]


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_langchain(url: str, conversed: Conversed, api: str) -> None:
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
    conversed.holds_the_conversation()
    structured = ChatOpenAI(model="tiny", max_tokens=900, **more).with_structured_output(Verdict, method="json_schema")  # type: ignore[call-arg]
    assert isinstance(structured.invoke(QUESTION), Verdict)


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_pydantic_ai(url: str, conversed: Conversed, api: str) -> None:
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
        conversed.holds_the_conversation()
        judge: Any = Agent(kind("tiny", provider=provider), output_type=NativeOutput(Verdict))
        verdict = await judge.run(QUESTION, model_settings={"max_tokens": 900})
        assert isinstance(verdict.output, Verdict)

    asyncio.run(converse())


@pytest.mark.large
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
