"""What a tokenizer of a model offers to data preparation, evaluation and serving, and what it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from forge_ray.data.record.schema import Reject

Messages = Sequence[dict[str, Any]]
Chat = tuple[Messages, list[Any] | None]  # messages and tools
# How a model writes its tool calls; the numbers are those of Mistral's tokenizer versions, `template` is as `call_form`
# says, "" is none that could be read
CallStyle = Literal["", "hermes", "mistral-v3", "mistral-v11", "mistral-v13", "template"]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: how byte-level tokenizers write the 256 bytes as visible characters."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


BYTE_OF_CHARACTER = _byte_of_character()


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids of one document and, of the same length, which of them are trained."""

    ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.int8]
    truncated: bool = False


class ChatTokenizer(Protocol):
    """What data preparation, evaluation and serving need of a model's tokenizer; raises `Reject`."""

    @property
    def end_of_turn_id(self) -> int: ...
    @property
    def end_ids(self) -> tuple[int, ...]: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def has_chat(self) -> bool: ...
    @property
    def call_style(self) -> CallStyle: ...
    @property
    def call_form(self) -> Any: ...  # a CallForm, or None
    @property
    def answer_form(self) -> Any: ...  # an AnswerForm, or None
    def written_ids(self, text: str) -> list[int]: ...
    def marker_id(self, token: str) -> int | None: ...
    def piece_ids(self, text: str) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def encode_chats(self, chats: Sequence[Chat], train_reasoning: bool = True) -> list[list[Encoded] | Reject]: ...
    def spells(self, text: str) -> bool: ...
    def text_ids(self, texts: Sequence[str]) -> list[list[int] | Reject]: ...
    def prompt_ids(self, messages: Messages, tools: list[Any] | None = None) -> list[int]: ...
    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str: ...
