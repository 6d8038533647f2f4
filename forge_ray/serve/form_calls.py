"""Tool calls in whatever form a model's template writes them: read while they are generated, and begun where one is required
(pure). The forms are those of `data/tokens/call_forms.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from forge_ray.data.tokens.call_forms import CallForm, parse, text_behind
from forge_ray.serve.text import overlap
from forge_ray.serve.tool_fields import Function

LONGEST = 1 << 16  # characters of calls that are read again with each token


@dataclass
class FormParser:
    """Splits a growing answer into text and calls; what is between two calls is the form around them. `call` makes one of a
    name and arguments, or None for a function that was not declared. `finished` after the first call, unless `several`.
    `end`: of the last call in the buffer."""

    form: CallForm
    call: Callable[[str, dict[str, Any]], Any]
    several: bool = True
    finished: bool = False
    buffer: str = ""
    line_end: str = ""  # in front of what may be calls; the form's if there are any, else of the text
    inside: bool = False
    calls: list[Any] = field(default_factory=list)
    num_refused: int = 0
    end: int = 0

    def push(self, text: str) -> list[Any]:
        """Text that belongs to no call, and calls that `text` completes, in order."""
        if self.finished:
            return []
        self.buffer += text
        parts: list[Any] = []
        if not self.inside:
            parts += self._opened()
        if self.inside and len(self.buffer) < LONGEST:
            parts += self._new_calls()
        return parts

    def flush(self) -> list[Any]:
        """At the end: what was held back is text, as far as it is neither a call nor the form around one."""
        parts = self._new_calls() if self.inside and not self.finished else []
        rest = text_behind(self.form, self.buffer[self.end :]) if self.calls else self.line_end + self.buffer
        if rest and not self.finished:
            parts.append(rest)
        self.buffer = self.line_end = ""
        return parts

    def _opened(self) -> list[Any]:
        begins = self.form.begins_with
        if not begins:
            begun = self.buffer.lstrip()
            self.inside = begun[:1] in ("{", "[")
            if self.inside or not begun:
                return []
            text, self.buffer = self.buffer, ""
            return [text]
        at = self.buffer.find(begins)
        in_front = self.form.in_front
        held = max(overlap(self.buffer, mark) for mark in (begins, in_front + begins))
        end = at if at >= 0 else len(self.buffer) - held
        text, self.buffer, self.inside = self.buffer[:end], self.buffer[end:], at >= 0
        if self.inside:
            before = text.removesuffix(in_front)
            before = before if before.strip() else ""
            self.line_end, text = text[len(before) :], before
        return [text] if text else []

    def _new_calls(self) -> list[Any]:
        new_calls = []
        for parsed in list(parse(self.form, self.buffer))[len(self.calls) + self.num_refused :]:
            call = self.call(parsed.name, parsed.arguments)
            if call is None:
                self.num_refused += 1
                continue
            new_calls.append(call)
            self.calls.append(call)
            self.end = parsed.end
            if not self.several:
                self.finished = True
                break
        return new_calls


def beginning_texts(form: CallForm, functions: Sequence[Function]) -> list[tuple[str, dict[str, Any] | None]]:
    """The ways to begin a call to one of `functions` (text, schema of the arguments, or None where the name is part of the
    JSON); empty for forms whose arguments are no JSON, which no grammar of ours forces."""
    if form.kind == "object":
        return [(form.opening, None)]
    if form.kind == "named":
        before = form.opening + form.before_name
        return [(f"{before}{function.name}{form.after_name}", function.schema_) for function in functions]
    return []


def object_schema(form: CallForm, one: dict[str, Any]) -> dict[str, Any]:
    """The schema of a call (`name`, `arguments`) under the keys of the form."""

    def call(value: dict[str, Any]) -> dict[str, Any]:
        properties = {form.name_key: value["properties"]["name"], form.arguments_key: value["properties"]["arguments"]}
        return {**value, "properties": properties, "required": [form.name_key, form.arguments_key]}

    if "anyOf" in one:
        return {**one, "anyOf": [call(value) for value in one["anyOf"]]}
    return call(one)
