"""Parsing of request bodies: unsupported fields, limits, and the format of errors (no ray, no torch).

A field is honoured or refused, never ignored. Known fields that are not supported are accepted with a value that has no
effect (`NO_OP`); any other value, and any unknown field, is a 400 that names the field in `param`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from forge_ray.config.release import Limits
from forge_ray.data.read.strict_json import Reject, decode, reject_deep
from forge_ray.serve.class_fields import (
    ChatClassificationRequest,
    ChatModerationRequest,
    ClassificationRequest,
    ClassifyingRequest,
    ModerationRequest,
)
from forge_ray.serve.fields import (
    ChatRequest,
    CompletionOptions,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from forge_ray.serve.replayed import REASONING_NAMES
from forge_ray.serve.response_fields import STATELESS, ResponsesRequest
from forge_ray.serve.wire import Wire

MAX_PROMPTS = 64  # per request to /v1/completions
MAX_INPUTS = 2048  # per request to /v1/embeddings, as OpenAI's, and to a classifier

# Values of unsupported fields that have no effect; null never has one
NO_OP: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "dimensions": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "min_tokens": (0,),
    "modalities": ([], ["text"]),
    "moderation": (),
    "output_dimension": (),
    "output_dtype": ("float",),
    "prediction": (),
    "prompt_mode": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safe_prompt": (False,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
RESPONSES_NO_OP: dict[str, tuple[Any, ...]] = {
    "access_programs": ({}, {"cyber": "standard"}),
    "background": (False,),
    "background_options": ({}, {"completion_window": "soonest"}),
    "context_management": ([],),
    "conversation": (),
    "image": ({}, {"context_compression": "auto"}),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "truncation": ("disabled",),
}
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
REASONS = {
    "safe_prompt": "it would prepend a text of Mistral's to the messages; send your own system message",
    "suffix": "a suffix needs a model that was trained to fill in the middle",
    "store": STATELESS,
    "previous_response_id": STATELESS,
    "conversation": STATELESS,
    "best_of": "choose among `n` choices by their log-probabilities",
}


class ApiError(Exception):
    """An error response in OpenAI's format; `headers` are sent with it (`Retry-After`)."""

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


R = TypeVar("R", bound=Wire)


def parse_request(model: type[R], raw: bytes, limits: Limits) -> R:
    """The body as `model`; an `ApiError` 400 names the first field that is wrong."""
    body = _object(raw)
    own = model.model_fields.keys()
    no_op = NO_OP | RESPONSES_NO_OP if model is ResponsesRequest else NO_OP
    body = {key: value for key, value in body.items() if key in own or not _is_no_op(no_op, key, value)}
    for key in body:
        if key not in own:
            reason = f": {REASONS[key]}" if key in REASONS else ""
            rule = f"{key}={json.dumps(body[key])[:80]} is not supported here" + reason
            unsupported = key in no_op
            raise ApiError(
                400,
                rule if unsupported else f"unknown field {key[:80]}",
                param=key[:80],
                code="unsupported_parameter" if unsupported else "unknown_parameter",
            )
    try:
        request = model.model_validate(body)
    except ValidationError as error:
        raise _bad_field(error) from None
    _check_limits(request, limits)
    return request


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = decode(raw)
        reject_deep(body)
        if SURROGATE.search(raw):
            json.dumps(body, ensure_ascii=False).encode()  # an escaped half of a surrogate pair is not text
    except UnicodeEncodeError:
        raise ApiError(400, "the body is not valid JSON: lone surrogate") from None
    except Reject as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}, not an object")
    return body


def _check_limits(request: BaseModel, limits: Limits) -> None:
    """The deployment's limits that can be checked without a tokenizer."""

    def check(param: str, number: int, limit: int) -> None:
        if number > limit:
            raise ApiError(400, f"{param}: {number} exceeds this deployment's limit of {limit}", param=param)

    if isinstance(request, CompletionOptions):
        check("n", request.num_choices, limits.max_n)
        check("stop", len(request.stops), limits.max_stops)
    if isinstance(request, CompletionRequest):
        check("logprobs", request.logprobs or 0, limits.max_logprobs)
        check("prompt", len(request.prompts), MAX_PROMPTS)
    if isinstance(request, ChatRequest):
        check("top_logprobs", request.top_logprobs or 0, limits.max_logprobs)
    if isinstance(request, (ChatRequest, TokenizeRequest)):
        check("messages", len(request.messages or []), limits.max_messages)
        check("tools", len(request.tools or []), limits.max_tools)
    if isinstance(request, EmbeddingRequest):
        check("input", len(request.inputs), MAX_INPUTS)
    if isinstance(request, ClassifyingRequest):
        check("input", len(request.conversations), MAX_INPUTS)
        for messages in request.conversations:
            check("input", len(messages), limits.max_messages)


def _is_no_op(no_op: dict[str, tuple[Any, ...]], key: str, value: Any) -> bool:
    return key in no_op and (value is None or any(value == good and type(value) in _types_of(good) for good in no_op[key]))


def _types_of(value: Any) -> tuple[type, ...]:
    """Types in which `value` may be sent: 0 as 0.0 too, but never as False."""
    return (int, float) if type(value) is int else (type(value),)


def _bad_field(error: ValidationError) -> ApiError:
    items = error.errors(include_url=False, include_context=False)
    # A union reports an error for every member; the one with the deepest path is most likely the intended one
    item = max((other for other in items if other["loc"][:1] == items[0]["loc"][:1]), key=lambda other: len(other["loc"]))
    # The path names the union's members, which a client does not know: keep the fields alone
    last = len(item["loc"]) - 1 if item["type"] == "extra_forbidden" else None
    path = [
        str(part) for place, part in enumerate(item["loc"]) if isinstance(part, int) or part in KNOWN_FIELDS or place == last
    ]
    rule = item["msg"].removeprefix("Value error, ")
    named, colon, rest = rule.partition(":")
    if item["type"] == "value_error" and colon and named.partition(".")[0] in KNOWN_FIELDS:
        path, rule = [*path, named], rest.strip()
    param = ".".join(path) or None
    return ApiError(400, f"{param}: {rule[:1].lower()}{rule[1:]}", param=param)


def _fields_of(annotation: Any) -> set[str]:
    """Names of the fields of every model in a type, as clients write them."""
    if not (isinstance(annotation, type) and issubclass(annotation, Wire)):
        return {name for part in get_args(annotation) for name in _fields_of(part)}
    fields = annotation.model_fields
    own = {field.alias or name for name, field in fields.items()}
    return own.union(*(_fields_of(field.annotation) for field in fields.values()))


REQUESTS = (
    *(ChatRequest, CompletionRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest, ResponsesRequest),
    *(ClassificationRequest, ModerationRequest, ChatClassificationRequest, ChatModerationRequest),
)
KNOWN_FIELDS = set[str](REASONING_NAMES).union(*map(_fields_of, REQUESTS))
