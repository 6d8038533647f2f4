"""Tools, tool calls and tool results as text, for models whose template has no place for them (`data.tools: text`).

The form is that of Nous Hermes' function calling: the tools as JSON, one a line, in a `<tools>` block of the system prompt;
a call as `<tool_call>` with JSON in the assistant's content; a result as `<tool_response>` with JSON in a user turn.
`as_text` writes it for training, evaluation and serving alike, and `serve/tools.py` reads it as the style `hermes`. An
exported model says in `FORM_FILE` that it was trained so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.adapt import CALL, OTHER, arguments_of, call_turn, probe_tools, result_turn
from forge_ray.data.tokens.call_forms import CallForm, parse
from forge_ray.data.tokens.template import CallStyle, Chat, ChatTokenizer, Encoded, Messages
from forge_ray.errors import ConfigError

Tools = Literal["template", "text"]
FORM_FILE = "forge_chat.json"
FORM = CallForm("object", "<tool_call>\n", "\n</tool_call>", "name", "arguments")
MARK = re.compile(r"<(?=/?tool(?:s|_call|_response)>)")
MARKS = ("<tool_call>", "</tool_call>")
BLOCK = re.compile(r"</?tool(?:s|_response)>")  # what the system prompt and a user turn are given, and nobody may forge
INSTRUCTIONS = """# Tools

You may call one or more of these functions to answer the user. Their signatures are within <tools></tools>:
<tools>
{tools}
</tools>

To call a function, write its name and its arguments as a JSON object within <tool_call></tool_call>, once for each call:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-as-json-object>}}
</tool_call>

The results come back within <tool_response></tool_response>, in the order of the calls."""


def as_text(messages: Messages, tools: list[Any] | None, in_system: bool = True) -> list[dict[str, Any]]:
    """The conversation with its tools, calls and results as text; one that has none of them as it is. `in_system`: whether
    the tools stand in the system prompt, else in the first user turn.

    Raises `Reject` for arguments that are not a JSON object, and for a text that forges a block of tools or results."""
    if not tools and not any(turn["role"] == "tool" or turn.get("tool_calls") for turn in messages):
        return list(messages)
    for turn in messages:
        if turn["role"] in ("system", "user") and (mark := BLOCK.search(_text(turn.get("content")))):
            raise Reject(f"a message contains {mark[0]}, with which tools are written as text")
    turns = list(_turns(messages))
    return _declared(turns, INSTRUCTIONS.format(tools="\n".join(map(_tool, tools))), in_system) if tools else turns


def refuse_ambiguous(messages: Messages) -> None:
    """Raise `Reject` where the text of an answer that is trained would be read as a call."""
    for turn in messages:
        if turn["role"] != "assistant" or not turn.get("weight", 1):
            continue
        text = _text(turn.get("content"))
        if "<tool_call>" in text and (turn.get("tool_calls") or any(parse(FORM, text))):
            raise Reject("the text of an answer contains <tool_call>, so it would be read as a tool call")


def _turns(messages: Messages) -> Iterator[dict[str, Any]]:
    calls: list[Any] = []
    results: list[dict[str, Any]] = []
    for turn in messages:
        if turn["role"] == "tool":
            results.append(turn)
            continue
        if results:
            block, results = _responses(results, calls), []
            if turn["role"] == "user":  # many templates take no two user turns in a row
                yield {**turn, "content": _in_front(block + "\n", turn.get("content"))}
                continue
            yield {"role": "user", "content": block}
        if calls_of_turn := turn.get("tool_calls"):
            calls = calls_of_turn
            text = "\n".join([text for text in [_text(turn.get("content"))] if text] + [_call(call) for call in calls])
            turn = {key: item for key, item in turn.items() if key != "tool_calls"} | {"content": text}
        yield turn
    if results:
        yield {"role": "user", "content": _responses(results, calls)}


def _declared(turns: list[dict[str, Any]], block: str, in_system: bool) -> list[dict[str, Any]]:
    if in_system and turns and turns[0]["role"] == "system":
        first = turns[0]
        return [{**first, "content": f"{_text(first.get('content'))}\n\n{block}".lstrip("\n")}, *turns[1:]]
    if in_system:
        return [{"role": "system", "content": block}, *turns]
    place = next((number for number, turn in enumerate(turns) if turn["role"] == "user"), None)
    if place is None:
        return [{"role": "user", "content": block}, *turns]
    asks = {**turns[place], "content": _in_front(block + "\n\n", turns[place].get("content"))}
    return [*turns[:place], asks, *turns[place + 1 :]]


def _in_front(text: str, content: Any) -> Any:
    if isinstance(content, list):
        return [{"type": "text", "text": text}, *content]
    return text + _text(content)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content or ""


def _tool(tool: Any) -> str:
    """A declaration with the keys of its function in one order and without `strict`, which is for servers: a row and a
    request that declare the same come to the same text."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        raise Reject("a tool is not of type `function` with a name")
    named = [key for key in ("name", "description", "parameters") if function.get(key) is not None]
    others = sorted(key for key in function if key not in (*named, "strict") and function[key] is not None)
    return _json({"type": "function", "function": {key: function[key] for key in (*named, *others)}})


def _call(call: Any) -> str:
    function = call["function"]
    if not isinstance(parsed := arguments_of(function), dict):
        raise Reject("a tool call's arguments are not a JSON object")
    return FORM.opening + _json({FORM.name_key: function["name"], FORM.arguments_key: parsed}) + FORM.closing


def _responses(results: Sequence[dict[str, Any]], calls: Sequence[Any]) -> str:
    """The results in the order of their calls, since no id is written; those without an id answer the calls in order."""
    places = {call["id"]: number for number, call in enumerate(calls) if call.get("id")}
    placed = sorted(
        ((places.get(turn.get("tool_call_id"), number), turn) for number, turn in enumerate(results)), key=lambda one: one[0]
    )
    return "\n".join(
        _response(calls[place]["function"]["name"] if place < len(calls) else turn.get("name"), _text(turn.get("content")))
        for place, turn in placed
    )


def _response(name: Any, content: str) -> str:
    """A result that is a JSON object or list stands there as it is, any other as a JSON string."""
    written = _escaped(content.strip()) if _is_json(content) else _json(content)
    named = f'"name": {_json(name)}, ' if name else ""
    return f'<tool_response>\n{{{named}"content": {written}}}\n</tool_response>'


def _is_json(text: str) -> bool:
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json(value: Any) -> str:
    return _escaped(json.dumps(value, ensure_ascii=False))


def _escaped(written: str) -> str:
    r"""JSON whose strings have no mark of this form: there `\u003c` is the same character. Elsewhere JSON has no `<`."""
    return MARK.sub(r"\\u003c", written)


# ---------------------------------------------------------------- tokenizers


@dataclass(frozen=True, eq=False)
class TextTools:
    """A model's tokenizer that is given tools as text. What is not said here is the tokenizer's own."""

    inner: ChatTokenizer
    call_style: CallStyle = "hermes"
    call_form: CallForm = FORM

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while it is copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    @cached_property
    def in_system(self) -> bool:
        """Whether the template has a place for a system prompt."""
        try:
            self.inner.prompt_ids([{"role": "system", "content": "SYSTEMWORD"}, {"role": "user", "content": "QUESTIONWORD"}])
        except Reject:
            return False
        return True

    def prompt_ids(self, messages: Messages, tools: list[Any] | None = None) -> list[int]:
        """As `ChatTokenizer.prompt_ids`."""
        return self.inner.prompt_ids(as_text(messages, tools, self.in_system))

    def encode_chats(self, chats: Sequence[Chat], train_reasoning: bool = True) -> list[list[Encoded] | Reject]:
        """As `ChatTokenizer.encode_chats`."""
        written: list[Chat | Reject] = []
        for messages, tools in chats:
            try:
                turns = as_text(messages, tools, self.in_system)
                if turns != messages:
                    refuse_ambiguous(messages)
                written.append((turns, None))
            except Reject as reason:
                written.append(reason)
        encoded = iter(self.inner.encode_chats([chat for chat in written if not isinstance(chat, Reject)], train_reasoning))
        return [chat if isinstance(chat, Reject) else next(encoded) for chat in written]


def with_tools(tokenizer: ChatTokenizer, tools: Tools) -> ChatTokenizer:
    """The tokenizer of a model that is given tools by its template, or as text."""
    return (
        tokenizer if tools == "template" or isinstance(tokenizer, TextTools) else cast(ChatTokenizer, TextTools(tokenizer))
    )


def refuse_unwritable(tokenizer: ChatTokenizer, model: str) -> None:
    """Raise `ConfigError` where the model's template cannot be given tools as text."""
    reason = "it has no chat template"
    if mark := next((mark for mark in MARKS if tokenizer.marker_id(mark) is not None), ""):
        reason = f"the model has a token {mark!r}, with which its own template writes calls"
    elif tokenizer.has_chat:
        asks = {"role": "user", "content": "QUESTIONWORD"}
        results = [result_turn(0, "RESULTWORD"), result_turn(1, "OTHERRESULTWORD")]
        answer = {"role": "assistant", "content": "ANSWERWORD"}
        chat = [asks, call_turn(CALL, OTHER, content="CONTENTWORD"), *results, answer]
        (outcome,) = with_tools(tokenizer, "text").encode_chats([(chat, probe_tools())])
        if not isinstance(outcome, Reject):
            return
        reason = str(outcome)
    raise ConfigError(
        f"data.tools=text cannot be written for {model}: {reason}",
        hint="leave data.tools at `template`; `forge models check` says what the model's own template has a place for",
    )


def tools_of(folder: Path) -> Tools:
    """How the model of a folder was trained to be given tools. Raises `ConfigError` where `FORM_FILE` cannot be read."""
    path = folder / FORM_FILE
    if not path.is_file():
        return "template"
    try:
        form = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        form = None
    if form != {"tools": "text"}:
        raise ConfigError(
            f'{FORM_FILE} of {folder.name} is not {{"tools": "text"}}',
            hint="take the file as `forge train` wrote it, or remove it where the model's template has a place for tools",
        )
    return "text"


def write_form(folder: Path, tools: Tools) -> None:
    """Say in an exported folder how the model was trained to be given tools; a folder without the file: by its template."""
    if tools == "text":
        (folder / FORM_FILE).write_text(json.dumps({"tools": tools}) + "\n", encoding="utf-8")
