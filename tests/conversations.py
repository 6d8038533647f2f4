"""The endpoint with which other people's clients converse: `agent` reasons and calls `paint`, then answers; `tiny` is the
tiny model, which follows a schema. What reached the model and what the clients sent is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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


@dataclass(frozen=True)
class Conversed:
    """`prompts`: what reached the model `agent`; `sent`: (path, body) of each POST."""

    url: str
    prompts: list[str] = field(default_factory=list)
    sent: list[tuple[str, Any]] = field(default_factory=list)

    def holds_the_conversation(self) -> None:
        """The last prompt has every turn in order: question, call, result, answer, question."""
        places = [self.prompts[-1].index(text) for text in (QUESTION, '"colour": "red"', "painted", FIRST, AGAIN)]
        assert places == sorted(places)


@contextmanager
def conversing(tiny_model_dir: Path, folder: Path) -> Iterator[Conversed]:
    """The endpoint; its model is written to `folder`."""
    shutil.copytree(tiny_model_dir, folder)
    config = folder / "config.json"  # tools and their schemas are long in a vocabulary of 400
    longer = json.loads(config.read_text(encoding="utf-8")) | {"max_position_embeddings": 2048}
    config.write_text(json.dumps(longer), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tokenizer = load_tokenizer_dir(folder)
    prompts: list[str] = []
    sent: list[tuple[str, Any]] = []

    def script(request: GenerationRequest) -> list[int]:
        prompts.append(tokenizer.decode(request.prompt_ids))
        if AGAIN in prompts[-1]:
            return ids_of(tokenizer, SECOND)
        return ids_of(tokenizer, THOUGHT + FIRST if "painted" in prompts[-1] else CALL)

    engine = open_engine(folder, None, parse(EngineConfig, ENGINE), use_gpu=False)
    tiny = Loaded("mv_0", "sha256:" + "0" * 64, engine, "", tokenizer, (tokenizer.end_of_turn_id,))
    try:
        names = Fixed(tiny=tiny, agent=loaded(tokenizer, Scripted(script)))
        with running(_kept(build_http(deployment(names)), sent)) as url:
            yield Conversed(url, prompts, sent)
    finally:
        engine.close()


def _kept(app: Any, sent: list[tuple[str, Any]]) -> Any:
    """`app`, with the bodies that it receives noted."""

    async def call(scope: Any, receive: Any, send: Any) -> None:
        raw = b""

        async def noted() -> Any:
            nonlocal raw
            message = await receive()
            if message["type"] == "http.request":
                raw += message.get("body", b"")
                if raw and not message.get("more_body"):
                    sent.append((scope["path"], json.loads(raw)))
                    raw = b""
            return message

        await app(scope, noted if scope["type"] == "http" else receive, send)

    return call


def recorded_in(path: Path) -> list[tuple[str, Any]]:
    """(path, body) of each request that a client sent."""
    lines = path.read_text(encoding="utf-8").split("\n")  # texts hold U+2028, which `splitlines` takes for an end
    return [(path, body) for path, body in map(json.loads, filter(None, lines))]


def shape(value: Any, name: str = "") -> Any:
    """What a request says without the ids in it, which are new each time."""
    if isinstance(value, dict):
        return {key: shape(item, key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shape(item, name) for item in value]
    return type(value).__name__ if name.endswith("id") else value
