"""One column of a row → turns or text: what all shapes have in common."""

from __future__ import annotations

import math
from typing import Any

from forge_ray.data.read.strict_json import Reject, loads

Row = dict[str, Any]
SPEAKERS = {  # in lower case, as they are compared
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}
CALLERS = ("function_call", "tool_call")
WEIGHTS = ("weight", "loss", "train")  # names under which rows say whether a turn is trained
JSON_TYPES = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}


def type_name(value: Any) -> str:
    """What a value is in JSON's words; of a free text the reasons say no more, for they outlive the row."""
    return "null" if value is None else JSON_TYPES.get(type(value), f"a {type(value).__name__}")


def quoted(value: Any) -> str:
    """A short value as a reason may show it; of lists and objects their type."""
    return type_name(value) if isinstance(value, (list, dict)) else repr(value)[:42]


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
        raise Reject(f"`{column}` is not a string: {type_name(value)}")
    if not value or value.isspace():
        raise Reject(f"`{column}` is empty")
    return value


def listed(value: Any) -> Any:
    """A column of messages as a list: from JSON text, as CSV files hold it, or from an object of lists, as older versions of
    `datasets` do; another value stays."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return loads(value)
        except Reject:
            return value
    if not isinstance(value, dict) or not all(isinstance(item, list) for item in value.values()):
        return value
    if len({len(item) for item in value.values()}) != 1:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def turns_of(value: Any, column: str, role: str) -> list[Any]:
    """A text as one turn of `role`; messages in OpenAI's or ShareGPT's words as a list of OpenAI's."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return [turn_of(item) for item in value]
    return [{"role": role, "content": string_of(value, column)}]


def role_of(value: Any) -> Any:
    """The role that a name stands for, in any case of letters; a name that is not known stays, to be refused by name."""
    return SPEAKERS.get(value.strip().lower(), value) if isinstance(value, str) else value


def turn_of(value: Any) -> Any:
    """A message in OpenAI's words: `from` is the role, `value` the content, `loss` and `train` the weight."""
    if not isinstance(value, dict):
        return value
    turn = dict(value)
    if turn.get("role") is None and turn.get("from") is not None:
        turn["role"] = turn.pop("from")
    if turn.get("content") is None and "value" in turn:
        turn["content"] = turn.pop("value")
    role = turn.get("role")
    if isinstance(role, str) and role.strip().lower() in CALLERS:
        return {**turn, "role": "assistant", "content": None, "tool_calls": _called(turn.get("content"))}
    turn["role"] = role_of(role)
    return _weighted(turn)


def _weighted(turn: Row) -> Row:
    """The turn with one weight, whatever it is called."""
    weights = {name: turn.pop(name) for name in WEIGHTS if name in turn}
    weights = {name: value for name, value in weights.items() if value is not None}
    for name, value in weights.items():
        is_flag = isinstance(value, bool) and name != "weight"
        if not is_flag and (isinstance(value, (bool, str, list, dict)) or value not in (0, 1)):
            raise Reject(f"a message's `{name}` is not 0 or 1: {quoted(value)}")
    numbers = {int(value) for value in weights.values()}
    if len(numbers) > 1:
        raise Reject(f"a message's {' and '.join(f'`{name}`' for name in weights)} contradict each other")
    return turn | {"weight": numbers.pop()} if numbers else turn


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


def number_of(value: Any) -> float | None:
    """A finite number as fp64; None for one beyond it, and for a text."""
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
