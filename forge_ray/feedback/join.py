"""Entries and the answers that endpoints kept → what was judged: question, answer, verdict, and where the answer is from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from forge_ray.data.read.strict_json import Reject
from forge_ray.data.record.conversation import opening_of
from forge_ray.data.record.schema import DataRecord, parse_record
from forge_ray.feedback.entries import FeedbackEntry
from forge_ray.store.kept_answers import KeptAnswer

TEXT_COMPLETION = "cmpl-"  # begins ids of /v1/completions
OPENING_HEX = 16


@dataclass(frozen=True)
class Judged:
    """An answer, what a person said about it, and what is known of its origin. `record` is the feedback record of the
    question and the answer, by which equal ones are recognised; `notes` are the columns that a row carries beside it."""

    place: str
    is_good: bool | None
    record: DataRecord
    better: tuple[dict[str, Any], ...]
    notes: dict[str, Any]
    names_conversation: bool

    @property
    def opening(self) -> str:
        """The conversation by how it begins."""
        return f"conv_{opening_of(self.record).hex()[:OPENING_HEX]}"


def judged(entry: FeedbackEntry, kept: Mapping[str, list[KeptAnswer]]) -> Judged:
    """What an entry judges. The row's own conversation counts before a kept answer of the same id, which adds where it is
    from. Raises `Reject` with the reason."""
    answer = _kept_of(entry, kept)
    messages, answered, tools = list(entry.messages), list(entry.answer), list(entry.tools)
    choice = entry.choice or 0
    if answer is not None and not messages:
        choice = _choice(entry, answer)
        messages, tools = answer.messages, answer.tools
        answered = [answer.choices[choice].message]
    row = {"messages": messages, "answer": answered, "label": True} | ({"tools": tools} if tools else {})
    record = parse_record(row, "feedback")
    notes: dict[str, Any] = {
        "answer_id": entry.answer_id,
        "choice": choice if answer is not None and len(answer.choices) > 1 else None,
        "model": entry.model or (answer.model if answer else ""),
        "model_version": entry.model_version or (answer.model_version if answer else ""),
        "answered_at": (answer.at if answer else "") or entry.at,
        "conversation": entry.conversation or (_stated_conversation(answer) if answer else ""),
        "user": (answer.user if answer else "") or entry.user,
        "comment": entry.comment,
    }
    if answer is not None and answer.user and entry.user and entry.user != answer.user:
        notes["rated_by"] = entry.user
    return Judged(entry.place, entry.is_good, record, entry.better, notes, bool(notes["conversation"]))


def _kept_of(entry: FeedbackEntry, kept: Mapping[str, list[KeptAnswer]]) -> KeptAnswer | None:
    answers = kept.get(entry.answer_id, []) if entry.answer_id else []
    if answers or entry.messages:
        return answers[-1] if answers else None
    if entry.answer_id.startswith(TEXT_COMPLETION):
        raise Reject("the id is of a text completion, which endpoints do not keep; give the conversation in the row")
    raise Reject("no kept answer has this id: deploy.keep_answers was off, its days are over, or it was not finished")


def _choice(entry: FeedbackEntry, answer: KeptAnswer) -> int:
    count = len(answer.choices)
    if entry.choice is None:
        if count > 1:
            raise Reject(f"the answer has {count} choices, and `choice` does not say which was rated")
        return 0
    if entry.choice >= count:
        raise Reject(f"`choice` is {entry.choice}, and the answer has {count}, counted from 0")
    return entry.choice


def _stated_conversation(answer: KeptAnswer) -> str:
    """What the request's own metadata calls its conversation."""
    names = ("conversation", "conversation_id", "session_id", "thread_id")
    return next((answer.metadata[name] for name in names if answer.metadata.get(name)), "")


def with_conversations(items: list[Judged]) -> tuple[list[Judged], int]:
    """The same, each with a conversation: what the application calls it, else what it calls another one that begins alike,
    else how it begins. And the number of named conversations whose parts begin differently: a split by how a conversation
    begins can divide these."""
    by_opening: dict[str, set[str]] = {}
    by_name: dict[str, set[str]] = {}
    for item in items:
        if item.names_conversation:
            by_opening.setdefault(item.opening, set()).add(item.notes["conversation"])
            by_name.setdefault(item.notes["conversation"], set()).add(item.opening)
    named = []
    for item in items:
        if not item.names_conversation:
            name = min(by_opening.get(item.opening, {item.opening}))
            item = replace(item, notes=item.notes | {"conversation": name})
        named.append(item)
    return named, sum(len(openings) > 1 for openings in by_name.values())
