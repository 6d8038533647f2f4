"""A growing answer → its reasoning and its text, by what the model's template writes around them (pure).

Where a template writes an empty block of reasoning, a channel or a recipient before an answer, that is no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from forge_ray.data.tokens.answers import AnswerForm
from forge_ray.data.tokens.template import ChatTokenizer
from forge_ray.serve.text import overlap

State = Literal["start", "reasoning", "after", "text"]


@dataclass
class AnswerSplitter:
    """`push` gives (reasoning, text) that the new text completes. `is_reasoning` is true until the answer itself begins."""

    form: AnswerForm
    state: State = "start"
    buffer: str = ""
    has_begun: bool = False  # line ends around a reasoning are the template's

    @property
    def is_reasoning(self) -> bool:
        return self.state == "reasoning"

    def push(self, text: str) -> tuple[str, str]:
        self.buffer += text
        reasoning = ""
        if self.state == "start":
            self._begin()
        if self.state == "reasoning":
            reasoning = self._reason()
        return reasoning, self._text()

    def flush(self) -> tuple[str, str]:
        """At the end: what is left, of which kind it is."""
        rest, self.buffer = self.buffer, ""
        if self.state == "reasoning":
            return rest, ""
        return "", rest.lstrip("\n") if self.state == "after" else rest

    def _begin(self) -> None:
        """Decide by the first characters, as soon as they tell."""
        opening, thinking = self.form.opening.strip(), self.form.reasoning_opening.strip()
        begun = self.buffer.lstrip()
        if self.form.has_reasoning and begun.startswith(thinking):
            self.state, self.buffer = "reasoning", begun[len(thinking) :]
        elif opening and begun.startswith(opening):
            self.state, self.buffer = "after", begun[len(opening) :]
        elif not any(mark.startswith(begun) for mark in (opening, thinking) if mark):
            self.state = "text"

    def _reason(self) -> str:
        if not self.has_begun:
            self.buffer = self.buffer.lstrip("\n")
            self.has_begun = bool(self.buffer)
        closing = self.form.reasoning_closing.strip()
        at = self.buffer.find(closing)
        if at >= 0:
            reasoning, self.buffer, self.state = self.buffer[:at].rstrip("\n"), self.buffer[at + len(closing) :], "after"
            return reasoning
        end = len(self.buffer[: len(self.buffer) - overlap(self.buffer, closing)].rstrip("\n"))
        reasoning, self.buffer = self.buffer[:end], self.buffer[end:]
        return reasoning

    def _text(self) -> str:
        if self.state == "after":
            self.buffer = self.buffer.lstrip("\n")
            if not self.buffer:
                return ""
            self.state = "text"
        if self.state != "text":
            return ""
        text, self.buffer = self.buffer, ""
        return text


def splitter_of(tokenizer: ChatTokenizer) -> AnswerSplitter | None:
    """None where the template writes nothing around an answer."""
    form = tokenizer.answer_form
    return AnswerSplitter(form) if form and (form.has_reasoning or form.opening.strip()) else None


def marks_of(tokenizer: ChatTokenizer) -> dict[int, str]:
    """The special tokens around reasoning and answers, which are read as text and not shown."""
    form = tokenizer.answer_form
    texts = (form.opening, form.reasoning_opening, form.reasoning_closing) if form else ()
    ids = {token_id for text in texts if text for token_id in tokenizer.written_ids(text)}
    return {token_id: text for token_id in ids if (text := special_text(tokenizer, token_id))}


def special_text(tokenizer: ChatTokenizer, token_id: int) -> str:
    """The name of a special token; "" for any other."""
    name = tokenizer.token_bytes(token_id).decode(errors="replace")
    return (
        name if tokenizer.marker_id(name) == token_id and not tokenizer.decode([token_id], skip_special_tokens=True) else ""
    )
