"""What a chat template writes for an answer: where it begins, what ends it, what stands around it (pure but for `render`).

Nothing here knows a model family. A template is asked with conversations of marker words, and what it writes is the truth:
the end of a turn is the special token behind an answer that stays there when the conversation goes on; where the template
writes none, it is the one that the next turn begins with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.template import Messages

Render = Callable[[Messages, list[Any] | None, bool], str]  # messages, tools, whether an answer is to follow
NO_END = "the chat template writes no special token behind an answer"
REWRITES = "this model's template writes this answer behind another prompt than the one that serving sends"
OPENED = re.compile(r"\s*<([^<>/\s]+)>\s*")
QUESTION, ANSWER, THOUGHT, NEXT = "QUESTIONWORD", "ANSWERWORD", "THOUGHTWORD", "NEXTWORD"


@dataclass(frozen=True)
class AnswerForm:
    """How a template writes an answer behind the prompt.

    `opening` stands before an answer without reasoning; `reasoning_opening` and `reasoning_closing` around a reasoning (""
    and "" where the template has no place for one). `ends`: the special tokens that end a turn. `next_turn_end`,
    `result_end`: the one that the next turn, or a tool's result, begins with, where the template writes none itself."""

    opening: str
    reasoning_opening: str
    reasoning_closing: str
    ends: frozenset[str]
    next_turn_end: str
    result_end: str
    has_reasoning: bool


@dataclass(frozen=True)
class AnswerText:
    """A document of one answer: the prompt that serving sends, the answer, its end. `start`, `end`: of what is trained."""

    text: str
    start: int
    end: int


def common_start(one: str, other: str) -> str:
    """What both texts begin with."""
    length = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return one[: min(len(one), len(other)) if length is None else length]


def continuation(prompt: str, whole: str, reasoning: str, source: str) -> str:
    """What the model writes behind `prompt` so that the template's `whole` comes about. Where the prompt opens a block of
    reasoning that `whole` does not have, the answer closes it."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    common = common_start(prompt, whole)
    if (tag_at := common.rfind("<")) > common.rfind(">"):  # both go on within a tag
        common = common[:tag_at]
    opened, rest = prompt[len(common) :], whole[len(common) :]
    if opened.isspace():
        return rest
    tag = OPENED.fullmatch(opened)
    if tag and f"</{tag[1]}>" in source:
        return (f"{reasoning}\n" if reasoning else "") + f"</{tag[1]}>\n\n{rest}"
    raise Reject(REWRITES)


def end_of(answer: str, form: AnswerForm, special: re.Pattern[str]) -> int:
    """Where the answer's end token ends, or the length of the answer where the template writes none behind it."""
    tokens = list(special.finditer(answer))
    behind: list[re.Match[str]] = []
    until = len(answer)
    while tokens and not answer[tokens[-1].end() : until].strip():
        behind.append(tokens.pop())
        until = behind[-1].start()
    own = [token for token in behind if token[0] in form.ends]
    if own or behind:
        return (own or behind)[0].end()
    if form.next_turn_end:
        return len(answer)
    raise Reject(NO_END)


def answer_form(render: Render, special: re.Pattern[str], source: str) -> AnswerForm:
    """Of a template, by probes. Raises `Reject` where it writes no answer."""
    question = {"role": "user", "content": QUESTION}
    plain = {"role": "assistant", "content": ANSWER}
    prompt = render([question], None, True)
    written = continuation(prompt, render([question, plain], None, False), "", source)
    opening, is_there, tail = written.partition(ANSWER)
    if not is_there:
        raise Reject("the chat template leaves the answer out")
    ends, next_end = _ends(render, [question, plain], tail, special)
    before, after, has_reasoning = "", "", False
    try:
        thinking = [question, {**plain, "reasoning_content": THOUGHT}]
        thought = continuation(prompt, render(thinking, None, False), THOUGHT, source)
        before, has_thought, rest = thought.partition(THOUGHT)
        after, has_answer, _ = rest.partition(ANSWER)
        has_reasoning = bool(has_thought and has_answer)
    except Reject:
        pass
    before, after = (before, after) if has_reasoning else ("", "")
    result_end = _result_end(render, special) if next_end else ""
    return AnswerForm(opening, before, after, frozenset(ends), next_end, result_end or next_end, has_reasoning)


def _result_end(render: Render, special: re.Pattern[str]) -> str:
    """The token with which a tool's result begins, behind a call; "" where the template writes no calls."""
    question = {"role": "user", "content": QUESTION}
    call = {"id": "callprobe", "type": "function", "function": {"name": ANSWER, "arguments": {}}}
    result = {"role": "tool", "tool_call_id": "callprobe", "name": ANSWER, "content": NEXT}
    try:
        text = render([question, {"role": "assistant", "tool_calls": [call]}, result], None, False)
        begins = list(special.finditer(text[text.index(ANSWER) : text.index(NEXT)]))
    except (Reject, ValueError):
        return ""
    return begins[0][0] if begins else ""


def _ends(render: Render, turns: list[dict[str, Any]], tail: str, special: re.Pattern[str]) -> tuple[set[str], str]:
    """End tokens, and the token of the next turn that serves as one."""
    followed = ""
    try:
        longer = render([*turns, {"role": "user", "content": NEXT}], None, False)
        followed = longer[longer.rindex(ANSWER) + len(ANSWER) :].partition(NEXT)[0]
    except (Reject, ValueError):  # the template takes one question alone
        pass
    common = common_start(tail, followed) if followed else tail
    kept = [token[0] for token in special.finditer(common)]
    own = [token[0] for token in special.finditer(tail)]
    if kept:
        return {kept[-1]}, ""
    if own:
        in_history = [token[0] for token in special.finditer(followed)][:1]
        return {own[0], *in_history}, ""
    begins = special.search(followed)
    if begins and not followed[: begins.start()].strip():
        return set(), begins[0]
    raise Reject(NO_END)


def split(text: str, form: AnswerForm) -> tuple[str, str]:
    """(reasoning, answer) of a whole generated text, its special tokens written out and its end token left out."""
    if form.has_reasoning:
        opening, closing = form.reasoning_opening.strip(), form.reasoning_closing.strip()
        if text.lstrip().startswith(opening) and closing in text:
            inner = text.lstrip()[len(opening) :]
            reasoning, _, answer = inner.partition(closing)
            return reasoning.strip(), answer.lstrip("\n")
    opening = form.opening.strip()
    return "", text.lstrip().removeprefix(opening).lstrip("\n") if opening and text.lstrip().startswith(opening) else text


def trained_text(
    prompt: str, whole: str, turn: dict[str, Any], form: AnswerForm, special: re.Pattern[str], source: str
) -> AnswerText:
    """The document of one answer `turn`: the prompt as serving sends it, and what the model writes behind it, to its end.
    `whole`: the template's text up to and with this turn."""
    answer = continuation(prompt, whole, str(turn.get("reasoning_content") or ""), source)
    end = end_of(answer, form, special)
    if form.next_turn_end and not any(answer[:end].endswith(token[0]) for token in special.finditer(answer)):
        answer = answer.rstrip("\n") + (form.result_end if turn.get("tool_calls") else form.next_turn_end)
        end = len(answer)
    return AnswerText(prompt + answer, len(prompt), len(prompt) + end)
