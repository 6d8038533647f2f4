"""Text that spells an added token, such as `<s>old price</s>`, stays text.

Before the template sees a conversation, one character of each token that its messages spell gives way to a mark that occurs
nowhere else. What names a token in the rendered text is then the template's own. It gets another name, the marks become
what they stand for, and a copy of the tokenizer that knows the tokens by these other names alone makes the ids. No step
changes the length of the text, and the tokenizer's own rules for what stands around a token hold in the copy too, so the ids
are those of a tokenizer that has no such token. (transformers' `sanitize_control_tokens` tokenises each spelled token apart
from the text around it, and tells no answers.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.forged import strings_of
from forge_ray.data.tokens.render import ControlTokens, any_of, with_object
from forge_ray.data.tokens.template import Messages

FORGED = "a message becomes a special token"
# Braille patterns are symbols, which filters of templates leave as they are; the second range is for texts that have all
MARKS = (range(0x2801, 0x2900), range(0xE001, 0xF900))
OTHER_LETTERS = 0x10A000  # deep in the last private use area
MAY_BE_RENAMED = re.compile("[\U0010a000-\U0010fffd]")
QUOTED = "\"'\\"  # what is written in another way where a text is quoted
IN_TAGS = "<>&/[]{}()"  # what templates look for


@dataclass(frozen=True)
class SpellingGuard:
    """`characters`: mark → the character in whose place it stands; `example`: a token that is spelled, "" for none."""

    characters: Mapping[str, str]
    example: str = ""

    def removed(self, text: str) -> str:
        """The text without marks."""
        return text.translate({ord(mark): character for mark, character in self.characters.items()})

    def hides(self, text: str) -> bool:
        """Whether a mark is written by its number, where what it stands for would be written as it is."""
        numbers = (f"{ord(mark):04x}" for mark in self.characters)
        return any(re.search(rf"\\[uU]0*{number}|&#(x0*{number}|{int(number, 16)});", text, re.I) for number in numbers)

    @property
    def refusal(self) -> Reject:
        return Reject(f"the special token {self.example!r} of a text cannot be text here" if self.example else FORGED)


NOTHING = SpellingGuard({})


def guarded_text(text: str, special: Collection[str]) -> tuple[str, SpellingGuard]:
    """A plain text in which none of the tokens is spelled any more."""
    marks = _Marks(text + "".join(special))
    return marks.guarded(text, any_of(special)), marks.guard


def guarded_chat(
    messages: Messages, tools: list[Any] | None, control: ControlTokens, source: str
) -> tuple[Messages, list[Any] | None, SpellingGuard]:
    """A conversation in which no token is spelled any more: no special one in an assistant's turns, which may hold what a
    model writes itself (`<think>`), and none of `control` in all else. Arguments of calls are objects. `source`: the
    template, whose own characters are no marks."""
    turns = []
    for message in messages:
        calls = message.get("tool_calls")
        turns.append({**message, "tool_calls": [with_object(call) for call in calls]} if calls else message)
    marks = _Marks("".join([source, *control.names, *strings_of([*turns, *(tools or ())])]))
    special, every = any_of(control.special), any_of(control.names)
    guarded = [
        {key: item if key == "role" else marks.guarded_value(item, pattern) for key, item in turn.items()}
        for turn in turns
        for pattern in [special if turn["role"] == "assistant" else every]
    ]
    return guarded, marks.guarded_value(tools, every), marks.guard


class _Marks:
    """Hands out marks, one for each character that has to be replaced."""

    def __init__(self, text: str) -> None:
        used, lowered = set(text), text.lower()  # nor may the text hold what `SpellingGuard.hides` looks for
        self._free: Iterator[str] = (
            chr(number)
            for number in chain(*MARKS)
            if chr(number) not in used and f"{number:x}" not in lowered and str(number) not in lowered
        )
        self._of: dict[str, str] = {}
        self._example = ""

    @property
    def guard(self) -> SpellingGuard:
        return SpellingGuard({mark: character for character, mark in self._of.items()}, self._example)

    def guarded_value(self, value: Any, spelled: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return self.guarded(value, spelled)
        if isinstance(value, dict):
            return {self.guarded(key, spelled): self.guarded_value(item, spelled) for key, item in value.items()}
        return [self.guarded_value(item, spelled) for item in value] if isinstance(value, list | tuple) else value

    def guarded(self, text: str, spelled: re.Pattern[str]) -> str:
        """Again and again, since tokens overlap; a mark is part of none, so each turn leaves fewer."""
        while spelled.search(text):
            text = spelled.sub(lambda match: self._marked(match[0]), text)
        return text

    def _marked(self, token: str) -> str:
        place = min(range(len(token)), key=lambda place: _weight(token[place]))
        character = token[place]
        self._example = self._example or token
        if character not in self._of:
            if (mark := next(self._free, None)) is None:
                raise Reject(f"the special token {token!r} of a text cannot be text here")
            self._of[character] = mark
        return token[:place] + self._of[character] + token[place + 1 :]


def _weight(character: str) -> int:
    """How much a template might do to a character that it would not do to a mark."""
    if character.isspace() or character in QUOTED:
        return 3
    if character.isalnum():
        return 2
    return int(character in IN_TAGS)


def other_names(tokens: Collection[str]) -> dict[str, str]:
    """Token → a name of the same length, in letters that no text has (`MAY_BE_RENAMED`)."""
    letters = sorted(set("".join(tokens)))
    other = {ord(letter): chr(OTHER_LETTERS + number) for number, letter in enumerate(letters)}
    return {token: token.translate(other) for token in tokens}


def renamed_backend(backend: Any, names: Mapping[str, str]) -> Any:
    """A copy of a `tokenizers.Tokenizer` in which some added tokens have other names and the same ids; None where there is
    none."""
    from tokenizers import Tokenizer

    try:
        parts = json.loads(backend.to_str())
        for token in parts["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = parts["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        if merges := model.get("merges"):  # those that build a token out of letters
            model["merges"] = [pair for pair in merges if not _builds(pair, names)]
        copy = Tokenizer.from_str(json.dumps(parts))
    except Exception:  # a part in Python, which is not written out; a model of a kind of its own
        return None
    return copy if all(copy.token_to_id(name) == backend.token_to_id(token) for token, name in names.items()) else None


def _builds(pair: Any, names: Mapping[str, str]) -> bool:
    one, other = pair.split(" ") if isinstance(pair, str) else pair
    return one in names or other in names or one + other in names
