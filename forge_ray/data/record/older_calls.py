"""OpenAI's older form of calls (`functions`, `function_call`, results of role `function`) → the newer one, as one record.

The older form has no ids: a result answers the call of the turn before it, and of no other one.
"""

from __future__ import annotations

from typing import Any

from forge_ray.data.read.strict_json import Reject, loads
from forge_ray.data.record.columns import Row, quoted
from forge_ray.data.record.reasoning import EMPTY

DECLARATION = {"name", "description", "parameters", "strict"}


def declared_tools(row: Row) -> Any:
    """The tools of a row, or its functions as such; other columns of the name `functions` are none."""
    functions, tools = row.get("functions"), row.get("tools")
    if functions in EMPTY:
        return tools
    try:
        functions = loads(functions) if isinstance(functions, str) else functions
    except Reject:
        return tools
    if not isinstance(functions, list) or not functions or not all(map(_is_declaration, functions)):
        return tools
    own = [{"type": "function", "function": function} for function in functions]
    if tools not in EMPTY and (loads(tools) if isinstance(tools, str) else tools) != own:
        raise Reject("`tools` and `functions` are not the same")
    return own


def _is_declaration(function: Any) -> bool:
    return isinstance(function, dict) and isinstance(function.get("name"), str) and DECLARATION.issuperset(function)


def has_older_calls(turns: list[Any]) -> bool:
    return any(isinstance(turn, dict) and ("function_call" in turn or _is_result(turn)) for turn in turns)


def _is_result(turn: Row) -> bool:
    role = turn.get("role") or turn.get("from")
    return isinstance(role, str) and role.strip().lower() == "function"


def with_tool_calls(turns: list[Any]) -> list[Any]:
    """The turns with `tool_calls`, and results without the name that their call has; raises `Reject`."""
    newer: list[Any] = []
    called: Any = None  # the function that the turn before calls
    for turn in turns:
        if not isinstance(turn, dict):
            newer.append(turn)
            continue
        turn = dict(turn)
        call = turn.pop("function_call", None)
        if call not in EMPTY:
            if turn.get("tool_calls") not in EMPTY:
                raise Reject("a message has `tool_calls` and `function_call`")
            turn["tool_calls"] = [{"type": "function", "function": call}]
        elif _is_result(turn):
            name = turn.pop("name", None)
            if called is not None and name not in (None, called):
                raise Reject(f"a function's result is not of the function that was called: {quoted(name)}")
            turn.pop("from", None)
            turn["role"] = "tool"
        called = call.get("name") if isinstance(call, dict) else None
        newer.append(turn)
    return newer
