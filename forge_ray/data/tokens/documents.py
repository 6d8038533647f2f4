"""Conversations → documents: one where the template only appends, one per answer where it writes history anew.

What is trained behind a prompt is what the model is to write there, and the prompt is the one that serving sends. A template
that drops reasoning of earlier turns, or puts the system prompt into the last question, writes another history for each
answer: then each answer has a document of its own.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.adapt import CALL, Adaptation, adaptation_of, adapted, call_turn, probe_tools
from forge_ray.data.tokens.answers import AnswerForm, AnswerText, Render, answer_form, split, trained_text
from forge_ray.data.tokens.call_forms import CallForm, form_of
from forge_ray.data.tokens.lost import CALLS, RESULTS, lost, undeclared
from forge_ray.data.tokens.template import Messages

MAX_RENDERED = 8  # prompts of earlier answers


@dataclass(frozen=True)
class TurnSpan:
    """An assistant turn in a text, by character: from where generation would start to behind its end token."""

    start: int
    end: int
    trained: bool


@dataclass(frozen=True)
class ChatDocument:
    """A text and, by character, the assistant turns in it."""

    text: str
    spans: tuple[TurnSpan, ...]
    num_turns: int


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """What a model's own template writes: asked by training, evaluation and serving, so that what is trained is what is
    served. `special`: a pattern of the tokenizer's special tokens; `source`: the template."""

    template: Render
    special: re.Pattern[str]
    source: str

    @cached_property
    def adaptation(self) -> Adaptation:
        return adaptation_of(self.template)

    @cached_property
    def answer(self) -> AnswerForm:
        return answer_form(self.render, self.special, self.source)

    def render(self, messages: Messages, tools: list[Any] | None, for_answer: bool) -> str:
        """The template's text of a conversation, in the form that the template takes."""
        return self.template(adapted(messages, self.adaptation), tools, for_answer)

    def documents(self, messages: Messages, tools: list[Any] | None, text: str = "") -> list[ChatDocument]:
        """The documents of a conversation; `text`: what the template writes of the whole. Raises `Reject` where an answer
        that is to be trained has no end."""
        answers = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
        trained = [number for number in answers if turn_weight(messages[number])]
        text = text or self.render(messages, tools, False)
        if not trained:
            return [ChatDocument(text, (), len(messages))]
        texts = {number: self._answer_text(messages, tools, number, text) for number in trained}
        together = [self._span(text, texts[number], number == trained[-1] == len(messages) - 1) for number in trained]
        if all(span is not None for span in together):
            spans = [span for span in together if span is not None] + self.answers_in(text, messages, tools, trained)
            end = max(span.end for span in spans)
            last = texts[trained[-1]]
            tail = last.text[len(text) :] if last.text.startswith(text) and trained[-1] == len(messages) - 1 else ""
            ordered = tuple(sorted(spans, key=lambda span: span.start))
            return [ChatDocument(text + tail if end > len(text) else text, ordered, len(messages))]
        documents = []
        for number in trained:
            one = texts[number]
            others = self.answers_in(one.text, messages[:number], tools)
            documents.append(ChatDocument(one.text, (*others, TurnSpan(one.start, one.end, True)), number + 1))
        return documents

    def _answer_text(self, messages: Messages, tools: list[Any] | None, number: int, text: str) -> AnswerText:
        turns = messages[: number + 1]
        whole = text if len(turns) == len(messages) else self.render(turns, tools, False)
        prompt = self.render(turns[:-1], tools, True)
        return trained_text(prompt, whole, turns[-1], self.answer, self.special, self.source)

    def without_reasoning(self, document: ChatDocument, messages: Messages) -> ChatDocument:
        """The document with answers trained from behind their reasoning on, which stays as context."""
        thoughts = [turn.get("reasoning_content") for turn in messages[: document.num_turns] if turn["role"] == "assistant"]
        closing = self.answer.reasoning_closing.strip()
        if not closing or not any(thoughts):
            return document
        spans = []
        for span in document.spans:
            at = document.text.find(closing, span.start, span.end) if span.trained else -1
            spans.append(TurnSpan(at + len(closing), span.end, True) if at >= 0 else span)
        return ChatDocument(document.text, tuple(spans), document.num_turns)

    def refuse_unplaced(self, messages: Messages) -> None:
        """Raise `Reject` for calls and results of which the template has no form, before it stumbles over them."""
        if not self.adaptation.calls and any(turn.get("tool_calls") for turn in messages):
            raise Reject(CALLS)
        if not self.adaptation.results and any(turn["role"] == "tool" for turn in messages):
            raise Reject(RESULTS)

    def refuse_lost(self, document: ChatDocument, messages: Messages, tools: list[Any] | None) -> None:
        """Raise `Reject` where something of a conversation is not in its document, or a tool not in front of the answers."""
        turns = messages[: document.num_turns]
        start = min((span.start for span in document.spans if span.trained), default=len(document.text))
        if missing := lost(document.text, turns) or undeclared(document.text[:start], tools):
            raise Reject(missing)

    def refuse_lost_of_prompt(self, text: str, messages: Messages, tools: list[Any] | None) -> None:
        """The same for a prompt: its answer is yet to come, and names of speakers, which ask for nothing, may be missing."""
        named = [{key: item for key, item in turn.items() if key != "name"} for turn in messages]
        if missing := lost(text, [*named, {"role": "assistant"}]) or undeclared(text, tools):
            raise Reject(missing)

    @cached_property
    def call_form(self) -> CallForm | None:
        """How the template writes calls; None where it has no place for them or for tools, or writes them in no form that
        can be read back."""
        if not self.adaptation.calls:
            return None
        arguments = {"FIRSTKEY": "FIRSTVALUE", "SECONDKEY": "SECONDVALUE"}
        question = {"role": "user", "content": "QUESTIONWORD"}
        turn = call_turn({"name": CALL["name"], "arguments": json.dumps(arguments)})
        try:
            (document,) = self.documents([question, turn], probe_tools())
            self.refuse_lost(document, [question, turn], probe_tools())
        except Reject:
            return None
        span = document.spans[-1]
        text = document.text[span.start : span.end]
        for end in self.ends:
            text = text.removesuffix(end)
        return form_of(split(text, self.answer)[1], CALL["name"], arguments)

    @cached_property
    def ends(self) -> frozenset[str]:
        """Every special token that ends a turn: of an answer, of a call, of an answer in history."""
        form = self.answer
        ends = {*form.ends, form.next_turn_end, form.result_end}
        if self.adaptation.calls:
            question = {"role": "user", "content": "QUESTIONWORD"}
            with contextlib.suppress(Reject):
                (document,) = self.documents([question, call_turn(CALL)], probe_tools())
                ends |= {token[0] for token in self.special.finditer(document.text) if token.end() == document.spans[-1].end}
        return frozenset(ends - {""})

    def _span(self, text: str, one: AnswerText, is_last: bool) -> TurnSpan | None:
        """Where an answer stands in the whole conversation; None where it stands there otherwise."""
        written = one.text[: one.end]
        if text.startswith(written) or (is_last and written.startswith(text.rstrip("\n"))):
            return TurnSpan(one.start, one.end, True)
        return None

    @cached_property
    def opening(self) -> str:
        """What ends a prompt, such as `<|im_start|>assistant\n`: what the template writes there for an answer alone; where
        that is nothing, all from the last special token behind the question on, or all behind the question."""
        question = [{"role": "user", "content": "QUESTIONWORD"}]
        try:
            asked, prompt = (self.render(question, None, for_answer) for for_answer in (False, True))
        except Reject:
            return ""
        if prompt.startswith(asked) and prompt != asked:
            return prompt[len(asked) :]
        tail = prompt.rpartition("QUESTIONWORD")[2]
        tokens = list(self.special.finditer(tail))
        return tail[tokens[-1].start() :] if tokens else tail

    def answers_in(
        self, text: str, messages: Messages, tools: list[Any] | None, trained: Sequence[int] = ()
    ) -> list[TurnSpan]:
        """Answers of the conversation that are not trained, where they stand in the text as they were generated: tokens are
        cut there too.

        One prompt is rendered, that of the last such answer; where the text is its continuation, all others are found by
        `opening`. Where it is not, the prompts of the last `MAX_RENDERED` answers are rendered, and earlier answers are not
        looked for. So the work grows with the length of the conversation, not with its square.
        """
        answers = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
        skipped = set(trained)
        untrained = [number for number in answers if number not in skipped]
        starts: dict[int, int] = {}
        for number in reversed(untrained[-MAX_RENDERED:]):
            try:
                prompt = self.render(messages[:number], tools, True)
            except Reject:  # an assistant turn that opens the conversation; nothing was generated there
                continue
            if not text.startswith(prompt):
                continue
            starts[number] = len(prompt)
            if number == untrained[-1] and (places := self._openings(text, answers, number, len(prompt))):
                starts = {number: places[number] for number in untrained if number}
                break
        return [TurnSpan(start, len(text), False) for _, start in sorted(starts.items())]

    def _openings(self, text: str, answers: list[int], number: int, start: int) -> dict[int, int]:
        """Where each answer begins, by what ends its prompt; empty where that does not tell.
        `start`: that of the answer `number`."""
        if not self.opening:
            return {}
        ends = [match.end() for match in re.finditer(re.escape(self.opening), text)]
        if len(ends) - len(answers) not in (0, 1):  # 1: an answer is yet to come
            return {}
        places = dict(zip(answers, ends, strict=False))
        return places if places[number] == start else {}


def turn_weight(turn: dict[str, Any]) -> int:
    return int(turn.get("weight", 1))
