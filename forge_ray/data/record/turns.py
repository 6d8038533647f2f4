"""Messages, tool calls and tools: what a conversation must be so that no template garbles it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from forge_ray.data.read.strict_json import Reject, checked, loads, reject_deep
from forge_ray.data.record.columns import quoted, turn_of, type_name
from forge_ray.data.record.images import Images, image_digest
from forge_ray.data.record.older_calls import has_older_calls, with_tool_calls
from forge_ray.data.record.reasoning import EMPTY, PARTS, named_once, text_of

ROLES = ("system", "user", "assistant", "tool")
PLAIN = ("user", "assistant", "system")
MESSAGE_KEYS = {"role", "content", "reasoning_content", "weight", "name", "tool_calls", "tool_call_id"}
# Of a message or a part, what exports say about it and no model reads
NOTES = frozenset({
    "id", "object", "status", "created", "created_at", "timestamp", "index", "model", "usage", "markdown", "detail",
    "finish_reason", "stop_reason", "logprobs", "provider_specific_fields", "cache_control",
})  # fmt: skip
MEANINGLESS = (("type", "message"), ("prefix", False))  # a key that means something with another value
NO_ARGUMENTS = "a tool call's arguments are not a JSON object"
Message = dict[str, Any]


def content_of(kind: str, row: dict[str, Any], images: Images) -> dict[str, Any]:
    """Canonical content of a chat, preference or feedback row whose columns already have their canonical names."""
    content: dict[str, Any] = {"messages": messages_of(row.get("messages"), "messages", images)}
    declared: set[str] | None = None
    if tools := tools_list(row.get("tools") or []):
        content["tools"], declared = tools, _names(tools)
    if kind == "chat":
        content["messages"] = _with_untrained_greeting(content["messages"])
        check_conversation(content["messages"], declared)
        if not any(message["role"] == "assistant" and message.get("weight", 1) for message in content["messages"]):
            raise Reject("no assistant turn to train on")
        return content
    content["messages"] = _without_weights(content["messages"])
    for column in ("chosen", "rejected") if kind == "preference" else ("answer",):
        answer = _without_weights(messages_of(row.get(column), column, images))
        if answer[0]["role"] != "assistant" or any(message["role"] not in ("assistant", "tool") for message in answer):
            raise Reject(f"`{column}` is not an assistant's answer")
        check_conversation([*content["messages"], *answer], declared)
        content[column] = answer
    if kind == "feedback":
        return content | {"label": row["label"]}
    if content["chosen"] == content["rejected"]:
        raise Reject("`chosen` and `rejected` are the same")
    return content | {name: row[name] for name in ("margin", "unusable_margin") if name in row}


def _without_weights(messages: list[Message]) -> list[Message]:
    """A preference or feedback trains its answers as a whole, so a weight would only make two records of one."""
    return [{key: item for key, item in message.items() if key != "weight"} for message in messages]


def _with_untrained_greeting(messages: list[Message]) -> list[Message]:
    """An assistant's turns before the first of the user answer nothing: they stay in the context, untrained."""
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), 0)
    if all(message["role"] != "assistant" for message in messages[:first]):
        return messages
    greeting = [m | {"weight": 0} if m["role"] == "assistant" else m for m in messages[:first]]
    return [*greeting, *messages[first:]]


def messages_of(value: Any, column: str, images: Images) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Reject(f"`{column}` is not a non-empty list{'' if value == [] else f': {type_name(value)}'}")
    turns = with_tool_calls(value) if has_older_calls(value) else value
    return [_message(message, images) for message in turns]


def _message(value: Any, images: Images) -> Message:
    """One message without its empty fields, so that a Parquet row and a JSON line of the same chat are the same record."""
    if type(value) is dict and len(value) == 2:  # nearly all messages of nearly all files: nothing to change
        content, role = value.get("content"), value.get("role")
        if type(content) is str and role in PLAIN and (role != "assistant" or _is_plain_answer(content)):
            return value
    if not isinstance(value, dict):
        raise Reject(f"a message is not an object: {type_name(value)}")
    message = _without_notes(turn_of(value))
    if parts := message.pop("parts", None):  # as a table of ours has them
        message["content"] = parts
    role = message.get("role")
    if role is None:
        raise Reject("a message has no role")
    if role not in ROLES:
        raise Reject(f"a message has no known role: {quoted(role)}")
    if isinstance(message.get("content"), list):
        message["content"] = _parts(message, images)
    message = named_once({key: item for key, item in message.items() if item is not None})
    if unknown := set(message) - MESSAGE_KEYS:
        raise Reject(f"a message has an unknown key {_first(unknown)!r}")
    for key in ("name", "tool_call_id"):
        if not isinstance(message.get(key, ""), str):
            raise Reject(f"a message's `{key}` is not a string: {type_name(message[key])}")
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None:
        if role != "assistant" or not isinstance(calls, list):
            raise Reject("`tool_calls` is not a list of an assistant turn")
        message["tool_calls"] = _calls(calls)
    if content is None and not calls:
        raise Reject("a message has no content")
    if content is not None and not isinstance(content, (str, list)):
        raise Reject(f"a message's content is not a string: {type_name(content)}")
    if role == "assistant" and not calls and not str(content).strip():
        raise Reject("an assistant turn is empty")
    return message if message.pop("weight", 1) else {**message, "weight": 0}


def _is_plain_answer(content: str) -> bool:
    start = content.lstrip()
    return bool(start) and not start.startswith("<think>")


def _without_notes(value: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that carry nothing: null, an empty `tool_calls` or unknown key, and notes about the message."""
    read = MESSAGE_KEYS - {"tool_calls"}
    return {
        key: item
        for key, item in value.items()
        if item is not None and (key in read or (item not in EMPTY and key not in NOTES and (key, item) not in MEANINGLESS))
    }


def _first(keys: Iterable[Any]) -> str:
    return min(str(key) for key in keys)[:40]


def _parts(message: Message, images: Images) -> str | list[dict[str, str]] | None:
    """Content in parts; where all are text, one string. Moves parts that are reasoning to the message's own key."""
    role = message["role"]
    parts: list[dict[str, str]] = []
    reasoning: list[str] = []
    for value in message["content"]:
        if not isinstance(value, dict):
            raise Reject(f"a content part is not an object: {type_name(value)}")
        kind = value.get("type")
        if kind in PARTS:
            if parts:
                raise Reject(f"a content part of type {kind!r} comes after the answer began")
            reasoning.append(text_of([value], str(kind)))
            continue
        part = {key: item for key, item in value.items() if item not in EMPTY and key not in NOTES}
        part.pop("type", None)
        kind = "text" if kind in ("input_text", "output_text") else kind
        source: Any = value.get(kind) if kind in ("text", "image", "image_url") else None
        part.pop("text" if kind == "text" else str(kind), None)
        if isinstance(source, dict):
            source = source.get("url")
        if kind not in ("text", "image", "image_url"):
            raise Reject(f"a content part is of an unknown type {str(kind)[:40]!r}")
        if part:
            raise Reject(f"a content part has an unknown key {_first(part)!r}")
        if not isinstance(source, str):
            raise Reject(f"a content part has no {'text' if kind == 'text' else 'image'}")
        if kind == "text":
            parts.append({"type": "text", "text": source})
        elif role != "user":
            raise Reject("an image is not in a user's turn")
        else:
            parts.append({"type": "image", "image": image_digest(source, images)})
    if any(text.strip() for text in reasoning):
        if message.get("reasoning_content") not in EMPTY:
            raise Reject("a message has reasoning twice: `reasoning_content` and a content part")
        message["reasoning_content"] = "".join(reasoning)
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts) if parts else None


def _calls(values: list[Any]) -> list[dict[str, Any]]:
    calls = [_call(value) for value in values]
    ids = [call["id"] for call in calls if "id" in call]
    if ids and len(ids) != len(calls):
        raise Reject("a tool call has no id, others of its turn do")
    if len(set(ids)) != len(ids):
        raise Reject("two tool calls of a turn have the same id")
    return calls


def _call(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("function"), dict):
        raise Reject("a tool call has no `function`")
    call = {key: item for key, item in value.items() if _means_something(key, item, ("id", "type", "function"))}
    function = {k: item for k, item in call["function"].items() if _means_something(k, item, ("name", "arguments"))}
    if unknown := (set(call) - {"id", "type", "function"}) | (set(function) - {"name", "arguments"}):
        raise Reject(f"a tool call has an unknown key {_first(unknown)!r}")
    if call.get("type", "function") != "function":
        raise Reject(f"a tool call is not of type `function`: {quoted(call['type'])}")
    if not isinstance(call.get("id", "-"), str):
        raise Reject(f"a tool call's id is not a string: {type_name(call['id'])}")
    if call.get("id") == "":
        raise Reject("a tool call's id is empty")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise Reject("a tool call has no function name")
    # A Parquet struct cannot be empty, so a call without arguments has none there.
    return {**call, "function": {"name": function["name"], "arguments": arguments_text(function.get("arguments", {}))}}


def _means_something(key: str, item: Any, keys: tuple[str, ...]) -> bool:
    """Whether a key of a call is one of `keys`, or not one that carries nothing (`index` is of a stream)."""
    return item is not None and (key in keys or (item not in EMPTY and key != "index"))


def arguments_text(value: Any) -> str:
    """Arguments as JSON text, as OpenAI has them: text is kept as it is, an object is written in the order of its keys.
    Text in a text is unpacked, and an empty one is no arguments."""
    text = value
    try:
        while isinstance(value, str):
            text = value
            value = loads(value) if value.strip() else {}
    except Reject as reason:
        raise (Reject(f"{NO_ARGUMENTS}: a string") if str(reason) == "not JSON" else reason) from None
    if not isinstance(value, dict):
        raise Reject(f"{NO_ARGUMENTS}: {type_name(value)}")
    reject_deep(value)
    checked(value)
    return text if isinstance(text, str) and text.strip() else json.dumps(value, ensure_ascii=False)


def same_arguments(text: str) -> str:
    """The one text of all that mean the same: keys sorted, no other difference than of values."""
    return json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False)


def tools_list(value: Any) -> list[Any]:
    """The declared tools, which a table may hold as JSON text."""
    try:
        tools = loads(value) if isinstance(value, str) else value
    except Reject as reason:
        raise (Reject("`tools` is not a list: a string") if str(reason) == "not JSON" else reason) from None
    if not isinstance(tools, list):
        raise Reject(f"`tools` is not a list: {type_name(tools)}")
    return tools


def _names(tools: list[Any]) -> set[str]:
    reject_deep(tools)
    checked(tools)
    names: set[str] = set()
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise Reject("a tool is not of type `function` with a name")
        if name in names:
            raise Reject(f"two tools have the same name: {quoted(name)}")
        names.add(name)
    return names


def check_conversation(messages: list[Message], declared: set[str] | None) -> None:
    """Refuses orders of roles that templates drop or misplace; two turns of one side in a row, and a system message among
    them, are theirs to refuse."""
    waiting: list[str | None] = []  # ids of the calls that no result has answered yet
    if all(message["role"] != "user" for message in messages):
        raise Reject("no turn is the user's")
    for message in messages:
        role = message["role"]
        if role == "tool":
            _answer(message, waiting)
            continue
        if waiting:
            raise Reject("a tool call is not answered")
        if calls := message.get("tool_calls"):
            names = [call["function"]["name"] for call in calls]
            if unknown := [name for name in names if declared is not None and name not in declared]:
                raise Reject(f"a tool is called that `tools` does not declare: {quoted(unknown[0])}")
            waiting = [call.get("id") for call in calls]


def _answer(message: Message, waiting: list[str | None]) -> None:
    name = message.get("tool_call_id")
    if not waiting:
        raise Reject("a tool's message answers no call")
    if waiting[0] is None:  # calls without ids are answered in their order
        waiting.pop(0)
    elif name is None:
        raise Reject("a tool's message has no `tool_call_id`")
    elif name not in waiting:
        raise Reject("a tool's message answers no call")
    else:
        waiting.remove(name)
