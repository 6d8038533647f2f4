"""Special tokens that a text turns into: they would forge turns, so what holds one is set aside.

A conversation is looked at twice: its messages before the template (`Rendering.checked`), and here what the template made of
them, since a template that deletes or joins text can make a token of the parts of one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.data.record.schema import Reject

Render = Callable[[Any, Any], str]  # messages and tools, rendered
PLACEHOLDER = "\ue000"  # of a private use area: no part of any token
IN_CONSTANTS = "</>"  # characters of tags for which templates themselves look, such as </think>
NAMES = ("role", "type")  # keys whose values decide which turn a template writes


def refuse_built(
    special: re.Pattern[str], text: str, messages: Sequence[dict[str, Any]], tools: Any, render: Render
) -> None:
    """Raise `Reject` where `text`, rendered from the conversation, holds a special token that its messages make up.

    Such a token is one that is there less often where a character of it is another one in every message. The second
    rendering is needed only where the conversation has the characters at all.
    """
    counts = Counter(match[0] for match in special.finditer(text))
    if not counts:
        return
    content = "".join(_strings([*messages, *(tools or ())]))
    for token, count in counts.items():
        marks = {character for character in token if not character.isalnum()} or set(token)
        if not all(character in content for character in marks):
            continue
        telling = min(marks, key=lambda character: (character in IN_CONSTANTS, character))
        try:
            neutral = render(_replaced(messages, telling), _replaced(tools, telling))
        except Reject:
            continue
        if count > sum(match[0] == token for match in special.finditer(neutral)):
            raise Reject(f"the chat template builds the special token {token!r} from a message")


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []


def _replaced(value: Any, character: str) -> Any:
    if isinstance(value, str):
        return value.replace(character, PLACEHOLDER)
    if isinstance(value, dict):
        return {
            _replaced(key, character): item if key in NAMES and isinstance(item, str) else _replaced(item, character)
            for key, item in value.items()
        }
    return [_replaced(item, character) for item in value] if isinstance(value, list | tuple) else value


def excess(ids: Sequence[int] | npt.NDArray[Any], is_control: npt.NDArray[np.bool_], expected: int) -> int | None:
    """The last special id where there are more than `expected`; None where there are not."""
    special = np.asarray(ids, np.int64)
    special = special[is_control[special]]
    return int(special[-1]) if len(special) > expected else None
