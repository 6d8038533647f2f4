"""Tool calls: parsed from what a model generates, and begun for it where a call is required (pure).

Styles are those of `ChatTokenizer.call_style`:

- `hermes` (Hermes, Qwen): `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once per call
- `mistral-v3`: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`
- `mistral-v11`: `[TOOL_CALLS]name[CALL_ID]id[ARGS]{…}`, once per call; `mistral-v13` without the id
- `template`: any other form that the model's template writes (`form_calls`)

Text is a call if it is complete, names a declared function and has an object of arguments (that conforms to its schema, if
the function is `strict`). Anything else stays text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge_ray.data.tokens.template import CallStyle, ChatTokenizer
from forge_ray.serve.conform import conforms
from forge_ray.serve.form_calls import FormParser, beginning_texts, object_schema
from forge_ray.serve.reasoning import special_text
from forge_ray.serve.text import overlap
from forge_ray.serve.tool_fields import Function

OPENING: Mapping[CallStyle, str] = {
    "hermes": "<tool_call>",
    "mistral-v3": "[TOOL_CALLS]",
    "mistral-v11": "[TOOL_CALLS]",
    "mistral-v13": "[TOOL_CALLS]",
}
CLOSING = "</tool_call>"
MARKS = ("<tool_call>", CLOSING, "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
MARK = re.compile("|".join(map(re.escape, MARKS)))
LIST = re.compile(r"\[TOOL_CALLS\]\s*\[\s*")
NEXT = re.compile(r"\s*(?:,\s*|(\]))")
NAMED = re.compile(r"\[TOOL_CALLS\]\s*([a-zA-Z0-9_-]{1,64})(?:\[CALL_ID\]([a-zA-Z0-9]*))?\[ARGS\]\s*")
MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")  # the only ids that Mistral's tokenizers accept
JSON = json.JSONDecoder()


@dataclass(frozen=True)
class Call:
    """One call of an answer; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


def markers(tokenizer: ChatTokenizer) -> dict[int, str]:
    """The special tokens of calls, which are shown as text here and nowhere else."""
    marks = {token_id: mark for mark in MARKS if (token_id := tokenizer.marker_id(mark)) is not None}
    if form := tokenizer.call_form:
        texts = [value for value in vars(form).values() if isinstance(value, str) and value]
        ids = {token_id for text in texts for token_id in tokenizer.written_ids(text)}
        marks |= {token_id: text for token_id in ids if (text := special_text(tokenizer, token_id))}
    return marks


def parser_of(tokenizer: ChatTokenizer, functions: Sequence[Function], several: bool) -> CallParser | FormParser:
    """What reads the calls of an answer in the model's own form."""
    if tokenizer.call_style != "template":
        return CallParser(tokenizer.call_style, functions, several)
    return FormParser(tokenizer.call_form, lambda name, arguments: _checked(functions, name, arguments), several)


def _checked(functions: Sequence[Function], name: Any, arguments: Any, identifier: Any = None) -> Call | None:
    """The call, if it names a declared function and has an object of arguments, which conforms where it is strict."""
    function = next((function for function in functions if function.name == name), None)
    if function is None or not isinstance(arguments, dict):
        return None
    if function.strict and not conforms(arguments, function.schema_):
        return None
    if not (isinstance(identifier, str) and MISTRAL_ID.fullmatch(identifier)):
        identifier = new_id()
    return Call(identifier, function.name, json.dumps(arguments, ensure_ascii=False))


def new_id() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


# ---------------------------------------------------------------- parsing


@dataclass(frozen=True)
class _Step:
    """`length`: characters of the buffer that are consumed; `value`: a candidate for a call, None at the end of a list;
    `inside`: the list continues."""

    length: int
    value: Any
    inside: bool = False


@dataclass
class CallParser:
    """Splits a growing answer into text and calls. With `several` False it is `finished` after the first call."""

    style: CallStyle
    functions: Sequence[Function]
    several: bool = True
    finished: bool = False
    buffer: str = ""
    inside: bool = False
    in_list: bool = False
    after_call: bool = False  # blanks between two calls are dropped
    line_end: str = ""  # in front of what may be a call; the form's if it is one, else of the text

    def push(self, text: str) -> list[str | Call]:
        """Text that belongs to no call, and calls that `text` completes, in order."""
        self.buffer += text
        parts: list[str | Call] = []
        while not self.finished and (self._read(parts) if self.inside else self._opened(parts)):
            pass
        return parts

    def flush(self) -> list[str | Call]:
        """At the end: a call without its closing mark counts, any other rest is text."""
        parts: list[str | Call] = []
        if self.finished:
            return parts
        if self.inside and self.style == "hermes":
            self._consume(parts, _Step(len(self.buffer), _json(self.buffer.removeprefix(OPENING["hermes"]))))
        rest = self.line_end + self.buffer if self.inside else self.buffer
        if rest and not (self.after_call and rest.isspace()):
            parts.append(rest)
        self.buffer = ""
        return parts

    def _opened(self, parts: list[str | Call]) -> bool:
        """Release the text up to the next opening; True if there is one."""
        opening = OPENING[self.style]
        at = self.buffer.find(opening)
        end = at if at >= 0 else len(self.buffer) - overlap(self.buffer, opening)
        if self.style == "hermes" and self.buffer[:end].endswith("\n"):
            end -= 1
        text = self.buffer[:end]
        if self.after_call and at < 0 and not text.strip():
            return False  # it depends on what follows
        if text and not (self.after_call and text.isspace()):
            parts.append(text)
            self.after_call = False
        self.line_end = self.buffer[end:at] if at >= 0 else ""
        self.buffer, self.inside = self.buffer[max(end, at) :], at >= 0
        return self.inside

    def _read(self, parts: list[str | Call]) -> bool:
        """Read one element after an opening; False if more text is needed."""
        if self.style == "hermes":
            step = _closed(self.buffer)
        elif self.style == "mistral-v3":
            step = _item(self.buffer, self.in_list)
        else:
            step = _named(self.buffer)
        if step is not None:
            self._consume(parts, step)
        return step is not None

    def _consume(self, parts: list[str | Call], step: _Step) -> None:
        text, self.buffer = self.buffer[: step.length], self.buffer[step.length :]
        self.inside = self.in_list = step.inside
        if step.value is None:
            return
        call = self._call(step.value)
        if call is None:
            self.inside = self.in_list = False
            parts.append(self.line_end + text)
        else:
            parts.append(call)
            self.after_call, self.finished = True, not self.several

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict):
            return None
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(arguments, str):
            arguments = _json(arguments)
        return _checked(self.functions, value.get("name"), arguments, value.get("id"))


def _closed(buffer: str) -> _Step | None:
    end = buffer.find(CLOSING)
    return None if end < 0 else _Step(end + len(CLOSING), _json(buffer[len(OPENING["hermes"]) : end]))


def _item(buffer: str, in_list: bool) -> _Step | None:
    """The next element of the list, or its end."""
    head = NEXT.match(buffer) if in_list else LIST.match(buffer)
    if head is None:
        return None
    if in_list and head[1]:
        return _Step(head.end(), None)
    return _object(buffer, head.end(), lambda value: value, inside=True)


def _named(buffer: str) -> _Step | None:
    head = NAMED.match(buffer)
    if head is None:
        return None
    return _object(buffer, head.end(), lambda value: {"name": head[1], "id": head[2], "arguments": value})


def _object(buffer: str, start: int, call: Any, inside: bool = False) -> _Step | None:
    """The JSON value at `start`; None while it is not complete."""
    if "}" not in buffer[start:]:
        return None
    try:
        value, end = JSON.raw_decode(buffer, start)
    except (ValueError, RecursionError):
        return None
    return _Step(end, call(value), inside)


def _json(text: str) -> Any:
    """The value; where the text is not JSON, the text itself, which is not a call."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# ---------------------------------------------------------------- beginning


@dataclass(frozen=True)
class Beginning:
    """The beginning of a call: its text and ids after the prompt, and the schema of the part that the model generates."""

    text: str
    ids: tuple[int, ...]
    json_schema: str


def beginnings(tokenizer: ChatTokenizer, functions: Sequence[Function], several: bool) -> tuple[Beginning, ...]:
    """The ways to begin a call to one of `functions`: one where the name is part of the JSON, else one per function."""
    style = tokenizer.call_style
    if style in ("mistral-v11", "mistral-v13"):
        number = f"[CALL_ID]{new_id()}" if style == "mistral-v11" else ""
        return tuple(
            _beginning(tokenizer, f"[TOOL_CALLS]{function.name}{number}[ARGS]", function.schema_) for function in functions
        )
    one = _call_schema(functions)
    if style == "template":
        form = tokenizer.call_form
        texts = beginning_texts(form, functions)
        return tuple(
            Beginning(
                text, tuple(tokenizer.written_ids(text)), json.dumps(schema or object_schema(form, one), ensure_ascii=False)
            )
            for text, schema in texts
        )
    if style == "mistral-v3":
        definitions = one.pop("$defs")
        many = {"type": "array", "items": one, "minItems": 1, "$defs": definitions}
        return (_beginning(tokenizer, OPENING[style], many if several else many | {"maxItems": 1}),)
    return (_beginning(tokenizer, OPENING[style] + "\n", one),)


def _beginning(tokenizer: ChatTokenizer, text: str, schema: dict[str, Any]) -> Beginning:
    ids: list[int] = []
    end = 0
    for mark in MARK.finditer(text):
        marker_id = tokenizer.marker_id(mark[0])
        if marker_id is not None:
            ids += [*tokenizer.piece_ids(text[end : mark.start()]), marker_id] if mark.start() > end else [marker_id]
            end = mark.end()
    if text[end:]:
        ids += tokenizer.piece_ids(text[end:])
    return Beginning(text, tuple(ids), json.dumps(schema, ensure_ascii=False))


def _call_schema(functions: Sequence[Function]) -> dict[str, Any]:
    """The schema of one call: name and arguments. The functions' schemas are under `$defs`, so that their own references
    resolve."""
    names = [f"f{number}" for number in range(len(functions))]
    calls: list[dict[str, Any]] = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, "arguments": {"$ref": f"#/$defs/{name}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function, name in zip(functions, names, strict=True)
    ]
    definitions = {
        name: _moved(function.schema_, f"#/$defs/{name}") for function, name in zip(functions, names, strict=True)
    }
    return (calls[0] if len(calls) == 1 else {"anyOf": calls}) | {"$defs": definitions}


def _moved(schema: Any, place: str) -> Any:
    """The schema with its local references rewritten for its new place."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + item[1:] if key == "$ref" and isinstance(item, str) and item.startswith("#") else _moved(item, place)
        for key, item in schema.items()
    }
