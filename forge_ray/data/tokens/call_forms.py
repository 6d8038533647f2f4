"""How a model's template writes tool calls, read off what it writes for two probes: no list of families (pure).

Five kinds cover what templates do: a JSON object (or a list of them) with name and arguments; a name, something between,
and the arguments as JSON, or as JSON with other quotes; a name and a tag for each argument; a call as Python writes it.
What is around and between is taken as it stands. A form counts only if it reads the probe back. Answers are read again with
each token, so no reading may take more than a few looks at each character.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from forge_ray.data.tokens.answers import common_start
from forge_ray.data.tokens.template import CallStyle

Kind = Literal["object", "named", "tagged", "python", "braced"]
JSON = json.JSONDecoder()
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
PYTHON_START = re.compile(r"(\[\s*+)?\b[A-Za-z_][\w.-]{0,63}\(")
CONSTANTS = {"None": None, "True": True, "False": False, "null": None, "true": True, "false": False}
PYTHON_WORD = re.compile(r"(?<![\w.-])(None|True|False)(?![\w.:-])")  # a value that a template wrote as Python does
PYTHON_MARK = re.compile(r"\\[\\'\"]|['\"()\[\]{}]")
TWO_WORDS = re.compile(r"[^='\"()\[\]{}]*\w\s+\w")  # at the beginning of arguments: prose


@dataclass(frozen=True)
class ParsedCall:
    """`end`: behind which character of the text it ends, or the list that it is of."""

    name: str
    arguments: dict[str, Any]
    end: int = field(default=0, compare=False)


@dataclass(frozen=True)
class CallForm:
    """`opening`: what stands before the first call, `closing`: behind the last. `before_name`, `after_name` enclose a name
    that is text; `name_key`, `arguments_key` are those of an object. Of tags: `before_key`, `after_key`, `after_value`."""

    kind: Kind
    opening: str
    closing: str
    name_key: str = ""
    arguments_key: str = ""
    before_name: str = ""
    after_name: str = ""
    after_call: str = ""
    before_key: str = ""
    after_key: str = ""
    after_value: str = ""

    @property
    def begins_with(self) -> str:
        """The text by which an answer is known to call; "" where a call begins with its JSON, at the answer's start."""
        return self.opening.strip("[ \n") or self.before_name.strip()

    @property
    def in_front(self) -> str:
        """What the template writes in front of `begins_with`: blanks or line ends."""
        return (self.opening + self.before_name).partition(self.begins_with)[0] if self.begins_with else ""

    @property
    def name_mark(self) -> str:
        """`before_name` as it is looked for: without white space in front, which is no part of `begins_with`."""
        return self.before_name.lstrip() or self.before_name


def form_of(once: str, name: str, arguments: dict[str, str]) -> CallForm | None:
    """The form of `once`, an answer that calls `name` with two arguments, less its end token; None where it has none of
    the five kinds."""
    for find in (_object_form, _named_form, _python_form, _braced_form, _tagged_form):
        form = find(once, name, arguments)
        if form is not None and name in form.opening:
            form = replace(form, opening="")
        if form is not None and list(parse(form, once)) == [ParsedCall(name, dict(arguments))]:
            return form
    return None


def style_of(form: CallForm) -> CallStyle:
    """The style by which serving reads calls while they are generated; `template`: by the form itself."""
    if form.kind == "object" and (form.name_key, form.arguments_key) == ("name", "arguments"):
        if form.opening.strip() == "<tool_call>":
            return "hermes"
        if form.opening.strip() == "[TOOL_CALLS]":
            return "mistral-v3"
    if form.kind == "named" and form.before_name.strip() == "[TOOL_CALLS]" and form.after_name.endswith("[ARGS]"):
        return "mistral-v11" if "[CALL_ID]" in form.after_name else "mistral-v13"
    return "template"


# ---------------------------------------------------------------- reading


def parse(form: CallForm, text: str) -> Iterator[ParsedCall]:
    """The calls of a text, as far as they are whole."""
    match form.kind:
        case "object":
            yield from _objects(form, text)
        case "named":
            yield from _named(form, text)
        case "tagged":
            yield from _tagged(form, text)
        case "braced":
            yield from _braced(form, text)
        case _:
            yield from _python(text)


def _objects(form: CallForm, text: str) -> Iterator[ParsedCall]:
    opening = form.opening.strip()
    at = text.find(opening)
    at += len(opening) if at >= 0 else 0
    while 0 <= at < len(text):
        start = re.compile(r"[\[{]").search(text, at)
        if start is None:
            return
        try:
            value, at = JSON.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            return
        for item in value if isinstance(value, list) else [value]:
            call = _of_object(form, item, at)
            if call is None:
                return
            yield call


def _of_object(form: CallForm, value: Any, end: int) -> ParsedCall | None:
    if not isinstance(value, dict) or not isinstance(value.get(form.name_key), str):
        return None
    arguments = _json(value.get(form.arguments_key, {}))
    return ParsedCall(value[form.name_key], arguments, end) if isinstance(arguments, dict) else None


def _json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None


def _named(form: CallForm, text: str) -> Iterator[ParsedCall]:
    at = 0
    while (place := text.find(form.name_mark, at)) >= 0:
        name = NAME.match(text, place + len(form.name_mark))
        if name is None:
            return
        start = text.find("{", name.end())
        if start < 0 or len(text[name.end() : start]) > len(form.after_name) + 40:
            return
        try:
            arguments, at = JSON.raw_decode(text, start)
        except (ValueError, RecursionError):
            return
        if isinstance(arguments, dict):
            yield ParsedCall(name[0], arguments, at)


def _braced(form: CallForm, text: str) -> Iterator[ParsedCall]:
    """`after_key` is the mark that stands for a quotation mark; keys have none."""
    begins = re.compile(re.escape(form.name_mark) + f"({NAME.pattern})" + re.escape(form.after_name))
    at = 0
    while head := begins.search(text, at):
        at = _braces_end(text, head.end(), form.after_key)
        if at < 0:
            return
        written = "{"
        for number, segment in enumerate(text[head.end() : at].split(form.after_key)):
            keyed = PYTHON_WORD.sub(lambda word: json.dumps(CONSTANTS[word[1]]), segment)
            keyed = re.sub(r"([{,]\s*|^\s*)([A-Za-z_][\w.-]*):", r'\1"\2":', keyed)
            written += json.dumps(segment, ensure_ascii=False) if number % 2 else keyed
        try:
            arguments, _ = JSON.raw_decode(written)
        except (ValueError, RecursionError):
            return
        if isinstance(arguments, dict):
            yield ParsedCall(head[1], arguments, at)


def _braces_end(text: str, start: int, quote: str) -> int:
    """Behind the bracket that closes the one before `start`, but for those between two `quote`; -1 where none does."""
    depth, is_quoted = 1, False
    for mark in re.compile(re.escape(quote) + r"|[\[\]{}]").finditer(text, start):
        if mark[0] == quote:
            is_quoted = not is_quoted
        elif not is_quoted:
            depth += 1 if mark[0] in "[{" else -1
            if not depth:
                return mark.end()
    return -1


def _tagged(form: CallForm, text: str) -> Iterator[ParsedCall]:
    at = 0
    while (place := text.find(form.name_mark, at)) >= 0:
        name = NAME.match(text, place + len(form.name_mark))
        if name is None:
            return
        end = text.find(form.after_call.strip(), name.end()) if form.after_call.strip() else len(text)
        if end < 0:
            return
        yield ParsedCall(name[0], _tags(form, text[name.end() : end]), end)
        at = max(end, name.end() + 1)


def _tags(form: CallForm, body: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    opening, middle, closing = form.before_key.strip(), form.after_key.strip(), form.after_value.strip()
    at = 0
    while (start := body.find(opening, at)) >= 0:
        start += len(opening)
        if (between := body.find(middle, start)) < 0 or (end := body.find(closing, between + len(middle))) < 0:
            break
        value = body[between + len(middle) : end]
        arguments[body[start:between].strip()] = _value(value.removeprefix("\n").removesuffix("\n"))
        at = end + len(closing)
    return arguments


def _value(text: str) -> Any:
    """A tag's text: a number, a list, an object, true, false or null as JSON, anything else the text itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) else value


def _python(text: str) -> Iterator[ParsedCall]:
    """The first call, or list of calls, that can be read.

    A name and a bracket may also be prose, whose brackets and apostrophes may be unmatched: behind them a list of calls is
    looked for. Nothing is looked for inside a call that is not whole or cannot be read, for its texts may hold calls."""
    ends: dict[int, int] | None = None
    at = prose_until = 0
    while begun := PYTHON_START.search(text, at):
        at = begun.end()
        if begun.start() < prose_until and not begun[1]:
            continue
        ends = _ends_of_brackets(text, begun.start()) if ends is None else ends
        end = ends.get(begun.start() if begun[1] else at - 1)
        if TWO_WORDS.match(text, at):
            prose_until = max(prose_until, end or len(text))
            continue
        if end is None:
            return
        if calls := _python_calls(text[begun.start() : end].strip()):
            yield from (replace(call, end=end) for call in calls)
            return
        at = end


def _ends_of_brackets(text: str, start: int) -> dict[int, int]:
    """Behind which character each bracket closes that is opened from `start` on, for a reader that begins at that bracket.

    Such readers differ in which brackets they take for quoted, and three of them are all that there are: one outside of
    quotation marks, one inside of `'`, one inside of `"`. Each quotation mark only swaps two of them."""
    ends: dict[int, int] = {}
    opened: dict[str, list[int]] = {"": [], "'": [], '"': []}  # by where its reader is now: the brackets that it has open
    for mark in PYTHON_MARK.finditer(text, start):
        if mark[0] in opened:
            opened[""], opened[mark[0]] = opened[mark[0]], opened[""]
        elif mark[0] in "([{":
            opened[""].append(mark.start())
        elif mark[0] in ")]}" and opened[""]:
            ends[opened[""].pop()] = mark.end()
    return ends


def _python_calls(source: str) -> list[ParsedCall]:
    try:
        tree = ast.parse(source, mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        return [
            ParsedCall(ast.unparse(node.func), {str(word.arg): _literal(word.value) for word in node.keywords})
            for node in nodes
            if isinstance(node, ast.Call) and not node.args
        ]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []


def _literal(node: ast.expr) -> Any:
    """A value as Python or, inside lists and objects, as JSON writes it."""
    for name in ast.walk(node):
        for part, item in ast.iter_fields(name):
            if isinstance(item, list):
                setattr(name, part, [_constant(one) for one in item])
    return ast.literal_eval(_constant(node))


def _constant(node: Any) -> Any:
    is_word = isinstance(node, ast.Name) and node.id in CONSTANTS
    return ast.copy_location(ast.Constant(CONSTANTS[node.id]), node) if is_word else node


def text_behind(form: CallForm, text: str) -> str:
    """What an answer says in `text`, which follows its last call: without the marks of the form, of which the last one may
    be cut off."""
    rest, closing, after = text.strip(), form.closing.strip(), form.after_call.strip()
    for mark in (after, closing, closing.removeprefix("]").lstrip(), after):  # "]": of a list as Python writes it
        if mark.startswith(rest):
            return ""
        rest = rest.removeprefix(mark).lstrip()
    return rest


# ---------------------------------------------------------------- reading forms off


def _object_form(once: str, name: str, arguments: dict[str, str]) -> CallForm | None:
    for start in (match.start() for match in re.finditer(r"[\[{]", once)):
        try:
            value, end = JSON.raw_decode(once, start)
        except (ValueError, RecursionError):
            continue
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(value, dict):
            continue
        names = [key for key, item in value.items() if item == name]
        others = [key for key, item in value.items() if _json(item) == arguments]
        if names and others:
            return CallForm("object", once[:start], once[end:], names[0], others[0])
    return None


def _named_form(once: str, name: str, arguments: dict[str, str]) -> CallForm | None:
    at = once.rfind(name)
    if at < 0:
        return None
    for start in (match.start() for match in re.finditer(r"\{", once[at:])):
        try:
            value, end = JSON.raw_decode(once, at + start)
        except (ValueError, RecursionError):
            continue
        if value == arguments:
            opening, before = _split(once[:at])
            after = once[at + len(name) : at + start]
            return CallForm("named", opening, once[end:], before_name=before, after_name=after, after_call=once[end:])
    return None


def _python_form(once: str, name: str, arguments: dict[str, str]) -> CallForm | None:
    at = once.find(f"{name}(")
    if at < 0 or list(_python(once)) != [ParsedCall(name, dict(arguments))]:
        return None
    return CallForm("python", once[:at], once[once.rindex(")") + 1 :])


def _braced_form(once: str, name: str, arguments: dict[str, str]) -> CallForm | None:
    (key, value), *_ = arguments.items()
    at = once.rfind(name)
    match = re.match(rf"(\{{){re.escape(key)}:(\S+?){re.escape(value)}(\S+?),", once[at + len(name) :]) if at >= 0 else None
    if match is None or match[2] != match[3]:
        return None
    opening, before = _split(once[:at])
    closing = once[_braces_end(once, at + len(name) + 1, match[2]) :]
    return CallForm("braced", opening, closing, before_name=before, after_name="{", after_key=match[2])


def _tagged_form(once: str, name: str, arguments: dict[str, str]) -> CallForm | None:
    (first_key, first), (second_key, second) = arguments.items()
    places = [once.find(word) for word in (name, first_key, first, second_key, second)]
    name_at = once.rfind(name, 0, places[1]) if places[1] > 0 else -1
    if name_at < 0 or sorted(places[1:]) != places[1:]:
        return None
    key_at, value_at, next_key, next_value = places[1:]
    after_key = once[key_at + len(first_key) : value_at]
    between, tail = once[value_at + len(first) : next_key], once[next_value + len(second) :]
    after_value = common_start(between, tail)
    before_key = between[len(after_value) :]
    opening, before = _split(once[:name_at])
    after_name = once[name_at + len(name) : key_at].removesuffix(before_key)
    return CallForm(
        "tagged",
        opening,
        tail,
        before_name=before,
        after_name=after_name,
        after_call=tail[len(after_value) :],
        before_key=before_key,
        after_key=after_key,
        after_value=after_value,
    )


def _split(before: str) -> tuple[str, str]:
    """What stands before a name: what opens all calls, and, from its last mark on, what opens this one."""
    mark = max(before.rfind("<"), before.rfind("["), 0)
    return before[:mark], before[mark:]
