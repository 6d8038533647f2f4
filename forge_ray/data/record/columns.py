"""One column of a row → turns or text: what all shapes have in common."""

from __future__ import annotations

from typing import Any

from forge_ray.data.read.strict_json import Reject, loads

Row = dict[str, Any]
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


def lookup(row: Row, path: str) -> Any:
    """The value at a dotted path, None where there is none; a column whose own name has dots comes first."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def string_of(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise Reject(f"`{column}` is not a string")
    if not value or value.isspace():
        raise Reject(f"`{column}` is empty")
    return value


def turns_of(value: Any, column: str, role: str) -> list[Any]:
    """A text as one turn of `role`; messages in OpenAI's or ShareGPT's words as a list of OpenAI's."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return [_turn(item) for item in value]
    return [{"role": role, "content": string_of(value, column)}]


def _turn(value: Any) -> Any:
    if not isinstance(value, dict) or value.get("from") is None:
        return value
    turn = {key: item for key, item in value.items() if key not in ("from", "value")}
    speaker, content = value["from"], value.get("value")
    if speaker == "function_call":
        return {**turn, "role": "assistant", "tool_calls": _called(content)}
    return {**turn, "role": SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else None, "content": content}


def _called(value: Any) -> list[Any]:
    """ShareGPT's call: `{"name", "arguments"}` or several of them, mostly as JSON text."""
    try:
        calls = loads(value) if isinstance(value, str) else value
    except Reject:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or any(not isinstance(call, dict) or "name" not in call for call in calls):
        raise Reject("a `function_call` turn is not a JSON call")
    return [{"type": "function", "function": call} for call in calls]


def system_turns(value: Any) -> list[Any]:
    """An optional system prompt: an empty one is none."""
    return [{"role": "system", "content": string_of(value, "system")}] if value not in (None, "") else []


def untrained(turns: list[Any]) -> list[Any]:
    """Turns of a prompt are read, not learned, unless they say so themselves."""
    return [
        {**turn, "weight": 0} if isinstance(turn, dict) and turn.get("role") == "assistant" and turn.get("weight") is None
        else turn
        for turn in turns
    ]  # fmt: skip


def scalar_text(value: Any, column: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) and abs(value) < 1 << 64 else string_of(value, column)
