"""The form in which a model's template takes a conversation: probed once, then given to every one.

Templates differ in small things: whether a content is a text or a list of parts, whether arguments of calls are an object or
JSON text, what stands for the content of a turn that is calls alone, which ids of calls they take. None of it carries
meaning, so a conversation is put into the form that the template writes out whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.answers import Render
from forge_ray.data.tokens.template import Messages

NoContent = Literal["absent", "null", "empty"]
ID_LENGTH = 9  # the only ids that some templates take have nine letters and digits
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Adaptation:
    """What is changed of a conversation before the template sees it. `calls` False: no form of a call was written out."""

    in_parts: bool = False
    arguments_as_text: bool = False
    no_content: NoContent = "absent"
    short_ids: bool = False
    calls: bool = False
    results: bool = False
    parallel: bool = False


CALL = {"name": "CALLEDWORD", "arguments": '{"KEYWORD": "VALUEWORD"}'}
OTHER = {"name": "OTHERCALLWORD", "arguments": '{"OTHERKEYWORD": "OTHERVALUEWORD"}'}
IDS = ("call_Probe0000001", "call_Probe0000002")


def probe_tools() -> list[Any]:
    """Declarations of the functions that the probes call."""
    return [
        {
            "type": "function",
            "function": {
                "name": call["name"],
                "description": "A probe.",
                "parameters": {"type": "object", "properties": {key: {"type": "string", "description": "A probe."}}},
            },
        }
        for call, key in ((CALL, "KEYWORD"), (OTHER, "OTHERKEYWORD"))
    ]


def call_turn(*calls: dict[str, str], content: str = "") -> dict[str, Any]:
    tool_calls = [{"id": name, "type": "function", "function": dict(call)} for name, call in zip(IDS, calls, strict=False)]
    return {"role": "assistant", **({"content": content} if content else {}), "tool_calls": tool_calls}


def result_turn(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": IDS[number], "name": (CALL, OTHER)[number]["name"], "content": content}


def adaptation_of(render: Render) -> Adaptation:
    """The first form in which the template writes everything of the probes, else the one in which it writes most."""
    question, answer = {"role": "user", "content": "QUESTIONWORD"}, {"role": "assistant", "content": "ANSWERWORD"}
    in_parts = next(
        (
            parts
            for parts in (False, True)
            if writes(render, Adaptation(in_parts=parts), [question, answer], None, ("QUESTIONWORD", "ANSWERWORD"))
        ),
        False,
    )
    no_contents: tuple[NoContent, ...] = ("absent", "null", "empty")
    forms = [
        Adaptation(in_parts, as_text, no_content, short_ids)
        for short_ids, as_text, no_content in itertools.product((False, True), (False, True), no_contents)
    ]
    once = [question, call_turn(CALL)]
    round_trip = [*once, result_turn(0, "RESULTWORD"), answer]
    twice = [question, call_turn(CALL, OTHER), result_turn(0, "RESULTWORD"), result_turn(1, "OTHERRESULTWORD"), answer]
    one, two = ("CALLEDWORD", "KEYWORD", "VALUEWORD"), ("OTHERCALLWORD", "OTHERKEYWORD", "OTHERVALUEWORD")
    best = Adaptation(in_parts)
    for form in forms:
        tools = probe_tools()
        calls = writes(render, form, once, tools, one)
        results = calls and writes(render, form, round_trip, tools, (*one, "RESULTWORD", "ANSWERWORD"))
        parallel = results and writes(render, form, twice, tools, (*one, *two, "RESULTWORD", "OTHERRESULTWORD"))
        if (calls, results, parallel) > (best.calls, best.results, best.parallel):
            best = Adaptation(
                form.in_parts, form.arguments_as_text, form.no_content, form.short_ids, calls, results, parallel
            )
        if parallel:
            break
    return best


def writes(render: Render, form: Adaptation, messages: Messages, tools: list[Any] | None, words: Sequence[str]) -> bool:
    """Whether the template writes all of `words` of a conversation in this form. What the declarations of tools hold counts
    only where it stands there once more."""
    try:
        text = render(adapted(messages, form), tools, False)
        declared = render(adapted([messages[0]], form), tools, False) if tools else ""
    except Reject:
        return False
    if form.in_parts and ("'type': 'text'" in text or '"type": "text"' in text):  # the list itself was written out
        return False
    return all(text.count(word) > declared.count(word) for word in words)


def adapted(messages: Messages, form: Adaptation) -> list[dict[str, Any]]:
    """The conversation in a form, without `weight` and what is empty; `Reject` for arguments that are no JSON."""
    ids = _short_ids(messages) if form.short_ids else {}
    return [_adapted(message, form, ids) for message in messages]


def _adapted(message: dict[str, Any], form: Adaptation, ids: dict[str, str]) -> dict[str, Any]:
    if len(message) == 2 and "content" in message and not form.in_parts:  # role and content: nearly all
        return message
    turn = {key: item for key, item in message.items() if key != "weight" and item is not None}
    if isinstance(turn.get("tool_call_id"), str):
        turn["tool_call_id"] = ids.get(turn["tool_call_id"], turn["tool_call_id"])
    if calls := turn.get("tool_calls"):
        turn["tool_calls"] = [_call(call, form, ids) for call in calls]
        if not turn.get("content"):
            turn.pop("content", None)
            if form.no_content != "absent":
                turn["content"] = None if form.no_content == "null" else ""
    if reasoning := turn.get("reasoning_content"):  # by each name that a template may ask for
        turn |= {"reasoning": reasoning, "thinking": reasoning}
    if form.in_parts and isinstance(turn.get("content"), str):
        turn["content"] = [{"type": "text", "text": turn["content"]}]
    return turn


def _call(call: Any, form: Adaptation, ids: dict[str, str]) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    parsed = arguments_of(function)
    written = json.dumps(parsed, ensure_ascii=False) if form.arguments_as_text else parsed
    named = {"id": ids.get(call["id"], call["id"])} if isinstance(call.get("id"), str) else {}
    return {**call, **named, "function": {**function, "arguments": written}}


def arguments_of(function: dict[str, Any]) -> Any:
    """The arguments of a call, which records and requests hold as JSON text. Raises `Reject` for any other text, and for one
    whose escapes are halves of characters: no tokenizer takes them."""
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments or "{}")
        if "\\u" in arguments:
            json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise Reject("a tool call's arguments are not JSON") from None
    return parsed


def with_short_ids(messages: Messages) -> list[dict[str, Any]]:
    """The conversation with ids of calls of nine letters and digits; calls without one, and their results, get one."""
    numbered = _numbered(messages)
    ids = _short_ids(numbered)
    turns = []
    for message in numbered:
        turn = dict(message)
        if turn.get("tool_calls"):
            turn["tool_calls"] = [{**call, "id": ids[call["id"]]} for call in turn["tool_calls"]]
        if turn.get("tool_call_id"):
            turn["tool_call_id"] = ids[turn["tool_call_id"]]
        turns.append(turn)
    return turns


def _numbered(messages: Messages) -> list[dict[str, Any]]:
    """The conversation with an id for each call that has none; results follow their calls in order."""
    turns, waiting, count = [], list[str](), 0
    for message in messages:
        turn = dict(message)
        if calls := turn.get("tool_calls"):
            turn["tool_calls"] = []
            for call in calls:
                count += 1
                turn["tool_calls"].append({"type": "function", **call, "id": call.get("id") or f"call {count}"})
            waiting = [call["id"] for call in turn["tool_calls"]]
        elif turn["role"] == "tool" and not turn.get("tool_call_id") and waiting:
            turn["tool_call_id"] = waiting.pop(0)
        turns.append(turn)
    return turns


def _short_ids(messages: Messages) -> dict[str, str]:
    """Each id of the conversation → one of nine letters and digits, which follows from it. Those that are so stay."""
    names = [
        name
        for message in messages
        for name in (*(call.get("id") for call in message.get("tool_calls") or ()), message.get("tool_call_id"))
        if isinstance(name, str)
    ]
    ids: dict[str, str] = {name: name for name in names if len(name) == ID_LENGTH and name.isalnum() and name.isascii()}
    taken = set(ids)
    for name in names:
        salt = 0
        while name not in ids:
            number = int.from_bytes(hashlib.sha256(f"{salt}/{name}".encode()).digest()[:8], "big")
            short = "".join(ALPHABET[number // len(ALPHABET) ** place % len(ALPHABET)] for place in range(ID_LENGTH))
            salt += 1
            if short not in taken:
                ids[name] = short
                taken.add(short)
    return ids
