"""OpenAI's wire formats: what a request may hold, what a response holds, how an error looks (level 4; no ray, no torch).

A field is honoured or refused, never ignored. Known fields that are not offered are accepted with a value that asks for
nothing (`NO_OP`); any other value, and any unknown field, is a 400 that names the field in `param`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions

# Values of fields not offered that ask for nothing; null always does
NO_OP: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "user": (),
}
MESSAGE_NO_OP: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape; `headers` go with it (`Retry-After`)."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class TextPart(Wire):
    type: Literal["text"]
    text: str


class Message(Wire):
    """One turn; `tool_call_id` is allowed in a tool's answer and reaches the chat template."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[TextPart]
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _tool_answers_only(self) -> Self:
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"tool_call_id belongs to messages of role tool, not {self.role}")
        return self

    def for_template(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        tool = {} if self.tool_call_id is None else {"tool_call_id": self.tool_call_id}
        return {"role": self.role, "content": content, **tool}


class StreamOptions(Wire):
    include_usage: bool = False


class CompletionOptions(Wire):
    """What both endpoints share."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        stops = self.stops
        if len(stops) > 4 or "" in stops:
            raise ValueError(f"stop: {len(stops)} strings given; up to 4 are allowed, none of them empty")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(CompletionOptions):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError(
                f"max_completion_tokens: {self.max_completion_tokens} contradicts max_tokens {self.max_tokens}; send one"
            )
        return self

    @property
    def token_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class CompletionRequest(CompletionOptions):
    """`prompt`: a text, a list of one text, or one list of token ids."""

    prompt: str | list[str] | list[int]

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if not self.prompt:
            raise ValueError("prompt: it is empty; give a text or token ids")
        if isinstance(self.prompt, list) and isinstance(self.prompt[0], str) and len(self.prompt) != 1:
            raise ValueError(f"prompt: {len(self.prompt)} texts given; send one request per text")
        return self

    @property
    def token_limit(self) -> tuple[str, int | None]:
        return "max_tokens", COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens


R = TypeVar("R", ChatRequest, CompletionRequest)


def parse_request(model: type[R], raw: bytes) -> R:
    """The body as `model`; an `ApiError` 400 names the first field that is wrong."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}, not an object")
    own = model.model_fields.keys()
    body = {key: value for key, value in body.items() if key in own or not _asks_nothing(NO_OP, key, value)}
    if isinstance(body.get("messages"), list):
        body["messages"] = [_without_no_ops(message) for message in body["messages"]]
    for key in body:
        if key not in own:
            rule = f"{key}={json.dumps(body[key])[:80]} is not supported here" if key in NO_OP else f"unknown field {key}"
            raise ApiError(400, rule, param=key, code="unsupported_parameter" if key in NO_OP else "unknown_parameter")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _bad_field(error) from None


def _asks_nothing(no_op: dict[str, tuple[Any, ...]], key: str, value: Any) -> bool:
    return key in no_op and (value is None or any(value == good and type(value) in _like(good) for good in no_op[key]))


def _like(value: Any) -> tuple[type, ...]:
    """Types that may stand for `value`: 0 and 0.0 alike, but never False for 0."""
    return (int, float) if type(value) is int else (type(value),)


def _without_no_ops(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if not _asks_nothing(MESSAGE_NO_OP, key, value)}


def _bad_field(error: ValidationError) -> ApiError:
    items = error.errors(include_url=False, include_context=False)
    # A union reports every member that it tried; the one that came deepest is the one that was meant
    item = max((other for other in items if other["loc"][:1] == items[0]["loc"][:1]), key=lambda other: len(other["loc"]))
    # Its path names those members; a client knows only the fields
    path = [
        str(part)
        for part in item["loc"]
        if isinstance(part, int) or part in KNOWN_FIELDS or item["type"] == "extra_forbidden"
    ]
    rule = item["msg"].removeprefix("Value error, ")
    named, colon, _ = rule.partition(":")
    if item["type"] == "value_error" and colon and named in KNOWN_FIELDS:
        return ApiError(400, rule, param=named)
    param = ".".join(path) or None
    return ApiError(400, f"{param}: {rule[:1].lower()}{rule[1:]}", param=param)


KNOWN_FIELDS = {
    *ChatRequest.model_fields,
    *CompletionRequest.model_fields,
    *Message.model_fields,
    *TextPart.model_fields,
    *StreamOptions.model_fields,
}


class Reply:
    """Builds the response objects of one request: same id, time, model and fingerprint in each."""

    def __init__(self, kind: Literal["chat", "text"], model: str, fingerprint: str) -> None:
        self.chat = kind == "chat"
        self._head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return (
            self._head
            | {"object": "chat.completion" if self.chat else "text_completion"}
            | {
                "choices": [choice],
                "usage": usage,
            }
        )

    def chunk(self, text: str, finish_reason: str | None = None, first: bool = False) -> dict[str, Any]:
        """One piece of a stream; the first of a chat also says who speaks."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        if self.chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        else:
            choice["text"] = text
        return self._piece([choice])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._piece([]) | {"usage": usage}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk" if self.chat else "text_completion", "choices": choices}


def usage(num_prompt: int, num_completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }


def sse(payload: dict[str, Any] | Literal["[DONE]"]) -> bytes:
    """One server-sent event."""
    text = payload if isinstance(payload, str) else json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
