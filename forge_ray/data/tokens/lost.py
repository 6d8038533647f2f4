"""Whether a rendered conversation holds everything of its messages that carries meaning (pure).

A template that has no place for something leaves it out without a word: a tool call becomes an empty answer, a system prompt
is never seen. Each text, call, argument, result, name and reasoning is looked for in what was written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

PLACE = "this model's template has no place for {}"
CALLS, RESULTS, TOOLS = PLACE.format("tool calls"), PLACE.format("tool results"), PLACE.format("declared tools")
SYSTEM, REASONING, NAMES = PLACE.format("a system prompt"), PLACE.format("reasoning"), PLACE.format("names of speakers")
PART = "this model's template leaves out a part of a message"
AS_TEXT = "`data.tools: text` in the run file has tools, calls and results written as text (docs/guides/tool-calls.md)"


def lost(text: str, messages: Sequence[dict[str, Any]]) -> str:
    """What of a conversation the text does not hold, as the reason of a `Reject`; "" where nothing is missing. Reasoning is
    looked for in the last turn alone: in the others it is the template's choice, for serving renders them likewise.

    Each is first looked for from where the one before was found, so that a long conversation is read once."""
    at = 0
    for number, message in enumerate(messages):
        is_last = number + 1 == len(messages)
        for what, value in _meanings(message, is_last):
            if (place := _place(text, value, at)) < 0 and _place(text, value, 0) < 0:
                return what
            at = max(at, place)
    return ""


def remedy(reasons: Iterable[str]) -> str:
    """What takes rows that were rejected for these reasons; "" where the reasons say it themselves."""
    return AS_TEXT if {CALLS, RESULTS, TOOLS}.intersection(reasons) else ""


def undeclared(prompt: str, tools: list[Any] | None) -> str:
    """The reason where a tool is not named in front of the answers."""
    names = (tool.get("function", {}).get("name") for tool in tools or () if isinstance(tool, dict))
    return "" if all(name is None or str(name) in prompt for name in names) else TOOLS


def _meanings(message: dict[str, Any], is_last: bool) -> Iterator[tuple[str, Any]]:
    role = message["role"]
    whole = SYSTEM if role == "system" else RESULTS if role == "tool" else PART
    for content in _texts(message.get("content")):
        yield whole, content
    for call in message.get("tool_calls") or ():
        function = call["function"]
        yield CALLS, function["name"]
        arguments = function["arguments"]
        for leaf in _leaves(json.loads(arguments) if isinstance(arguments, str) else arguments):
            yield CALLS, leaf
    if is_last and role == "assistant" and message.get("reasoning_content"):
        yield REASONING, message["reasoning_content"]
    if message.get("name") and role != "tool":
        yield NAMES, message["name"]


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]


def _leaves(value: Any) -> Iterator[Any]:
    """Keys and values of arguments."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _place(text: str, value: Any, at: int) -> int:
    """Where from `at` on a text or a leaf is, -1 if nowhere: as it is less the white space around it, or as JSON or Python
    writes it."""
    return next((place for form in _forms(value) if (place := text.find(form, at)) >= 0), -1)


def _forms(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
        written = json.dumps(value.strip(), ensure_ascii=False)[1:-1]
        yield from (written, json.dumps(value.strip())[1:-1], _html(written))
    else:
        yield from (json.dumps(value), str(value))


def _html(written: str) -> str:
    """As jinja's own `tojson` writes it."""
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("'", "\\u0027")
