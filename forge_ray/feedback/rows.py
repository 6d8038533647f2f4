"""Judged answers → rows of a shape that `forge data prepare` reads: chat, preference or feedback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from forge_ray.data.read.strict_json import Reject
from forge_ray.data.record.columns import untrained
from forge_ray.data.record.schema import DataRecord, parse_record
from forge_ray.feedback.join import Judged

Form = Literal["chat", "preference", "feedback"]
Contradictions = Literal["leave-out", "majority"]
Row = dict[str, Any]


def verdicts_of(items: list[Judged]) -> dict[str, Counter[bool]]:
    """Record of a question and its answer → the verdicts on it."""
    verdicts: dict[str, Counter[bool]] = {}
    for item in items:
        if item.is_good is not None:
            verdicts.setdefault(item.record.id, Counter())[item.is_good] += 1
    return verdicts


def contradiction(item: Judged, verdicts: dict[str, Counter[bool]], rule: Contradictions) -> str:
    """Why a verdict is left out: others say the opposite of the same answer; "" where they do not, or are outvoted."""
    votes = verdicts.get(item.record.id, Counter())
    if item.is_good is None or len(votes) < 2:
        return ""
    if rule == "majority" and votes[item.is_good] > votes[not item.is_good]:
        return ""
    return f"the verdicts on this answer contradict each other: {votes[True]} good, {votes[False]} bad"


def rows_of(item: Judged, form: Form) -> Iterator[tuple[Row, DataRecord]]:
    """The rows that a judged answer gives, each with the record that it becomes. Raises `Reject` where it gives none, or one
    that would be quarantined."""
    content = item.record.content
    shared: Row = {"tools": content["tools"]} if "tools" in content else {}
    asked, answer, better = content["messages"], content["answer"], list(item.better)
    rows: list[tuple[Form, Row]] = []
    if form == "preference":
        if not better:
            raise Reject("there is no better answer, which --form preference needs")
        rows = [("preference", {"messages": asked, "chosen": better, "rejected": answer})]
    elif form == "feedback":
        if item.is_good is not None:
            rows.append(("feedback", {"messages": asked, "answer": answer, "label": item.is_good}))
        if better:
            rows.append(("feedback", {"messages": asked, "answer": better, "label": True}))
    elif better or item.is_good:
        rows = [("chat", {"messages": [*untrained(asked), *(better or answer)]})]
    else:
        raise Reject("the answer was rated bad, and there is no better one to train on")
    notes = {name: value for name, value in item.notes.items() if value not in ("", None)}
    for shape, row in rows:
        yield row | shared | notes, parse_record(row | shared, shape)
