"""Messages as clients send them → the fields of ours (pure).

Clients send the turns of a conversation back as some server answered them: reasoning under one of many names, fields of a
provider that hold nothing, marks for a cache that is not here. What is empty asks for nothing and is left out. What asks for
something stays, and is refused by name when the message is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

KEPT = ("role", "content")  # of a message, also where they are empty
CACHE_MARKS = ("cache_control", "prompt_cache_breakpoint")  # there is no cache here that a client marks
TEXT_NAMES = ("reasoning_content", "reasoning", "thinking")
LIST_NAMES = ("thinking_blocks", "reasoning_details")
PROVIDER = "provider_specific_fields"
REASONING_NAMES = (*TEXT_NAMES, *LIST_NAMES, PROVIDER)
UNREADABLE = "reasoning that another server has encrypted cannot be read here; leave it out"


def as_ours(message: Any) -> Any:
    """A message without what is empty, its reasoning as `reasoning_content`. `ValueError` (`field: rule`) for reasoning that
    cannot be read, or that is not the same under two names."""
    if not isinstance(message, dict):
        return message
    turn = dict(without_what_is_empty(message, KEPT))
    if isinstance(turn.get("refusal"), str) and is_empty(turn.get("content")):
        turn["content"] = turn.pop("refusal")  # the text of that answer
    thoughts = list(_thoughts(turn))
    if isinstance(turn.get("content"), list):
        thoughts.append(("content", "".join(_of_list(turn["content"], "content", ("thinking",)))))
        turn["content"] = [_part(part) for part in turn["content"] if not _is_thought(part)]
    if thoughts := [(path, text) for path, text in thoughts if text]:
        _refuse_two(thoughts)
        turn["reasoning_content"] = thoughts[0][1]
    if isinstance(turn.get("tool_calls"), list):
        turn["tool_calls"] = [_call(call) for call in turn["tool_calls"]]
    return turn


def is_empty(value: Any) -> bool:
    """Whether a value asks for nothing: null, false, "", or a list or an object of such values."""
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or value is False or value == ""


def without_what_is_empty(value: Any, kept: tuple[str, ...]) -> Any:
    """An object without fields that ask for nothing, except for those in `kept`; anything else as it is."""
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if key in kept or (key not in CACHE_MARKS and not is_empty(item))}


def _thoughts(turn: dict[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of each reasoning in the fields of a turn, which are taken out of it. What is no text stays."""
    for name in TEXT_NAMES:
        if isinstance(turn.get(name), str):
            yield place + name, turn.pop(name)
    for name in LIST_NAMES:
        if isinstance(turn.get(name), list):
            path = place + name
            texts = list(_of_list(turn[name], path, ("thinking", "reasoning.text", "reasoning.summary")))
            if len(texts) == len(turn[name]):
                del turn[name]
                yield path, "".join(texts)
    if isinstance(turn.get(PROVIDER), dict):
        inner = {key: value for key, value in turn[PROVIDER].items() if not is_empty(value)}
        yield from _thoughts(inner, f"{PROVIDER}.")
        turn[PROVIDER] = inner
        if not inner:
            del turn[PROVIDER]


def _of_list(items: list[Any], path: str, kinds: tuple[str, ...]) -> Iterator[str]:
    """The texts of the parts that are reasoning; they may be lists of text parts themselves."""
    for number, item in enumerate(items):
        kind = item.get("type") if isinstance(item, dict) else None
        if kind in ("redacted_thinking", "reasoning.encrypted"):
            raise ValueError(f"{path}.{number}: {UNREADABLE}")
        if kind in kinds:
            value = next((item[key] for key in ("thinking", "text", "summary") if item.get(key)), "")
            parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
                raise ValueError(f"{path}.{number}: only parts of type text are reasoning")
            yield "".join(part["text"] for part in parts)


def _refuse_two(thoughts: list[tuple[str, str]]) -> None:
    """The same reasoning may come under several names, cut differently."""
    (first, text), *others = thoughts
    for path, other in others:
        if "".join(other.split()) != "".join(text.split()):
            raise ValueError(f"{path}: it contradicts {first}; send the reasoning once")


def _is_thought(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "thinking"


def _part(part: Any) -> Any:
    """A part of a content; a text may be empty, and a refusal is one."""
    if isinstance(part, dict) and part.get("type") == "refusal":
        part = {"type": "text", "text": part.get("refusal")}
    return without_what_is_empty(part, ("text",))


def _call(call: Any) -> Any:
    """A call without what is empty, its arguments as JSON text; without any, they are an empty object."""
    if not isinstance(call, dict):
        return call
    kept = {key: item for key, item in call.items() if key == "function" or not is_empty(item)}
    if isinstance(function := call.get("function"), dict):
        arguments = function.get("arguments") or {}
        text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
        others = {key: item for key, item in function.items() if key != "arguments" and not is_empty(item)}
        kept["function"] = others | {"arguments": text}
    return kept


def without_thought(turn: dict[str, Any], closing: str) -> dict[str, Any]:
    """An assistant's turn whose content begins with `<think>…</think>`, its reasoning apart; `closing`: the mark with which
    the model's template closes a reasoning, and only that one counts."""
    content = turn.get("content")
    if turn["role"] != "assistant" or not isinstance(content, str) or not closing.startswith("</"):
        return turn
    opening = closing.replace("/", "", 1)
    thought, closed, answer = content.lstrip().removeprefix(opening).partition(closing)
    if not closed or not content.lstrip().startswith(opening) or turn.get("reasoning_content"):
        return turn
    reasoning = {"reasoning_content": thought.strip("\n")} if thought.strip() else {}
    return turn | {"content": answer.lstrip("\n")} | reasoning
