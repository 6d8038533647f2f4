"""OpenAI's `/v1/responses` over the chat: the part of it that keeps no state (no ray).

Reasoning, text and calls become items of an output, and each change of one an event. Nothing is stored: an answer has an id,
and no later request can name it.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from forge_ray.config.release import Limits
from forge_ray.serve.complete import Answering, answering, failure
from forge_ray.serve.context import ServingContext
from forge_ray.serve.fields import ChatRequest
from forge_ray.serve.openai import ApiError, parse_request
from forge_ray.serve.reply import Part, sse
from forge_ray.serve.response_fields import ResponsesRequest
from forge_ray.serve.shadow import Shadows
from forge_ray.serve.streams import Arrived, writes
from forge_ray.serve.tools import Call

Event = dict[str, Any]
Kind = Literal["message", "reasoning"]
# How a chat names what is sent under another name here
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
TEXT_EVENT = {"message": "output_text", "reasoning": "reasoning_text"}


async def respond(context: ServingContext, shadows: Shadows, request: Request, body: ResponsesRequest) -> Response:
    """The whole response, or the events of it."""
    try:
        answer_id = _new("resp")
        begun = await answering(context, shadows, request, chat_of(body, context.config.limits), answer_id)
        output = Output(body, begun.num_prompt, answer_id)
        if body.stream:
            return begun.stream(_events(output, await begun.first(request), begun))
        (answer,) = await begun.whole(request)
    except ApiError as error:
        raise renamed(error) from error
    for _ in output.push(answer):
        pass
    for _ in output.end():
        pass
    return JSONResponse(output.response(), headers=begun.headers)


def chat_of(body: ResponsesRequest, limits: Limits) -> ChatRequest:
    """The chat that the request stands for; `ApiError` 400 in the words of a chat."""
    return parse_request(ChatRequest, json.dumps(body.chat(), ensure_ascii=False).encode(), limits)


def renamed(error: ApiError) -> ApiError:
    """The error under the names that the fields have here."""
    name, dot, rest = (error.param or "").partition(".")
    if name not in NAMES:
        return error
    param = NAMES[name] + ("" if name == "messages" else dot + rest.removeprefix("json_schema."))
    message = error.message
    if message.startswith(f"{error.param}:"):
        message = param + message.removeprefix(error.param or "")
    return ApiError(error.status, message, param, error.code, error.headers)


def _events(output: Output, first: Arrived[Part] | None, begun: Answering) -> AsyncGenerator[bytes, None]:
    """Server-sent events, each with its name; the last is `response.completed`, `.incomplete` or `.failed`."""

    def named(event: Event) -> bytes:
        return sse(event, event["type"])

    return writes(
        first,
        begun.parts,
        lambda _, part: map(named, output.push(part)),
        lambda: map(named, output.end()),
        lambda error: named(output.failed(renamed(failure(error)))),
        map(named, output.begin()),
    )


class Output:
    """The output of one response as it grows, and the events of its growth."""

    def __init__(self, body: ResponsesRequest, num_prompt: int, answer_id: str) -> None:
        self._body = body
        self._num_prompt = num_prompt
        self._id = answer_id
        self._created = int(time.time())
        self._status = "in_progress"
        self._error: dict[str, str] | None = None
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the text item that grows
        self._last = Part()
        self._number = -1

    def begin(self) -> Iterator[Event]:
        yield self._event("response.created", response=self.response())
        yield self._event("response.in_progress", response=self.response())

    def push(self, part: Part) -> Iterator[Event]:
        """The events of a part: what it adds to the item that is open, and the items that it begins."""
        self._last = part
        if part.reasoning:
            yield from self._grown("reasoning", part.reasoning)
        if part.text:
            yield from self._grown("message", part.text)
        for call in part.calls:
            yield from self._closed("completed")
            yield from self._called(call)

    def end(self) -> Iterator[Event]:
        """Closes the response; one without any output has an empty text."""
        self._status = "incomplete" if self._last.finish_reason == "length" else "completed"
        if not self._items:
            yield from self._grown("message", "")
        yield from self._closed(self._status)
        yield self._event(f"response.{self._status}", response=self.response())

    def failed(self, error: ApiError) -> Event:
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self._status, self._error = "failed", {"code": code, "message": error.message}
        return self._event("response.failed", response=self.response())

    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        body, is_cut = self._body, self._status == "incomplete"
        effort = body.reasoning.effort if body.reasoning else None
        text = body.text.format if body.text else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "background": False,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "output": [dict(item) for item in self._items],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": effort, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": text.model_dump(by_alias=True, exclude_none=True) if text else {"type": "text"}},
            "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else _dumped(body.tool_choice) or "auto",
            "tools": [{"parameters": None, "strict": None} | _dumped(tool, {"id", "status"}) for tool in body.tools or []],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if self._status != "in_progress" else None,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def _usage(self) -> dict[str, Any]:
        num_new = self._last.num_tokens
        return {
            "input_tokens": self._num_prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": num_new,
            "output_tokens_details": {"reasoning_tokens": self._last.num_reasoning},
            "total_tokens": self._num_prompt + num_new,
        }

    def _grown(self, kind: Kind, text: str) -> Iterator[Event]:
        if self._open is None or self._open["type"] != kind:
            yield from self._closed("completed")
            role: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            self._open = self._added({"type": kind, **role, "content": []})
            yield self._item_event("added", self._open)
            yield self._part_event("content_part.added", part=_part(kind, ""))
            self._open["content"] = [_part(kind, "")]
        part = self._open["content"][0]
        part["text"] += text
        logprobs: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._part_event(f"{TEXT_EVENT[kind]}.delta", delta=text, **logprobs)

    def _closed(self, status: str) -> Iterator[Event]:
        if self._open is None:
            return
        kind, part = self._open["type"], self._open["content"][0]
        logprobs: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._part_event(f"{TEXT_EVENT[kind]}.done", text=part["text"], **logprobs)
        yield self._part_event("content_part.done", part=dict(part))
        self._open["status"] = status
        yield self._item_event("done", self._open)
        self._open = None

    def _called(self, call: Call) -> Iterator[Event]:
        item = self._added({"type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""})
        yield self._item_event("added", item)
        at = {"item_id": item["id"], "output_index": len(self._items) - 1}
        yield self._event("response.function_call_arguments.delta", **at, delta=call.arguments)
        yield self._event("response.function_call_arguments.done", **at, name=call.name, arguments=call.arguments)
        item |= {"arguments": call.arguments, "status": "completed"}
        yield self._item_event("done", item)

    def _added(self, item: dict[str, Any]) -> dict[str, Any]:
        item = {"id": _new(PREFIX[item["type"]]), **item, "status": "in_progress"}
        self._items.append(item)
        return item

    def _item_event(self, what: str, item: dict[str, Any]) -> Event:
        return self._event(f"response.output_item.{what}", output_index=len(self._items) - 1, item=dict(item))

    def _part_event(self, name: str, /, **more: Any) -> Event:
        """An event of the one part that the open item has."""
        item_id = self._items[-1]["id"]
        at = {"item_id": item_id, "output_index": len(self._items) - 1, "content_index": 0}
        return self._event(f"response.{name}", **at, **more)

    def _event(self, name: str, /, **more: Any) -> Event:
        self._number += 1
        return {"type": name, "sequence_number": self._number, **more}


def _part(kind: Kind, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _dumped(model: Any, without: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    return model.model_dump(exclude=without, exclude_none=True) if model is not None else {}


def _new(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
