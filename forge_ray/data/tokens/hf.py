"""Hugging Face models: conversations, as the model's own template writes them, → token ids and loss mask."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.adapt import probe_tools
from forge_ray.data.tokens.answers import AnswerForm
from forge_ray.data.tokens.call_forms import CallForm, style_of
from forge_ray.data.tokens.decoding import writes_others
from forge_ray.data.tokens.documents import ChatDocument, ChatFormat
from forge_ray.data.tokens.encode import Others, TextEncoder
from forge_ray.data.tokens.fast import FastEncoder
from forge_ray.data.tokens.forged import excess, refuse_built, strings_of
from forge_ray.data.tokens.render import Rendering
from forge_ray.data.tokens.special_tokens import SpecialTokens
from forge_ray.data.tokens.spelled import FORGED, NOTHING, SpellingGuard, guarded_chat
from forge_ray.data.tokens.template import BYTE_OF_CHARACTER, CallStyle, Chat, Encoded, Messages

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece names a single byte


@dataclass(frozen=True)
class _WrittenChat:
    """`text`: what the template writes of messages and tools, which have the marks of `guard` where they spelled a token.
    `names`: the tokens that no message makes."""

    format: ChatFormat
    messages: Messages
    tools: list[Any] | None
    text: str
    guard: SpellingGuard
    names: frozenset[str]


@dataclass(frozen=True, eq=False)
class HfTokenizer:
    """A transformers tokenizer with its chat template; `fast` as `TextEncoder` has it."""

    tokenizer: Any
    date: str = ""
    fast: FastEncoder | None = None
    _formats: dict[str, ChatFormat] = field(default_factory=dict)
    _renamed: Others = field(default_factory=dict)  # of the same tokenizer with other switches of its template too

    @cached_property
    def encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, self._renamed, self.fast)

    @cached_property
    def special(self) -> SpecialTokens:
        return self.encoder.special

    @cached_property
    def _rendering(self) -> Rendering:
        return Rendering(self.tokenizer, self.date)

    @cached_property
    def eos_token_id(self) -> int | None:
        return None if (token := self.tokenizer.eos_token_id) is None else int(token)

    @cached_property
    def end_of_turn_id(self) -> int:
        if (token := self.eos_token_id) is None:
            raise Reject("the tokenizer has no end-of-sequence token")
        return token

    @cached_property
    def bos_id(self) -> int | None:
        return None if (token := self.tokenizer.bos_token_id) is None else int(token)

    @cached_property
    def pad_id(self) -> int:
        return self.end_of_turn_id if (token := self.tokenizer.pad_token_id) is None else int(token)

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def has_chat(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @cached_property
    def call_style(self) -> CallStyle:
        """How the chat template writes calls, as a probe of it shows."""
        return "" if self.call_form is None else style_of(self.call_form)

    @cached_property
    def call_form(self) -> CallForm | None:
        return self.chat_format(probe_tools()).call_form if self.has_chat else None

    @cached_property
    def answer_form(self) -> AnswerForm | None:
        """How the chat template writes an answer; None without a template, or where it writes none."""
        try:
            return self.chat_format(None).answer if self.has_chat else None
        except Reject:
            return None

    def written_ids(self, text: str) -> list[int]:
        """Ids of a text that the template itself writes: what names a special token is one."""
        return self.encoder.written_ids(text)

    def marker_id(self, token: str) -> int | None:
        """The id of an added token of this very text."""
        return self.special.ids.get(token)

    def piece_ids(self, text: str) -> list[int]:
        """Ids of a text inside a turn, without begin and end tokens; no part of it becomes a special token. `Reject`
        where the tokenizer cannot do that."""
        ids = self.encoder.written_ids(text)
        is_plain = not self.spells(text) and excess(ids, self.special.is_control, 0) is None
        return ids if is_plain else self.encoder.spelled_ids(text, self._names, add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, in UTF-8; maybe a part of a character. A special token is its name."""
        if token_id in self.special.texts:
            return self.special.texts[token_id].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # a row of the embedding that no token has
            return b""
        if self._is_byte_level:
            return bytes(BYTE_OF_CHARACTER[character] for character in piece)
        byte = BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else str(piece).replace("\u2581", " ").encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return self.encoder.backend is not None and "ByteLevel" in repr(self.encoder.backend.decoder)

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        return str(
            self.tokenizer.decode(
                [int(token) for token in ids],
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            )
        )

    def spells(self, text: str) -> bool:
        """Whether a special token is spelled in the text."""
        return self.special.pattern.search(text) is not None

    def text_ids(self, texts: Sequence[str]) -> list[list[int] | Reject]:
        """Plain texts, with the begin token where the tokenizer writes one. No part of a text becomes a special token; a
        `Reject` in its place where the tokenizer cannot do that."""
        backend, unknown = self.encoder.backend, self.tokenizer.unk_token
        if backend is None:
            all_ids = [list(self.tokenizer(text)["input_ids"]) for text in texts]
        else:
            all_ids = [ids.tolist() for ids in self.encoder.ids_of(texts, add_special_tokens=True)]
        results: list[list[int] | Reject] = []
        for text, ids in zip(texts, all_ids, strict=True):
            # a letter that has no token would become the unknown one too, so that one is looked for in the text
            is_plain = excess(ids, self.special.is_control, self._written) is None and not (unknown and unknown in text)
            try:
                results.append(ids if is_plain else self.encoder.spelled_ids(text, self._names, add_special_tokens=True))
            except Reject as error:
                results.append(error)
        return results

    @cached_property
    def _names(self) -> frozenset[str]:
        """The tokens that get another name where a plain text spells a special one."""
        return self._rendering.control(None).names if self.has_chat else self.special.special_texts

    @cached_property
    def _written(self) -> int:
        """How many special tokens the tokenizer itself adds to a plain text."""
        return int(self.special.is_control[np.array(self.tokenizer("")["input_ids"], np.int64)].sum())

    def chat_format(self, tools: list[Any] | None) -> ChatFormat:
        """What the template for a conversation with these tools writes."""
        source = self._rendering.source(tools)
        if source not in self._formats:
            self._formats[source] = ChatFormat(self._rendering.render, self.special.pattern, source)
        return self._formats[source]

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: what the template writes behind one, and the tokenizer's end of a text."""
        ends = {self.eos_token_id}
        with contextlib.suppress(Reject):
            ends |= {self.marker_id(token) for token in (self.chat_format(None).ends if self.has_chat else ())}
        return tuple(sorted(token for token in ends if token is not None))

    def prompt_ids(self, messages: Messages, tools: list[Any] | None = None) -> list[int]:
        """Ids up to where the assistant answers: what serving and evaluation feed the engine. The time grows with the length
        of the conversation: `ChatFormat.answers_in` says what bounds it."""
        chat = self._written_chat(messages, tools, True)
        chat.format.refuse_lost_of_prompt(chat.text, chat.messages, chat.tools)
        spans = chat.format.answers_in(chat.text, chat.messages, chat.tools)
        if not chat.guard.characters:
            try:
                return self.encoder.prompt_ids(chat.text, spans)
            except Reject as error:
                if str(error) != FORGED:
                    raise
        self._refuse_forged_by_template(chat)
        return self.encoder.spelled_prompt_ids(chat.text, spans, chat.guard, chat.names)

    def encode_chats(self, chats: Sequence[Chat], train_reasoning: bool = True) -> list[list[Encoded] | Reject]:
        """Each conversation as its documents, with the trained answers marked up to their end of turn."""
        plans: list[tuple[_WrittenChat, list[ChatDocument]] | Reject] = []
        for messages, tools in chats:
            try:
                chat = self._written_chat(messages, tools, False)
                documents = chat.format.documents(chat.messages, chat.tools, chat.text)
                if not train_reasoning:
                    documents = [chat.format.without_reasoning(document, chat.messages) for document in documents]
                for document in documents:
                    chat.format.refuse_lost(document, chat.messages, chat.tools)
                plans.append((chat, documents))
            except Reject as error:
                plans.append(error)
        plain = [plan for plan in plans if not isinstance(plan, Reject) and not plan[0].guard.characters]
        encoded = iter(self.encoder.encoded([(one.text, list(one.spans)) for _, documents in plain for one in documents]))
        results: list[list[Encoded] | Reject] = []
        for plan in plans:
            if isinstance(plan, Reject):
                results.append(plan)
                continue
            chat, documents = plan
            parts = [
                self._as_text(chat, document, None if chat.guard.characters else next(encoded)) for document in documents
            ]
            refused = next((one for one in parts if isinstance(one, Reject)), None)
            results.append(refused or [one for one in parts if isinstance(one, Encoded)])
        return results

    def _as_text(self, chat: _WrittenChat, document: ChatDocument, plain: Encoded | Reject | None) -> Encoded | Reject:
        """`plain`, or where a message spells a token or becomes one, the document in which it is text."""
        if plain is not None and (isinstance(plain, Encoded) or str(plain) != FORGED):
            return plain
        try:
            self._refuse_forged_by_template(chat)
        except Reject as error:
            return error
        return self.encoder.spelled(document.text, list(document.spans), chat.guard, chat.names)

    def _written_chat(self, messages: Messages, tools: list[Any] | None, for_answer: bool) -> _WrittenChat:
        """A conversation and what the template writes of it; guarded where it may spell a token. `Reject` where the template
        has no place for a part, or builds a token of parts."""
        tools, guard = tools or None, NOTHING
        control, chat = self._rendering.control(tools), self.chat_format(tools)
        seen, may_spell = self._rendering.seen(messages, tools, control)
        if may_spell:
            messages, tools, guard = guarded_chat(messages, tools, control, chat.source)
            seen, _ = self._rendering.seen(messages, tools, control)
        chat.refuse_unplaced(messages)
        text = chat.render(messages, tools, for_answer)
        render = partial(chat.render, for_answer=for_answer)
        refuse_built(self.special.pattern, text, seen, tools, render, writes_others(chat.source))
        return _WrittenChat(chat, messages, tools, text, guard, control.names)

    def _refuse_forged_by_template(self, chat: _WrittenChat) -> None:
        """Raise `Reject` where a normaliser makes tokens of what the template writes, not of the messages alone: text they
        would be in the template's place too."""
        if self.special.may_come_of_a_normaliser:
            of_messages = self.encoder.num_special(strings_of([*chat.messages, *(chat.tools or ())]))
            written = sum(1 for _ in self.special.pattern.finditer(chat.text))
            if self.encoder.num_special([chat.text]) != written + of_messages:
                raise Reject(FORGED)
