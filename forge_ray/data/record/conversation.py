"""How a conversation begins, in normal form: what its turns, and other answers to it, have in common.

System prompts count for nothing, as in the normal form of a row (`normal.row_form`): they say how to answer, and change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from forge_ray.data.record.normal import row_form
from forge_ray.data.record.schema import DataRecord

MIN_WORDS = 5  # of an opening that shows by itself which conversation it is: `hello` begins many


def questions_of(record: DataRecord) -> Iterator[tuple[bytes, int]]:
    """(digest, words) of the conversation up to the end of each user turn; none for plain text. Each digest continues the
    one before, so that a turn is read once."""
    digest, num_words = b"", 0
    for turn in record.messages:
        form = row_form(DataRecord({"messages": [turn]}))
        if turn.get("role") == "system":
            continue
        digest = hashlib.sha256(digest + str(turn.get("role")).encode() + b"/" + form.encode()).digest()
        num_words += len(form.split())
        if turn.get("role") == "user":
            yield digest, num_words


def opening_of(record: DataRecord) -> bytes:
    """32 bytes of the conversation up to the end of its first user turn; none where there is no user turn."""
    return next((digest for digest, _ in questions_of(record)), b"")


def conversation_marks(record: DataRecord) -> set[bytes]:
    """What tells that two records are of one conversation: the whole question, and each one before that has enough words."""
    questions = list(questions_of(record))
    return {digest for digest, _ in questions[-1:]} | {digest for digest, words in questions if words >= MIN_WORDS}
