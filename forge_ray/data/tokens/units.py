"""What is trained of a record: the conversations that it holds, and the documents that one packed row must take together.

A chat is one conversation; a preference is two with the same prompt, of which the answers alone are trained, and which stand
in one row, the preferred one first; a feedback is its prompt with the answer that was judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from forge_ray.data.record.schema import DataRecord, Reject
from forge_ray.data.tokens.template import Encoded

SEVERAL = "an answer of several turns, which this model's template writes as several documents"
SAME_IDS = "`chosen` and `rejected` are the same tokens"
TOO_LONG = "longer than sequence_length"
CUT_AWAY = "of a pair that is cut to sequence_length, one answer loses all its tokens, or the difference"
UNITS = {"preference": 2}  # documents of a record that stand in one packed row, one behind the other; of other kinds 1


def conversations_of(record: DataRecord) -> list[list[dict[str, Any]]]:
    """The conversations of a record of messages; earlier answers of a judged one are context."""
    if record.kind not in ("preference", "feedback"):
        return [record.messages]
    prompt = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in record.messages]
    columns = ("chosen", "rejected") if record.kind == "preference" else ("answer",)
    return [[*prompt, *record.content[column]] for column in columns]


def together(documents: Sequence[list[Encoded] | Reject], sequence_length: int, overlong: str) -> list[Encoded] | Reject:
    """The documents of one preference or feedback, [chosen, rejected] or [answer], which fit a row together; or why not."""
    halves = []
    for of_answer in documents:
        if isinstance(of_answer, Reject):
            return of_answer
        if len(of_answer) != 1:
            return Reject(SEVERAL)
        halves += of_answer
    if len(halves) == 2 and np.array_equal(halves[0].ids, halves[1].ids):
        return Reject(SAME_IDS)
    lengths = [len(half.ids) for half in halves]
    if sum(lengths) > sequence_length:
        if overlong == "reject":
            return Reject(TOO_LONG if len(halves) == 1 else f"a pair, both answers together, is {TOO_LONG}")
        halves = _cut(halves, sequence_length)
        if not all(half.loss_mask[1:].any() for half in halves) or (
            len(halves) == 2 and np.array_equal(halves[0].ids, halves[1].ids)
        ):
            return Reject(CUT_AWAY)
    for half in halves:
        half.loss_mask[0] = 0  # the first token has nothing to be predicted from
    return halves


def _cut(halves: Sequence[Encoded], length: int) -> list[Encoded]:
    """The documents cut to `length` tokens together: the longest gives first."""
    keep = [len(half.ids) for half in halves]
    shortest = min(keep)
    keep = [min(size, max(length - shortest, -(-length // len(keep)))) for size in keep]
    if sum(keep) > length:
        keep = [length // len(keep)] * len(keep)
    return [
        Encoded(half.ids[:size], half.loss_mask[:size], truncated=half.truncated or size < len(half.ids))
        for half, size in zip(halves, keep, strict=True)
    ]
