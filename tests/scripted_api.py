"""The API over HTTP with an engine that plays a script: what the tests of it share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from http_server import Fixed, deployment, running
from scripted import Scripted, loaded, saying

from forge_ray.data.tokens.chat import load_tokenizer_dir
from forge_ray.data.tokens.hf import HfTokenizer
from forge_ray.inference.engine import GenerationRequest
from forge_ray.serve.context import Admission, Caller, Chosen, ServingContext
from forge_ray.serve.http import build_http
from forge_ray.serve.routing import RoutingInputs

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools {{ tools | tojson }} as <tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMED = TEMPLATE.replace(
    "<tool_call>{{ c.function | tojson }}</tool_call>",
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}",
)
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"a": {}}}}}
    for name in ("add", "addition", "multiply")
]
USER = [{"role": "user", "content": "hi"}]


class Tally:
    """An admission that notes how it ended."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.closed: list[tuple[int, int, int]] = []

    async def admit(self, caller: Any, chosen: Chosen, prompt_tokens: int, most_new_tokens: int) -> Admission:
        self.asked.append((prompt_tokens, most_new_tokens))
        return self

    def close(self, prompt_tokens: int, completion_tokens: int, status: int) -> None:
        self.closed.append((prompt_tokens, completion_tokens, status))


class ByUser(Fixed):
    """Two versions: `second` answers the user `b`; `shadow` answers too."""

    async def choose(self, name: str, caller: Caller, inputs: RoutingInputs) -> Chosen:
        if name == "shadowed":
            return Chosen(name, self.stable(name, caller), "", (self.names["shadow"],) * 2)
        if inputs.user == "b":
            return Chosen(name, self.names["second"], "rule 1")
        return Chosen(name, self.stable(name, caller))


class Api(SimpleNamespace):
    url: str
    engine: Scripted
    shadow: Scripted
    tokenizer: HfTokenizer
    tally: Tally
    served: ServingContext
    client: httpx.Client

    def says(self, text: str) -> None:
        self.engine.script = saying(self.tokenizer, text)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json={"model": "tiny", **body})

    def chat(self, **body: Any) -> Any:
        response = self.post("/v1/chat/completions", **{"messages": USER, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def text(self, **body: Any) -> Any:
        response = self.post("/v1/completions", **{"prompt": "hi", "max_tokens": 100, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, path: str = "/v1/chat/completions", status: int = 400, **body: Any) -> Any:
        body = {"messages": USER, **body} if path == "/v1/chat/completions" else body
        response = self.post(path, **body)
        assert response.status_code == status, response.text
        return response.json()["error"]

    def asked(self) -> GenerationRequest:
        """What reached the engine last."""
        return self.engine.requests[-1]

    def events(self, path: str = "/v1/chat/completions", **body: Any) -> list[Any]:
        body = {"messages": USER, **body} if path == "/v1/chat/completions" else body
        response = self.post(path, stream=True, **body)
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = response.text.split("\n\n")
        assert blocks.pop() == ""
        return [
            block if block.startswith(":") or block == "data: [DONE]" else json.loads(block.removeprefix("data: "))
            for block in blocks
        ]


@contextmanager
def running_with(tiny_model_dir: Path, template: str = TEMPLATE) -> Iterator[Api]:
    """The tiny model's tokenizer with `template`, behind HTTP."""
    tokenizer = load_tokenizer_dir(tiny_model_dir)
    assert isinstance(tokenizer, HfTokenizer)
    tokenizer.tokenizer.chat_template = template
    engine, shadow, tally = Scripted(saying(tokenizer, "hello")), Scripted(saying(tokenizer, "unseen")), Tally()
    names = {
        "tiny": loaded(tokenizer, engine),
        "second": loaded(tokenizer, engine, "mv_2", "adapter-2"),
        "shadow": loaded(tokenizer, shadow, "mv_shadow"),
        "shadowed": loaded(tokenizer, engine),
        "ft:base:org/x:1": loaded(tokenizer, engine),
    }
    served = replace(deployment(ByUser(**names), limits={"max_body_bytes": 1 << 17}), admit=tally.admit)
    with running(build_http(served)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield Api(url=url, engine=engine, shadow=shadow, tokenizer=tokenizer, tally=tally, served=served, client=client)


def reset(api: Api) -> Api:
    """As it is before each test."""
    api.says("hello")
    api.engine.lacks = {}
    api.shadow.script = saying(api.tokenizer, "unseen")
    api.engine.requests.clear()
    api.tally.asked.clear()
    api.tally.closed.clear()
    return api
