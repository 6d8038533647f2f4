"""Other people's clients, offline, on one server: `tiny` is the tiny model, `caller` always says the same call."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from http_server import ENGINE, Fixed, deployment, running
from pydantic import BaseModel, ConfigDict
from scripted import Scripted, loaded, saying

from forge_ray import client as client_module
from forge_ray.client import Client
from forge_ray.config.base import parse
from forge_ray.config.release import EngineConfig
from forge_ray.data.tokens.chat import load_tokenizer_dir
from forge_ray.data.tokens.hf import HfTokenizer
from forge_ray.errors import ConfigError, EngineError, ForgeError, NotFound, PolicyError
from forge_ray.inference.choose import open_engine
from forge_ray.serve.http import build_http
from forge_ray.serve.loaded import Loaded

pytestmark = pytest.mark.e2e

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }} <tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = 'Let me see. <tool_call>\n{"name": "paint", "arguments": {"colour": "red", "sure": true}}\n</tool_call>'
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which colour?"}]


class Verdict(BaseModel):
    """An answer that even a model of random weights can finish."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "blue"]
    sure: bool


PAINT: Any = {
    "type": "function",
    "function": {"name": "paint", "description": "Paints.", "parameters": Verdict.model_json_schema()},
}


@pytest.fixture(scope="module")
def url(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("clients") / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = folder / "config.json"  # tools and their schemas are long in a vocabulary of 400
    longer = json.loads(config.read_text(encoding="utf-8")) | {"max_position_embeddings": 2048}
    config.write_text(json.dumps(longer), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tokenizer = load_tokenizer_dir(folder)
    engine = open_engine(folder, None, parse(EngineConfig, ENGINE), use_gpu=False)
    caller = loaded(tokenizer, Scripted(saying(tokenizer, CALL)))
    newer_tokenizer = load_tokenizer_dir(folder)  # the same model, as if it had been taught Mistral's newer calls
    assert isinstance(newer_tokenizer, HfTokenizer)
    newer_tokenizer.tokenizer.chat_template = TEMPLATE.replace(
        "<tool_call>{{ c.function | tojson }}</tool_call>",
        "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}",
    )
    newer = Loaded("mv_1", "sha256:" + "1" * 64, engine, "", newer_tokenizer, (tokenizer.end_of_turn_id,))
    tiny = Loaded("mv_0", "sha256:" + "0" * 64, engine, "", tokenizer, (tokenizer.end_of_turn_id,))
    try:
        with running(build_http(deployment(Fixed(tiny=tiny, caller=caller, newer=newer)))) as url:
            yield url
    finally:
        engine.close()


# ---------------------------------------------------------------- openai, with its strict validation


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


def test_openai_chat_and_stream(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 12, "n": 2}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, user="u", metadata={"k": "v"})
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == (whole.usage.completion_tokens if whole.usage else 0) // 2
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for index in (0, 1):
        texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(texts) == whole.choices[index].message.content
    assert chunks[-1].usage == whole.usage


def test_openai_completions(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model="tiny", prompt=["one two", "three"], n=2, max_tokens=4, logprobs=2, temperature=0
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert completion.choices[0].logprobs is not None
    assert len(completion.choices[0].logprobs.tokens or []) <= 4
    # Its type wants a finish reason in every piece of a stream, which OpenAI's own server does not send
    lenient = openai.OpenAI(base_url=client.base_url, api_key="none")
    streamed = lenient.completions.create(model="tiny", prompt="one two", max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == completion.choices[0].text


def test_openai_structured_answers(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Verdict, max_tokens=900)
    assert isinstance(parsed.choices[0].message.parsed, Verdict)
    loose = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=900, logit_bias={"0": -100}
    )
    assert (loose.choices[0].message.content or "").lstrip().startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_openai_forced_calls(client: openai.OpenAI, choice: Any) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "tools": [PAINT], "tool_choice": choice, "max_tokens": 900}
    (choice_with_call,) = client.chat.completions.create(**asked, seed=1).choices
    assert choice_with_call.finish_reason == "tool_calls"
    (call,) = choice_with_call.message.tool_calls or []
    assert call.type == "function"
    Verdict.model_validate_json(call.function.arguments)
    answered: Any = [
        *MESSAGES,
        choice_with_call.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    again = client.chat.completions.create(model="tiny", messages=answered, tools=[PAINT], max_tokens=4)
    assert again.usage is not None
    parsed = client.chat.completions.parse(
        model="tiny",
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Verdict)],
        tool_choice="required",
        max_tokens=900,
    )
    (parsed_call,) = parsed.choices[0].message.tool_calls or []
    assert isinstance(parsed_call.function.parsed_arguments, Verdict)


def test_openai_forced_calls_with_the_name_outside_the_json(client: openai.OpenAI) -> None:
    functions = [
        {"type": "function", "function": PAINT["function"] | {"name": name}} for name in ("paint", "painting", "draw")
    ]
    called = set()
    for seed in range(8):
        asked: Any = {"model": "newer", "messages": MESSAGES, "tools": functions, "seed": seed, "temperature": 1.9}
        (choice,) = client.chat.completions.create(**asked, tool_choice="required", max_tokens=400).choices
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        Verdict.model_validate_json(call.function.arguments)
        called.add(call.function.name)
    assert len(called) > 1
    assert called <= {"paint", "painting", "draw"}


def test_openai_free_calls(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(model="caller", messages=MESSAGES, tools=[PAINT]).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see. ")
    with client.chat.completions.stream(model="caller", messages=MESSAGES, tools=[PAINT]) as stream:
        stream.until_done()
        (streamed,) = stream.get_final_completion().choices
    (call,) = streamed.message.tool_calls or []
    assert json.loads(call.function.arguments) == {"colour": "red", "sure": True}
    assert (streamed.finish_reason, streamed.message.content) == ("tool_calls", "Let me see. ")


def test_openai_models_embeddings_and_errors(client: openai.OpenAI, url: str) -> None:
    assert [card.id for card in client.models.list()] == ["tiny", "caller", "newer"]
    assert client.models.retrieve("tiny").owned_by == "forge_ray"
    plain = client.embeddings.create(model="tiny", input=["one", "two"], encoding_format="float").data
    # What the client asks for by itself, base64, its own strict validation refuses: it looks before it decodes
    decoded = openai.OpenAI(base_url=f"{url}/v1", api_key="none").embeddings.create(model="tiny", input=["one", "two"]).data
    assert decoded[1].embedding == pytest.approx(plain[1].embedding, abs=1e-6)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, reasoning_effort="high")
    assert refused.value.param == "reasoning_effort"


def test_openai_async_at_once(url: str) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", _strict_response_validation=True) as client:

            async def one(number: int) -> tuple[str | None, str]:
                asked: Any = {"model": "tiny", "messages": MESSAGES, "seed": number, "max_tokens": 8}
                whole = await client.chat.completions.create(**asked)
                stream = await client.chat.completions.create(**asked, stream=True)
                return whole.choices[0].message.content, "".join(
                    [chunk.choices[0].delta.content or "" async for chunk in stream]
                )

            pairs = await asyncio.gather(*map(one, range(6)))
        assert all(whole == streamed for whole, streamed in pairs)
        assert len({whole for whole, _ in pairs}) > 1

    asyncio.run(ask())


# ---------------------------------------------------------------- each field, on a real engine


def test_each_field_changes_the_answer(url: str) -> None:
    """From the wire to the text: nothing on the way drops one."""

    def ask(path: str = "chat/completions", **more: Any) -> Any:
        asked = {"messages": MESSAGES} if path == "chat/completions" else {"prompt": "one two three"}
        body = {"model": "tiny", "seed": 1, "max_tokens": 12, **asked, **more}
        response = httpx.post(
            f"{url}/v1/{path}", json={key: item for key, item in body.items() if item is not None}, timeout=60
        )
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        return choice

    def text(**more: Any) -> str:
        return str(ask(**more)["message"]["content"])

    usual = text()
    assert usual == text()
    greedy = text(temperature=0)
    changes: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.9},
        {"top_p": 0.01},
        {"min_p": 0.9},
        {"repetition_penalty": 0.2},
        {"seed": 2},
        {"seed": None, "random_seed": 2},
        {"max_tokens": 3},
        {"max_tokens": None, "max_completion_tokens": 3},
        {"stop": usual[3:5]},
        {"logit_bias": {"40": 100}},
        {"response_format": {"type": "json_object"}},
        {"tools": [PAINT]},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "It is", "prefix": True}]},
    ]
    for change in changes:
        assert text(**change) != usual, change
    long = text(temperature=0, max_tokens=100)  # long enough to say a token twice
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert text(temperature=0, max_tokens=100, **{penalty: 2}) != long
    assert text(top_k=1) == greedy != usual
    assert text(top_p=0.01) == text(min_p=1) == greedy
    assert text(temperature=0, max_tokens=100, repetition_penalty=5) != long
    assert text(tools=[PAINT], tool_choice="none") == usual
    assert ask(logprobs=True)["logprobs"]["content"]
    assert {len(entry["top_logprobs"]) for entry in ask(logprobs=True, top_logprobs=3)["logprobs"]["content"]} == {3}
    columns = ask("completions", logprobs=1, temperature=0)["logprobs"]
    assert columns["token_logprobs"] == pytest.approx([max(top.values()) for top in columns["top_logprobs"]])
    assert ask("completions", echo=True)["text"] == "one two three" + ask("completions")["text"]
    schema = {"enum": ["red", "blue"]}
    format_: Any = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}}
    assert json.loads(text(response_format=format_, max_tokens=60)) in schema["enum"]
    refused = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(?=a)b"}}}
    response = httpx.post(
        f"{url}/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "response_format": refused}, timeout=60
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")


# ---------------------------------------------------------------- mistralai


def test_mistral(url: str) -> None:
    from mistralai.client import Mistral
    from mistralai.client.errors import MistralError

    with Mistral(api_key="none", server_url=url) as mistral:
        asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 10}
        whole = mistral.chat.complete(**asked, random_seed=3)
        assert whole.usage.completion_tokens
        assert whole.choices[0].message is not None
        with mistral.chat.stream(**asked, random_seed=3) as events:
            pieces = [event.data for event in events]
        assert (
            "".join(str(p.choices[0].delta.content or "") for p in pieces if p.choices) == whole.choices[0].message.content
        )
        called = mistral.chat.complete(model="tiny", messages=MESSAGES, tools=[PAINT], tool_choice="any", max_tokens=900)
        (call,) = called.choices[0].message.tool_calls  # type: ignore[union-attr,misc]
        Verdict.model_validate_json(str(call.function.arguments))
        with mistral.chat.stream(model="caller", messages=MESSAGES, tools=[PAINT]) as events:
            calls = [call for event in events for c in event.data.choices for call in c.delta.tool_calls or []]
        assert [call.function.name for call in calls] == ["paint"]
        parsed = mistral.chat.parse(response_format=Verdict, model="tiny", messages=MESSAGES, max_tokens=900)
        assert isinstance(parsed.choices[0].message.parsed, Verdict)  # type: ignore[index,union-attr]
        prefix: Any = [*MESSAGES, {"role": "assistant", "content": "It is ", "prefix": True}]
        continued = mistral.chat.complete(model="tiny", messages=prefix, max_tokens=4)
        assert str(continued.choices[0].message.content).startswith("It is ")  # type: ignore[union-attr]
        assert len(mistral.embeddings.create(model="tiny", inputs=["one", "two"]).data) == 2
        with pytest.raises(MistralError, match="send your own system message") as refused:
            mistral.chat.complete(**asked, safe_prompt=True)
        assert (refused.value.status_code, json.loads(refused.value.body)["error"]["param"]) == (400, "safe_prompt")


def test_clients_of_classifiers(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Mistral's four calls; OpenAI's moderations, whose strict types know OpenAI's own categories alone."""
    from classifiers import TOXIC, loaded_classifier, make_classifier
    from mistralai.client import Mistral

    folder = make_classifier(tiny_model_dir, tmp_path / "model", TOXIC)
    toxic = loaded_classifier(folder, TOXIC, flags=TOXIC.labels)
    try:
        with running(build_http(deployment(Fixed(toxic=toxic)))) as url:
            with Mistral(api_key="none", server_url=url) as mistral:
                single = mistral.classifiers.classify(model="toxic", inputs="one two", metadata={"k": "v"})
                chat: Any = {"messages": [{"role": "user", "content": "one two"}]}
                chats = mistral.classifiers.classify_chat(model="toxic", input=[chat, chat])
                scores = single.results[0]["toxic"].scores
                assert list(scores) == list(TOXIC.labels)
                assert [result["toxic"].scores for result in chats.results] == [pytest.approx(scores, abs=1e-6)] * 2
                moderated = mistral.classifiers.moderate(model="toxic", inputs=["one two", "three"])
                assert moderated.results[0].category_scores == pytest.approx(scores, abs=1e-6)
                of_chat = mistral.classifiers.moderate_chat(model="toxic", inputs=chat["messages"])
                assert of_chat.results[0].categories == moderated.results[0].categories
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                answer = client.moderations.create(model="toxic", input=["one two", "three"])
                assert answer.results[0].flagged == any(moderated.results[0].categories.values())  # type: ignore[union-attr]
                assert answer.results[1].category_scores.model_extra == moderated.results[1].category_scores
    finally:
        toxic.engine.close()


# ---------------------------------------------------------------- langchain


def test_langchain(url: str) -> None:
    from langchain_openai import ChatOpenAI

    def model(name: str, **more: Any) -> Any:
        return ChatOpenAI(model=name, base_url=f"{url}/v1", api_key="none", max_retries=0, seed=1, **more)  # type: ignore[arg-type]

    tiny = model("tiny", max_tokens=10, temperature=0)
    whole = tiny.invoke("Which colour?")
    assert "".join(str(chunk.content) for chunk in tiny.stream("Which colour?")) == whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    called = model("caller").bind_tools([PAINT]).invoke("Which colour?")
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("paint", {"colour": "red", "sure": True})]
    forced = model("tiny", max_tokens=900).bind_tools([PAINT], tool_choice="any").invoke("Which colour?")
    Verdict.model_validate(forced.tool_calls[0]["args"])
    for method in ("json_schema", "function_calling"):
        structured = model("tiny", max_tokens=900).with_structured_output(Verdict, method=method)
        assert isinstance(structured.invoke("Which colour?"), Verdict)


# ---------------------------------------------------------------- our own


def test_forge_client(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(url) as client:
        assert client.models() == ["tiny", "caller", "newer"]
        answer = client.chat("tiny", MESSAGES, max_tokens=4, temperature=0)
        assert (answer.model_version, answer.route, answer.calls) == ("mv_0", "", ())
        assert "".join(client.stream_chat("tiny", MESSAGES, max_tokens=4, temperature=0)) == answer.text
        called = client.chat("caller", MESSAGES, tools=[PAINT])
        assert (called.finish_reason, called.text) == ("tool_calls", "Let me see. ")
        assert [(call.name, json.loads(call.arguments)) for call in called.calls] == [
            ("paint", {"colour": "red", "sure": True})
        ]
        with pytest.raises(NotFound):
            client.chat("other", MESSAGES)
        with pytest.raises(ConfigError, match="top_q"):
            client.chat("tiny", MESSAGES, top_q=1)


@pytest.mark.parametrize(
    ("status", "kind", "hint"),
    [
        (400, ConfigError, "change the request"),
        (401, PolicyError, "FORGE_API_KEY"),
        (403, PolicyError, "FORGE_API_KEY"),
        (404, NotFound, "models"),
        (410, NotFound, "models"),
        (429, EngineError, "after 7 s"),
        (503, EngineError, "send the request again"),
    ],
)
def test_http_errors_become_forge_errors(status: int, kind: type[ForgeError], hint: str) -> None:
    body = {"error": {"message": "no", "type": "x", "param": None, "code": None}}
    request = httpx.Request("POST", "http://127.0.0.1/v1/chat/completions")
    error = client_module._error(httpx.Response(status, json=body, headers={"retry-after": "7"}, request=request))
    assert type(error) is kind
    assert error.message.endswith(": no")
    assert hint in error.hint


def test_api_key_from_argument_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_API_KEY", "fk_environment")
    for argument, sent in (("", "Bearer fk_environment"), ("fk_given", "Bearer fk_given")):
        with Client("http://127.0.0.1:1", api_key=argument) as client:
            assert client._http.headers["authorization"] == sent
    monkeypatch.delenv("FORGE_API_KEY")
    with Client("http://127.0.0.1:1") as client:
        assert "authorization" not in client._http.headers
