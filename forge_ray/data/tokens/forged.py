"""Special tokens that a text turns into: they would forge turns, so what holds one is set aside.

A conversation is looked at twice: before the template, where tokens that its messages spell are marked to stay text
(`spelled.guarded_chat`), and here what the template made of them, since a template that deletes or joins text can make a
token of the parts of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.data.record.schema import Reject

Render = Callable[[Any, Any], str]  # messages and tools, rendered
PLACEHOLDER = "\ue000"  # of a private use area: no part of any token
IN_CONSTANTS = "</>"  # characters of tags for which templates themselves look, such as </think>
NAMES = ("role", "type")  # keys whose values decide which turn a template writes


def refuse_built(
    special: re.Pattern[str],
    text: str,
    messages: Sequence[dict[str, Any]],
    tools: Any,
    render: Render,
    writes_others: bool = False,
) -> None:
    """Raise `Reject` where `text`, rendered from the conversation, holds a special token that its messages make up.

    Such a token is one that is there less often where a character of it is another one in every message. The second
    rendering is needed only where the conversation has such a character at all. `writes_others`: whether the template may
    write characters that no message has (`decoding`); then every character of the messages is another one.
    """
    written = [match[0] for match in special.finditer(text)]
    if not written:
        return
    content = "".join(strings_of([*messages, *(tools or ())]))
    for token in dict.fromkeys(written):
        if not (replaced := set(content) if writes_others else _telling(token, content)):
            continue
        try:
            table = {ord(character): PLACEHOLDER for character in replaced if not character.isspace()}
            neutral = render(_replaced(messages, table), _replaced(tools, table))
        except Reject as error:
            if writes_others:
                raise Reject(f"what the chat template makes of a message cannot be checked: {error}") from None
            continue
        if written.count(token) > sum(match[0] == token for match in special.finditer(neutral)):
            raise Reject(f"the chat template builds the special token {token!r} from a message")


def _telling(token: str, content: str) -> set[str]:
    """The characters of a token without which no message makes it up; empty where the messages lack them. The template may
    have the others: `<` from its own text, and `|im_start|` from a message."""
    marks, own = _marks(token)
    if own:
        return {character for character in own if character in content}
    return set(marks) if all(character in content for character in marks) else set()


@cache
def _marks(token: str) -> tuple[frozenset[str], frozenset[str]]:
    """The characters of a token that are no letters or digits, where it has some, and those of them that no tag has."""
    marks = frozenset(character for character in token if not character.isalnum()) or frozenset(token)
    return marks, marks - set(IN_CONSTANTS)


def strings_of(value: Any) -> list[str]:
    """Every text in a value, keys of objects too."""
    texts: list[str] = []
    open_values = [value]
    while open_values:
        item = open_values.pop()
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, dict):
            texts += [key for key in item if isinstance(key, str)]
            open_values += item.values()
        elif isinstance(item, list | tuple):
            open_values += item
    return texts


def _replaced(value: Any, table: dict[int, str], is_key: bool = False) -> Any:
    """By `str.translate`. Letters and `_` of a key stay: by them the template finds what it names."""
    if isinstance(value, str):
        return (
            "".join(c if c.isalnum() or c == "_" else c.translate(table) for c in value)
            if is_key
            else value.translate(table)
        )
    if isinstance(value, dict):
        return {
            _replaced(key, table, is_key=True): item if key in NAMES and isinstance(item, str) else _replaced(item, table)
            for key, item in value.items()
        }
    return [_replaced(item, table) for item in value] if isinstance(value, list | tuple) else value


def excess(ids: Sequence[int] | npt.NDArray[Any], is_control: npt.NDArray[np.bool_], expected: int) -> int | None:
    """The last special id where there are more than `expected`; None where there are not."""
    special = np.asarray(ids, np.int64)
    special = special[is_control[special]]
    return int(special[-1]) if len(special) > expected else None
