"""The added and special tokens of a transformers tokenizer, as texts, ids and patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.data.tokens.render import any_of


@dataclass(frozen=True, eq=False)
class SpecialTokens:
    """Added tokens; the special ones among them are left out where text is shown."""

    tokenizer: Any

    @cached_property
    def texts(self) -> dict[int, str]:
        return {int(i): str(token.content) for i, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def ids(self) -> dict[str, int]:
        return {text: i for i, text in self.texts.items()}

    @cached_property
    def is_control(self) -> npt.NDArray[np.bool_]:
        """Special ids but that of unknown letters."""
        table = self.is_special.copy()
        if self.tokenizer.unk_token_id is not None:
            table[int(self.tokenizer.unk_token_id)] = False
        return table

    @cached_property
    def special_texts(self) -> frozenset[str]:
        return frozenset(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return any_of(self.special_texts)

    @cached_property
    def added_pattern(self) -> re.Pattern[str]:
        return any_of({token.content for token in self.tokenizer.added_tokens_decoder.values()})

    @cached_property
    def separating(self) -> frozenset[str]:
        """Special tokens that are found whatever stands before them, and take nothing of it."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        return frozenset(t.content for t in tokens if t.special and not (t.lstrip or t.normalized or t.single_word))

    @cached_property
    def may_come_of_a_normaliser(self) -> bool:
        """Whether a special token may be found in a text that does not spell it."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        normalises = self.tokenizer.is_fast and self.tokenizer.backend_tokenizer.normalizer is not None
        return normalises and any(token.special and token.normalized for token in tokens)

    @cached_property
    def is_special(self) -> npt.NDArray[np.bool_]:
        table = np.zeros(max(len(self.tokenizer), max(self.special_ids, default=0) + 1), bool)
        table[list(self.special_ids)] = True
        return table

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)
