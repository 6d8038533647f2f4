"""One row of an application's file → what it says about which answer.

Columns go by several names, since each application has its own; a column of another name is counted, and not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forge_ray.data.read.strict_json import Reject
from forge_ray.data.record.columns import listed, quoted, turns_of
from forge_ray.data.record.older_calls import declared_tools

Turns = list[dict[str, Any]]
# Each name that a column may have; the first that is filled counts
COLUMNS: dict[str, tuple[str, ...]] = {
    "answer_id": ("id", "answer_id", "completion_id", "response_id"),
    "choice": ("choice", "choice_index"),
    "verdict": ("verdict", "rating", "label", "thumbs", "score"),
    "stars": ("stars",),
    "better": ("better_answer", "better", "correction", "corrected"),
    "comment": ("comment",),
    "user": ("user", "user_id"),
    "conversation": ("conversation", "conversation_id", "session_id", "thread_id"),
    "messages": ("messages", "prompt"),
    "answer": ("answer", "completion", "response"),
    "tools": ("tools",),
    "model": ("model",),
    "model_version": ("model_version",),
    "at": ("at", "created_at", "time", "timestamp"),
}
NAMES = frozenset(name for names in COLUMNS.values() for name in names)
GOOD = frozenset({"good", "up", "thumbs_up", "positive", "true", "yes", "+1", "1", "like", "👍"})
BAD = frozenset({"bad", "down", "thumbs_down", "negative", "false", "no", "-1", "0", "dislike", "👎"})


@dataclass(frozen=True)
class FeedbackEntry:
    """What a row says. `is_good` is None where it has no verdict, only a better answer; `messages` and `answer` are filled
    where the row holds the conversation itself, `answer_id` where it names one that an endpoint kept, or both."""

    place: str
    is_good: bool | None
    answer_id: str = ""
    choice: int | None = None
    better: tuple[dict[str, Any], ...] = ()
    comment: str = ""
    user: str = ""
    conversation: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    answer: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    model: str = ""
    model_version: str = ""
    at: str = ""
    unread: tuple[str, ...] = field(default=(), compare=False)


def entry_of(row: Any, place: str, good_from: float | None) -> FeedbackEntry:
    """A decoded row as an entry. `good_from`: stars from which an answer counts as good. Raises `Reject` with the reason."""
    if not isinstance(row, Mapping):
        raise Reject("the row is not an object")
    values = {what: next((row[n] for n in names if not _is_empty(row.get(n))), None) for what, names in COLUMNS.items()}
    unread = tuple(sorted(str(name)[:40] for name in row if name not in NAMES and not _is_empty(row[name])))
    is_good = _verdict(values["verdict"], values["stars"], good_from)
    better = () if values["better"] is None else tuple(turns_of(listed(values["better"]), "better_answer", "assistant"))
    if is_good is None and not better:
        raise Reject("the row has neither a verdict nor a better answer")
    messages, answer = _conversation(values["messages"], values["answer"])
    answer_id = _text(values["answer_id"], "id")
    if not messages and not answer_id:
        raise Reject("the row has neither an answer's id nor a conversation")
    tools = declared_tools({"tools": values["tools"]}) if values["tools"] is not None else None
    return FeedbackEntry(
        place=place,
        is_good=is_good,
        answer_id=answer_id,
        choice=_choice(values["choice"]),
        better=better,
        messages=tuple(messages),
        answer=tuple(answer),
        tools=tuple(tools or ()),
        unread=unread,
        **{name: _text(values[name], name) for name in ("comment", "user", "conversation", "model", "model_version", "at")},
    )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def _text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise Reject(f"`{column}` is not a text: {quoted(value)}")
    return str(value).strip()


def _choice(value: Any) -> int | None:
    if value is None:
        return None
    text = str(value).strip()
    if isinstance(value, bool) or not text.isascii() or not text.isdigit():
        raise Reject(f"`choice` is not the number of a choice, 0 or more: {quoted(value)}")
    return int(text)


def _verdict(value: Any, stars: Any, good_from: float | None) -> bool | None:
    by_stars = _by_stars(stars, good_from)
    if value is None:
        return by_stars
    is_number = isinstance(value, float) and value.is_integer()
    text = str(int(value) if is_number else value).strip().lower()
    if text not in GOOD | BAD:
        raise Reject(f"the verdict is not good or bad, true or false, 1, 0 or -1: {quoted(value)}")
    is_good = text in GOOD
    if by_stars is not None and by_stars != is_good:
        raise Reject(f"the verdict {quoted(value)} contradicts {quoted(stars)} stars of the same row")
    return is_good


def _by_stars(stars: Any, good_from: float | None) -> bool | None:
    if stars is None:
        return None
    try:
        number = float(str(stars))
    except ValueError:
        number = float("nan")
    if not 0 <= number <= 100:
        raise Reject(f"`stars` is not a number from 0 to 100: {quoted(stars)}")
    if good_from is None:
        raise Reject("`stars` is set, and --good-from does not say from how many on an answer is good")
    return number >= good_from


def _conversation(messages: Any, answer: Any) -> tuple[Turns, Turns]:
    """The question and the answer: two columns, or one list whose end, after the last turn of the user or of a tool, is the
    answer."""
    if messages is None:
        if answer is not None:
            raise Reject("the row has an answer without the conversation before it")
        return [], []
    turns = turns_of(listed(messages), "messages", "user")
    if answer is not None:
        return turns, turns_of(listed(answer), "answer", "assistant")
    asked = [number for number, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user"]
    cut = asked[-1] + 1 if asked else 0
    if not turns[cut:]:
        raise Reject("the conversation ends without an answer")
    return turns[:cut], turns[cut:]
