"""Requests and responses of OpenAI's chat API, as a client of another system writes and reads them (pure)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

OURS = ("model", "messages", "tools", "stream", "n")  # fields of a request that the rows and the evaluation decide
NO_COMPLETION = "the answer is not a chat completion"
NO_TEXT = "the answer holds half of a surrogate pair, which is not text"


@dataclass(frozen=True)
class ChatAnswer:
    """An answer: its text, its calls (name and arguments), and which model gave it, as the server says."""

    text: str
    calls: tuple[dict[str, Any], ...]
    finish_reason: str
    answered_by: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Unanswered:
    """A request without an answer: the reason, which holds nothing of the row, and the server's own words for a person.
    `is_outage`: it was tried again and again, so it is not about this request."""

    reason: str
    message: str = ""
    is_outage: bool = False


@dataclass(frozen=True)
class Again:
    """A try that another one may follow, after `wait_s` seconds where the server says so. `is_busy`: the server works, and
    has too many requests."""

    reason: str
    message: str = ""
    wait_s: float | None = None
    is_busy: bool = False


def request_of(
    model: str,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Any] | None,
    max_new_tokens: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The body of a request for a greedy answer; `options` are more fields of it, and None leaves one out."""
    body = {"model": model, "messages": wire_messages(messages), "max_tokens": max_new_tokens, "temperature": 0}
    body |= {"tools": list(tools)} if tools else {}
    return {name: value for name, value in (body | dict(options)).items() if value is not None}


def wire_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns of a record as the API takes them: without weights and reasoning, every call with an id that its result has."""
    turns: list[dict[str, Any]] = []
    waiting: list[str] = []
    for number, message in enumerate(messages):
        turn: dict[str, Any] = {name: message[name] for name in ("role", "content", "name") if name in message}
        if calls := message.get("tool_calls"):
            ids = [call.get("id") or f"call_{number}_{place}" for place, call in enumerate(calls)]
            waiting = list(ids)
            turn["tool_calls"] = [
                {"id": identifier, "type": "function", "function": dict(call["function"])}
                for identifier, call in zip(ids, calls, strict=True)
            ]
        if message["role"] == "tool":
            turn.pop("name", None)
            turn["tool_call_id"] = message.get("tool_call_id") or waiting[0]
            waiting = [one for one in waiting if one != turn["tool_call_id"]]
        turns.append(turn)
    return turns


def error_of(content: bytes, key: str) -> tuple[str, str]:
    """(code, message) of a response, as far as it has them. A code is a word of the API, and never text of a row."""
    try:
        error = json.loads(content)["error"]
        codes = [error[name] for name in ("code", "type") if isinstance(error.get(name), str)]
        code = next((one for one in codes if one.replace("_", "").isalnum() and len(one) <= 64), "")
        message = str(error.get("message", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        code, message = "", content[:2000].decode(errors="replace")
    message = message.encode(errors="replace").decode()  # a lone surrogate cannot be written
    return code, (message.replace(key, "…") if key else message)[:200]


def reply_of(content: bytes) -> ChatAnswer | Unanswered:
    """What a response of status 200 says."""
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        calls = tuple(_call(call["function"]) for call in message.get("tool_calls") or ())
        usage = body.get("usage") or {}
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        answered_by = " ".join(str(body[name]) for name in ("model", "system_fingerprint") if body.get(name))
        if not isinstance(text, str):
            return Unanswered(NO_COMPLETION)
        finish_reason = str(choice.get("finish_reason") or "")
        if not _is_text([text, calls, finish_reason, answered_by]):
            return Unanswered(NO_TEXT)
        return ChatAnswer(text, calls, finish_reason, answered_by[:200], counts[0], counts[1])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        return Unanswered(NO_COMPLETION)


def _is_text(value: Any) -> bool:
    """Whether all of it can be written: an escaped half of a surrogate pair is not text."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _call(function: dict[str, Any]) -> dict[str, Any]:
    """Name and arguments; arguments that are not JSON stay text, which equals no reference."""
    name, arguments = function["name"], function.get("arguments") or "{}"
    if not isinstance(name, str):
        raise TypeError(name)
    with suppress(ValueError, RecursionError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {"name": name, "arguments": arguments}
