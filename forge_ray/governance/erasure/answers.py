"""Kept answers in an erasure: those that its tombstones cover go, whatever batch they are in.

Covered are answers by their own id or that of their request, those of an erased person by the request's `user`, and those
whose conversation holds an erased row, in any of its turns.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from forge_ray.data.build.tombstones import ANSWER, Erased, of_values
from forge_ray.data.record.schema import DataRecord, Reject, parse_record
from forge_ray.data.record.subject import Whose, subject_key
from forge_ray.progress import stage
from forge_ray.records import Deployment
from forge_ray.store import kept_answers
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.kept_answers import KeptAnswer

QUEUED_S = 15.0  # an endpoint writes an answer within this time after its end (`keeper.FLUSH_S`)


def names_of(answer: KeptAnswer) -> set[str]:
    """The ids by which an answer can be erased."""
    return {answer.id, answer.request_id}


def records_of(answer: KeptAnswer) -> Iterator[DataRecord]:
    """The records that rows made of it can be: the chat up to each assistant turn, and each choice with either verdict.
    What cannot be a record gives none."""
    tools: dict[str, Any] = {"tools": answer.tools} if answer.tools else {}
    rows: list[dict[str, Any]] = [
        {"messages": answer.messages[: number + 1]}
        for number, turn in enumerate(answer.messages)
        if turn.get("role") == "assistant"
    ]
    rows += [{"messages": [*answer.messages, choice.message]} for choice in answer.choices]
    for row in rows:
        try:
            yield parse_record(row | tools, "chat")
        except Reject:
            continue
    for choice in answer.choices:
        for label in (True, False):
            row = {"messages": answer.messages, "answer": [choice.message], "label": label}
            try:
                yield parse_record(row | tools, "feedback")
            except Reject:
                continue


def is_covered(store: Store, erased: Erased, answer: KeptAnswer) -> bool:
    """Whether tombstones name the answer, its user or a row in it."""
    if any(erased.has(ANSWER + name) for name in names_of(answer)):
        return True
    whose = Whose(answer.user, (subject_key(store, ""),)) if answer.user else None
    if whose is not None and any(map(erased.has, whose.digests())):
        return True
    return any(erased.holds(record, None) for record in records_of(answer))


def count_covered(store: Store, values: Iterable[str]) -> int:
    """How many kept answers tombstones of these values would cover."""
    if not kept_answers.batches(store):
        return 0
    erased = of_values(store, values)
    return sum(is_covered(store, erased, answer) for answer in kept_answers.kept_answers(store))


def named(store: Store, values: Iterable[str]) -> list[KeptAnswer]:
    """The kept answers of these ids."""
    ids = set(values)
    return [answer for answer in kept_answers.kept_answers(store) if not ids.isdisjoint(names_of(answer))]


def remove_covered(catalog: Catalog, erased: Erased) -> int:
    """Remove the kept answers that the tombstones cover, also those that an endpoint holds in its queue now; returns how
    many. Looks twice where an endpoint keeps answers, with the time in between in which it writes them."""
    store = catalog.store
    keeps = any(one.config.get("keep_answers", {}).get("days") for one in catalog.all(Deployment))
    if not keeps and not kept_answers.batches(store):
        return 0
    with stage("answers") as it:
        num_removed = kept_answers.remove_lines(store, lambda answer: is_covered(store, erased, answer))
        if keeps:
            time.sleep(QUEUED_S)
            num_removed += kept_answers.remove_lines(store, lambda answer: is_covered(store, erased, answer))
        it.done(f"{num_removed} kept answers removed")
    return num_removed
