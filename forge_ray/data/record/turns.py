"""Messages, tool calls and tools: what a conversation must be so that no template garbles it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from forge_ray.data.read.strict_json import Reject, checked, loads, reject_deep
from forge_ray.data.record.images import Images, image_digest

ROLES = ("system", "user", "assistant", "tool")
PLAIN = ("user", "assistant", "system")
MESSAGE_KEYS = {"role", "content", "weight", "name", "tool_calls", "tool_call_id"}
NO_ARGUMENTS = "a tool call's arguments are not a JSON object"
Message = dict[str, Any]


def content_of(kind: str, row: dict[str, Any], images: Images) -> dict[str, Any]:
    """Canonical content of a chat, preference or feedback row whose columns already have their canonical names."""
    content: dict[str, Any] = {"messages": messages_of(row.get("messages"), "messages", images)}
    declared: set[str] | None = None
    if tools := tools_list(row.get("tools") or []):
        content["tools"], declared = tools, _names(tools)
    if kind == "chat":
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
    return content


def _without_weights(messages: list[Message]) -> list[Message]:
    """A preference or feedback trains its answers as a whole, so a weight would only make two records of one."""
    return [{key: item for key, item in message.items() if key != "weight"} for message in messages]


def messages_of(value: Any, column: str, images: Images) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Reject(f"`{column}` is not a non-empty list")
    return [_message(message, images) for message in value]


def _message(value: Any, images: Images) -> Message:
    """One message without its empty fields, so that a Parquet row and a JSON line of the same chat are the same record."""
    if type(value) is dict and len(value) == 2:  # nearly all messages of nearly all files: nothing to change
        content, role = value.get("content"), value.get("role")
        if type(content) is str and role in PLAIN and (role != "assistant" or (content and not content.isspace())):
            return value
    if not isinstance(value, dict):
        raise Reject("a message is not an object")
    message = {key: item for key, item in value.items() if item is not None and (key, item) != ("tool_calls", [])}
    if parts := message.pop("parts", None):  # as a table of ours has them
        message["content"] = parts
    role = message.get("role")
    if "function_call" in message or role == "function":
        raise Reject("`function_call` is not read: use `tool_calls`")
    if unknown := set(message) - MESSAGE_KEYS:
        raise Reject(f"a message has an unknown key {_first(unknown)!r}")
    if role == "developer":  # OpenAI's newer name
        message["role"] = role = "system"
    if role not in ROLES:
        raise Reject("a message has no known role")
    for key in ("name", "tool_call_id"):
        if not isinstance(message.get(key, ""), str):
            raise Reject(f"a message's `{key}` is not a string")
    if isinstance(message.get("content"), list):
        message["content"] = _parts(message["content"], role, images)
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None:
        if role != "assistant" or not isinstance(calls, list):
            raise Reject("`tool_calls` is not a list of an assistant turn")
        message["tool_calls"] = _calls(calls)
    if content is None and not calls:
        raise Reject("a message has no content")
    if content is not None and not isinstance(content, (str, list)):
        raise Reject("a message's content is not a string")
    if role == "assistant" and not calls and not str(content).strip():
        raise Reject("an assistant turn is empty")
    weight = message.pop("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise Reject("a message's weight is not 0 or 1")
    return message if weight else {**message, "weight": 0}  # a Parquet column may say 0.0


def _first(keys: Iterable[Any]) -> str:
    return min(str(key) for key in keys)[:40]


def _parts(values: list[Any], role: str, images: Images) -> str | list[dict[str, str]] | None:
    """Content in parts; where all are text, one string."""
    parts: list[dict[str, str]] = []
    for value in values:
        if not isinstance(value, dict):
            raise Reject("a content part is not an object")
        part = {key: item for key, item in value.items() if item is not None and key not in ("detail", "cache_control")}
        kind = part.pop("type", None)
        source: Any = part.pop(kind, None) if kind in ("text", "image", "image_url") else None
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
    call = {key: item for key, item in value.items() if item is not None and key != "index"}  # `index`: of a stream
    function = {key: item for key, item in call["function"].items() if item is not None}
    if unknown := (set(call) - {"id", "type", "function"}) | (set(function) - {"name", "arguments"}):
        raise Reject(f"a tool call has an unknown key {_first(unknown)!r}")
    if call.get("type", "function") != "function":
        raise Reject("a tool call is not of type `function`")
    if not isinstance(call.get("id", "-"), str) or call.get("id") == "":
        raise Reject("a tool call's id is not a string")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise Reject("a tool call has no function name")
    # A Parquet struct cannot be empty, so a call without arguments has none there.
    return {**call, "function": {"name": function["name"], "arguments": arguments_text(function.get("arguments", {}))}}


def arguments_text(value: Any) -> str:
    """Arguments as JSON text, as OpenAI has them: text is kept as it is, an object is written with sorted keys."""
    try:
        parsed = loads(value) if isinstance(value, str) else value
    except Reject as reason:
        raise (Reject(NO_ARGUMENTS) if str(reason) == "not JSON" else reason) from None
    if not isinstance(parsed, dict):
        raise Reject(NO_ARGUMENTS)
    reject_deep(parsed)
    checked(parsed)
    return value if isinstance(value, str) else json.dumps(parsed, sort_keys=True, ensure_ascii=False)


def tools_list(value: Any) -> list[Any]:
    """The declared tools, which a table may hold as JSON text."""
    try:
        tools = loads(value) if isinstance(value, str) else value
    except Reject as reason:
        raise (Reject("`tools` is not a list") if str(reason) == "not JSON" else reason) from None
    if not isinstance(tools, list):
        raise Reject("`tools` is not a list")
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
            raise Reject("two tools have the same name")
        names.add(name)
    return names


def check_conversation(messages: list[Message], declared: set[str] | None) -> None:
    """Refuses orders of roles that templates drop or misplace; two turns of one side in a row are theirs to refuse."""
    waiting: list[str | None] = []  # ids of the calls that no result has answered yet
    begun = False
    for number, message in enumerate(messages):
        role = message["role"]
        if role == "tool":
            _answer(message, waiting)
            continue
        if role == "system":
            if number:
                raise Reject("a system message is not the first")
            continue
        if waiting:
            raise Reject("a tool call is not answered")
        if role == "user":
            begun = True
            continue
        if not begun:
            raise Reject("the first turn is not the user's")
        if calls := message.get("tool_calls"):
            if declared is not None and any(call["function"]["name"] not in declared for call in calls):
                raise Reject("a tool is called that `tools` does not declare")
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
