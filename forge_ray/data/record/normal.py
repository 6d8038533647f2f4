"""Normal forms: what two rows, or two spellings of a person's id, share when only their bytes differ.

    text      Unicode NFKC without ignorable characters, in one case, white space as single blanks
    row       the texts of its turns but system prompts, in order, without roles; images by their digest
    subject   Unicode NFKC without ignorable characters, white space as single blanks, 4711.0 as 4711; case counts

Words, punctuation and digits stay: rows that say something else have another form. Case follows Unicode's compatibility
caseless match (The Unicode Standard, chapter 3, D146), ignorable characters its property Default_Ignorable_Code_Point.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from forge_ray.data.record.schema import LABELS, TURNS, DataRecord

IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
UNSEEN = ("system", "developer")  # roles of turns that say how to answer, not what was said
# "User: …" at the start of a line: how plain text tells whose turn it is
SPEAKER = re.compile(
    r"^[ \t#*>\[]*(?:system|user|human|assistant|bot|model|question|answer|prompt|response|instruction|input|output|q|a)"
    r"[ \t*\]]*:[ \t*]*",
    re.MULTILINE | re.IGNORECASE,
)
WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))\.0+|(-?[1-9](?:\.\d+)?e\+\d{2,3})")  # as a column of floats writes whole numbers
LONGEST = 300  # digits of a number that is written out


def plain(text: str) -> str:
    """NFKC, without characters that have no look of their own; white space as single blanks, none at the ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", IGNORABLE.sub("", text))
    return " ".join(text.split())


def folded(text: str) -> str:
    """`plain` in one case."""
    if not text.isascii():
        text = unicodedata.normalize("NFD", IGNORABLE.sub("", text)).casefold()
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.casefold().split())


def subject_form(value: str, caseless: bool = False) -> str:
    """The normal form of a person's id. Leading zeros, signs and decimals that are not zero stay: they tell ids apart."""
    text = plain(value)
    if number := WHOLE.fullmatch(text):
        text = number[1] or _written_out(number[2])
        text = "0" if text == "-0" else text
    return folded(text) if caseless else text


def _written_out(text: str) -> str:
    """1e+16 → 10000000000000000; what is no whole number stays."""
    digits, _, exponent = text.partition("e+")
    whole, _, decimals = digits.partition(".")
    zeros = int(exponent) - len(decimals)
    return whole + decimals + "0" * zeros if 0 <= zeros <= LONGEST else text


def row_form(record: DataRecord) -> str:
    """The normal form of a row; "" where it has no text and no image."""
    return folded(SPEAKER.sub("", "\n".join(_pieces(record.content))))


def row_digest(record: DataRecord) -> str:
    """sha256 of `row_form`; "" where that is empty: rows without a word have nothing in common."""
    form = row_form(record)
    return hashlib.sha256(form.encode()).hexdigest() if form else ""


def row_digests(record: DataRecord) -> Iterator[str]:
    """`row_digest`, and for a row with reasoning those that it had while its reasoning stood in the content, as tags."""
    yield row_digest(record)
    if any("reasoning_content" in turn for column in TURNS for turn in record.content.get(column, ())):
        for space in ("", "\n"):
            yield row_digest(replace(record, content=record.content | _with_tags(record.content, space)))


def _with_tags(content: dict[str, Any], space: str) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for column in TURNS:
        for turn in content.get(column, ()):
            if reasoning := turn.get("reasoning_content"):
                text = f"<think>{space}{reasoning}{space}</think>{space}{turn.get('content') or ''}"
                turn = {key: item for key, item in turn.items() if key != "reasoning_content"} | {"content": text}
            columns.setdefault(column, []).append(turn)
    return columns


def _pieces(value: Any) -> Iterator[str]:
    """What `schema.texts` walks over, in an order that does not depend on how the content was stored."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, dict) and value.get("role") not in UNSEEN:
        for key in sorted(value):
            item = value[key]
            if key == "image" and isinstance(item, str):
                yield item
            elif key == "arguments" and isinstance(item, str):
                yield from _leaves(json.loads(item))
            elif key not in LABELS:
                yield from _pieces(item)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from _leaves(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
