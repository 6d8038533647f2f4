"""Hugging Face models: rendered conversations → token ids and loss mask.

A batch of conversations is tokenised by one call, and an answer's tokens are found by its characters.
"""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.adapt import probe_tools
from forge_ray.data.tokens.answers import AnswerForm
from forge_ray.data.tokens.call_forms import CallForm, style_of
from forge_ray.data.tokens.decoding import writes_others
from forge_ray.data.tokens.documents import ChatDocument, ChatFormat, TurnSpan
from forge_ray.data.tokens.forged import excess, refuse_built
from forge_ray.data.tokens.render import Rendering
from forge_ray.data.tokens.special_tokens import SpecialTokens, tokens_before
from forge_ray.data.tokens.template import BYTE_OF_CHARACTER, CallStyle, Chat, Encoded, Messages

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece names a single byte
JOINED = "the tokenizer joins the prompt with the answer"
MAX_TAILS = 1024
MIN_PREFIX, MAX_PREFIXES = 32, 16  # characters worth to be remembered, and how many beginnings of texts are


@dataclass(frozen=True, eq=False)
class HfTokenizer:
    """A transformers tokenizer with its chat template."""

    tokenizer: Any
    date: str = ""
    _tails: dict[str, list[int]] = field(default_factory=dict)
    _prefixes: dict[str, list[int]] = field(default_factory=dict)
    _formats: dict[str, ChatFormat] = field(default_factory=dict)

    @cached_property
    def special(self) -> SpecialTokens:
        return SpecialTokens(self.tokenizer)

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
        return self._plain(text) if self._backend is None else list(self._encode([text])[0].ids)

    def marker_id(self, token: str) -> int | None:
        """The id of an added token of this very text."""
        return self.special.ids.get(token)

    def piece_ids(self, text: str) -> list[int]:
        """Ids of a text inside a turn, without begin and end tokens; `Reject` where it holds a special token."""
        if match := self.special.pattern.search(text):
            raise Reject(f"the text contains the special token {match[0]!r}")
        return self.written_ids(text)

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
        return self._backend is not None and "ByteLevel" in repr(self._backend.decoder)

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

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Plain texts, with the begin token where the tokenizer writes one."""
        if self._backend is None:
            return [list(self.tokenizer(text)["input_ids"]) for text in texts]
        self._reset()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=True)]

    def forged_token(self, text: str, ids: Sequence[int]) -> str:
        """The special token that a part of the plain text has become in its ids; "" where none has. An end token at the
        very end is the one that would be put there anyway."""
        unknown = self.tokenizer.unk_token
        if unknown and unknown in self.special.ids and unknown in text:  # as a letter that has no token would become it too
            return str(unknown)
        ends = self.eos_token_id is not None and text.endswith(self.special.texts.get(self.eos_token_id, "\x00"))
        token_id = excess(ids, self.special.is_control, self._written + ends)
        return "" if token_id is None else self.special.texts[token_id]

    @cached_property
    def _written(self) -> int:
        """How many special tokens the tokenizer itself adds to a plain text."""
        return int(self.special.is_control[np.array(self.text_ids([""])[0], np.int64)].sum())

    def _refuse_forged(self, text: str, ids: Sequence[int]) -> None:
        """The n special tokens of a rendered text are all that its ids may have: others come from normalised text."""
        expected = sum(1 for _ in self.special.pattern.finditer(text))
        if excess(ids, self.special.is_control, expected) is not None:
            raise Reject("a message becomes a special token")

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
        """Ids up to where the assistant answers: what serving and evaluation feed the engine."""
        checked, tools = self._rendering.checked(messages, tools)
        (chat := self.chat_format(tools)).refuse_unplaced(messages)
        text = chat.render(messages, tools, True)
        self._refuse_built(checked, tools, text, True)
        chat.refuse_lost_of_prompt(text, messages, tools)
        spans = chat.answers_in(text, messages, tools)
        ids = self._plain(text) if self._backend is None else self._located(text, spans, self._encode([text])[0])[0]
        self._refuse_forged(text, ids)
        return ids

    def _refuse_built(self, messages: Messages, tools: list[Any] | None, text: str, for_answer: bool) -> None:
        chat = self.chat_format(tools)
        render = partial(chat.render, for_answer=for_answer)
        refuse_built(self.special.pattern, text, messages, tools, render, writes_others(chat.source))

    def encode_chats(self, chats: Sequence[Chat], train_reasoning: bool = True) -> list[list[Encoded] | Reject]:
        """Each conversation as its documents, with the trained answers marked up to their end of turn."""
        plans: list[list[ChatDocument] | Reject] = []
        for messages, tools in chats:
            try:
                checked, tools = self._rendering.checked(messages, tools)
                chat = self.chat_format(tools)
                chat.refuse_unplaced(messages)
                text = chat.render(messages, tools, False)
                self._refuse_built(checked, tools, text, False)
                documents = chat.documents(messages, tools, text)
                if not train_reasoning:
                    documents = [chat.without_reasoning(document, messages) for document in documents]
                for document in documents:
                    chat.refuse_lost(document, messages, tools)
                plans.append(documents)
            except Reject as error:
                plans.append(error)
        flat = [(one.text, list(one.spans)) for plan in plans if not isinstance(plan, Reject) for one in plan]
        encoded = iter(self._encoded(flat))
        results: list[list[Encoded] | Reject] = []
        for plan in plans:
            if isinstance(plan, Reject):
                results.append(plan)
                continue
            parts = [next(encoded) for _ in plan]
            refused = next((one for one in parts if isinstance(one, Reject)), None)
            results.append(refused or [one for one in parts if isinstance(one, Encoded)])
        return results

    def _encoded(self, plans: list[tuple[str, list[TurnSpan]]]) -> list[Encoded | Reject]:
        """Without offsets where the special tokens tell where the answers are; offsets cost a quarter more."""
        results: list[Encoded | Reject | None] = [None] * len(plans)
        if self._backend is not None:
            for number, ids in enumerate(self._ids([text for text, _ in plans])):
                results[number] = self._by_special_tokens(*plans[number], ids)
        left = [number for number, result in enumerate(results) if result is None]
        for number, encoding in zip(left, self._encode([plans[number][0] for number in left]), strict=True):
            results[number] = self._marked(*plans[number], encoding)
        return [result for result in results if result is not None]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text; beginnings that texts share (a system prompt, a list of tools) are tokenised once.

        A text may be cut before a special token: what stands on either side of one is tokenised by itself.
        """
        self._reset()
        starts = self._shared(texts)
        rests = [text[len(start) :] for text, start in zip(texts, starts, strict=True)]
        encodings = self._backend.encode_batch_fast(rests, add_special_tokens=False)
        return [self._prefixes.get(start, []) + encoding.ids for start, encoding in zip(starts, encodings, strict=True)]

    def _shared(self, texts: list[str]) -> list[str]:
        """The remembered beginning of each text, or "". One that two neighbours share is remembered."""
        starts, before = [], ""
        for text in texts:
            start = next((prefix for prefix in self._prefixes if text.startswith(prefix)), "")
            if not start and len(self._prefixes) < MAX_PREFIXES:
                start = self._common_start(before, text)
                if start:
                    self._prefixes[start] = self._encode([start])[0].ids
            starts.append(start)
            before = text
        return starts

    def _common_start(self, one: str, other: str) -> str:
        """What both begin with, up to the last special token that may be cut at; "" where that is not worth it."""
        if one[:MIN_PREFIX] != other[:MIN_PREFIX]:
            return ""
        shorter = min(len(one), len(other))
        common = one[: bisect_left(range(1, shorter + 1), True, key=lambda length: one[:length] != other[:length])]
        cuts = [
            match.start() for match in self.special.added_pattern.finditer(common) if match[0] in self.special.separating
        ]
        return common[: cuts[-1]] if cuts and cuts[-1] >= MIN_PREFIX else ""

    def _by_special_tokens(self, text: str, spans: list[TurnSpan], token_ids: list[int]) -> Encoded | None:
        """What `_marked` gives, from the places of special tokens in the text and in the ids; None where they do not tell.

        The n-th special token of the text is the n-th special id, since no content holds one (`Rendering.checked`).
        """
        ids = np.array(token_ids, np.int32)
        places = np.flatnonzero(self.special.is_special[ids])
        tokens = list(self.special.pattern.finditer(text))
        if len(tokens) != len(places):
            return None
        mask, after = np.zeros(len(ids), np.int8), 0
        for span in spans:
            if not span.trained:
                continue
            while after < len(tokens) and tokens[after].end() <= span.start:
                after += 1
            if not after:
                return None
            expected = self._expected(text[tokens[after - 1].start() : span.start])
            begin = int(places[after - 1])
            first, last = begin + len(expected), 0
            if token_ids[begin:first] != expected:
                return None
            for number in range(after, len(tokens)):
                if tokens[number].end() == span.end:
                    last = int(places[number]) + 1
            if not last:
                return None
            mask[first:last] = 1
        return Encoded(ids, mask)

    def _expected(self, tail: str) -> list[int]:
        """The ids of a prompt's end, from its last special token."""
        expected = self._tails.get(tail)
        if expected is None:
            expected = self._encode([tail])[0].ids
            if len(self._tails) < MAX_TAILS and len(tail) < MAX_TAILS:
                self._tails[tail] = expected
        return expected

    @cached_property
    def _backend(self) -> Any:
        return self.tokenizer.backend_tokenizer if self.tokenizer.is_fast else None

    def _encode(self, texts: list[str], add_special_tokens: bool = False) -> list[Any]:
        if self._backend is None:
            return [None] * len(texts)
        self._reset()
        return list(self._backend.encode_batch(texts, add_special_tokens=add_special_tokens))

    def _reset(self) -> None:
        """A call of transformers may have left these behind."""
        if self._backend.padding is not None:
            self._backend.no_padding()
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.encode_special_tokens:  # to set it fails while another thread encodes
            self._backend.encode_special_tokens = False

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _marked(self, text: str, spans: list[TurnSpan], encoding: Any) -> Encoded | Reject:
        try:
            ids, ranges = self._located(text, spans, encoding) if encoding else self._located_slowly(text, spans)
            self._refuse_forged(text, ids)
            mask = np.zeros(len(ids), np.int8)
            for span, (first, last) in zip(spans, ranges, strict=True):
                if not span.trained:
                    continue
                if last <= first or ids[last - 1] not in self.special.special_ids:
                    raise Reject("the template closes the answer without an end-of-turn token")
                mask[first:last] = 1
        except Reject as error:
            return error
        return Encoded(np.array(ids, np.int32), mask)

    def _located(self, text: str, spans: list[TurnSpan], encoding: Any) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids and the range of tokens of each span. An answer that is generated starts behind the prompt's last
        token, so one that is trained must too: where the text as a whole is tokenised otherwise, it is cut there."""
        ids: list[int] = encoding.ids
        ranges, cuts = [], []
        for span in spans:
            first = encoding.char_to_token(span.start)
            if first is None:  # some tokenizers leave white space out of a token's range
                at = range(span.start + 1, len(text))
                first = next((i for c in at if (i := encoding.char_to_token(c)) is not None), len(ids))
            if self._continues(text, span.start, encoding, ids, first):
                ranges.append((first, tokens_before(encoding, span.end, len(ids))))
            else:
                cuts.append(span.start)
        return self._cut(text, spans, cuts) if cuts else (ids, ranges)

    def _continues(self, text: str, start: int, encoding: Any, ids: list[int], first: int) -> bool:
        """Whether the tokens before `first` are those of the prompt alone. What stands before a special token is
        tokenised without regard to what follows it, so only the prompt's end from its last special token is compared."""
        begin = first - 1
        while begin > 0 and ids[begin] not in self.special.special_ids:
            begin -= 1
        tail = text[encoding.token_to_chars(begin)[0] if begin > 0 else 0 : start]
        expected = self._expected(tail)
        return first >= len(expected) and ids[first - len(expected) : first] == expected

    def _cut(self, text: str, spans: list[TurnSpan], cuts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        starts: dict[int, int] = {}
        bounds = [0, *sorted(set(cuts)), len(text)]
        pieces = [text[a:b] for a, b in pairwise(bounds)]
        for at, piece, encoding in zip(bounds, pieces, self._encode(pieces), strict=False):
            if at and self.decode(encoding.ids) != piece:  # a tokenizer that marks the beginning of a text
                raise Reject(JOINED)
            starts[at] = len(ids)
            ids += encoding.ids
            offsets += [(at + a, at + b) for a, b in encoding.offsets]
        firsts = [starts[s.start] if s.start in starts else sum(a < s.start for a, _ in offsets) for s in spans]
        return ids, [(first, sum(a < s.end for a, _ in offsets)) for first, s in zip(firsts, spans, strict=True)]

    def _located_slowly(self, text: str, spans: list[TurnSpan]) -> tuple[list[int], list[tuple[int, int]]]:
        """For tokenizers without offsets: the ids of each beginning of the text must be a beginning of the ids."""
        ids, ranges = self._plain(text), []
        for span in spans:
            before, until = self._plain(text[: span.start]), self._plain(text[: span.end])
            if ids[: len(before)] != before or ids[: len(until)] != until:
                raise Reject(JOINED)
            ranges.append((len(before), len(until)))
        return ids, ranges
