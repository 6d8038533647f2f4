"""Rendered texts → token ids and loss mask, by a transformers tokenizer; an answer's tokens are found by its characters."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.documents import TurnSpan
from forge_ray.data.tokens.fast import FastEncoder, Ids
from forge_ray.data.tokens.forged import excess
from forge_ray.data.tokens.special_tokens import SpecialTokens
from forge_ray.data.tokens.spelled import FORGED, MAY_BE_RENAMED, SpellingGuard, guarded_text, other_names, renamed_backend
from forge_ray.data.tokens.template import Encoded

JOINED = "the tokenizer joins the prompt with the answer"
MAX_TAILS = 1024
MAX_OTHERS = 4  # copies of the tokenizer that are kept; templates seldom write other tokens than each other
MIN_PREFIX, MAX_PREFIXES = 32, 16  # characters worth to be remembered, and how many beginnings of texts are


@dataclass(frozen=True, eq=False)
class _Renamed:
    """A tokenizer that knows some added tokens by other names alone. `added`: every added token by its own name; `others`:
    own name → other name; `ids`: own name → id; `unknown`: the id of letters that the tokenizer lacks."""

    encoder: TextEncoder
    added: re.Pattern[str]
    others: dict[str, str]
    ids: dict[str, int]
    unknown: int | None

    def renamed(self, text: str, guard: SpellingGuard) -> str:
        """A guarded text as this tokenizer reads it."""
        return guard.removed(self.added.sub(lambda match: self.others.get(match[0], match[0]), text))

    def check(self, text: str, guard: SpellingGuard, ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Raise `Reject` unless the tokens among the ids are those of the guarded text, one by one."""
        expected = [self.ids[match[0]] for match in self.added.finditer(text) if match[0] in self.ids]
        token_ids = set(self.ids.values()) - {self.unknown}
        if [i for i in np.asarray(ids).tolist() if i in token_ids] != [i for i in expected if i in token_ids]:
            raise guard.refusal


Others = dict[frozenset[str], _Renamed | None]  # by the tokens that have other names


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A transformers tokenizer without its template; what it has tokenised often is kept. `fast` makes the ids of texts
    whose offsets nobody needs."""

    tokenizer: Any
    _others: Others = field(default_factory=dict)
    fast: FastEncoder | None = None
    _tails: dict[str, list[int]] = field(default_factory=dict)
    _prefixes: dict[str, Ids] = field(default_factory=dict)

    @cached_property
    def special(self) -> SpecialTokens:
        return SpecialTokens(self.tokenizer)

    @cached_property
    def backend(self) -> Any:
        return self.tokenizer.backend_tokenizer if self.tokenizer.is_fast else None

    def written_ids(self, text: str) -> list[int]:
        """Ids of a text in which what names an added token is one, without begin and end tokens."""
        ids: list[int] = self._plain(text) if self.backend is None else self.ids_of([text])[0].tolist()
        return ids

    def prompt_ids(self, text: str, spans: list[TurnSpan]) -> list[int]:
        """Ids of a prompt, cut where earlier answers begin as they were generated; `Reject` where they have special tokens
        that the text does not have."""
        ids = self.written_ids(text)
        if spans and self.backend is not None:
            trained = [replace(span, trained=True) for span in spans]
            if self._by_special_tokens(text, trained, np.array(ids, np.int32)) is None:
                ids = self._located(text, spans, self.encodings([text])[0])[0]
        self._refuse_forged(text, ids)
        return ids

    def encoded(self, plans: Sequence[tuple[str, list[TurnSpan]]]) -> list[Encoded | Reject]:
        """Without offsets where the special tokens tell where the answers are; offsets cost a quarter more."""
        results: list[Encoded | Reject | None] = [None] * len(plans)
        if self.backend is not None:
            for number, ids in enumerate(self._ids([text for text, _ in plans])):
                results[number] = self._by_special_tokens(*plans[number], ids)
        left = [number for number, result in enumerate(results) if result is None]
        for number, encoding in zip(left, self.encodings([plans[number][0] for number in left]), strict=True):
            results[number] = self._marked(*plans[number], encoding)
        return [result for result in results if result is not None]

    # ---------------------------------------------------------------- texts that spell tokens

    def spelled_prompt_ids(self, text: str, spans: list[TurnSpan], guard: SpellingGuard, names: frozenset[str]) -> list[int]:
        """`prompt_ids` of a guarded text: what was guarded in it is text, what names one of `names` in it is a token."""
        other = self._other(text, guard, names)
        ids = other.encoder.prompt_ids(other.renamed(text, guard), spans)
        other.check(text, guard, ids)
        return ids

    def spelled(self, text: str, spans: list[TurnSpan], guard: SpellingGuard, names: frozenset[str]) -> Encoded | Reject:
        """The same for a document. The spans are right as they are, since nothing here changes a length."""
        try:
            other = self._other(text, guard, names)
            (result,) = other.encoder.encoded([(other.renamed(text, guard), spans)])
            if isinstance(result, Encoded):
                other.check(text, guard, result.ids)
        except Reject as error:
            return error
        return result

    def spelled_ids(self, text: str, names: frozenset[str], add_special_tokens: bool) -> list[int]:
        """Ids of a plain text no part of which is a special token, but for those that the tokenizer itself adds."""
        guarded, guard = guarded_text(text, self.special.special_texts)
        other = self._other(guarded, guard, names)
        (encoding,) = other.encoder.encodings([other.renamed(guarded, guard)])
        other.check(guarded, guard, encoding.ids)
        return list((other.encoder.backend.post_process(encoding, None, True) if add_special_tokens else encoding).ids)

    def _other(self, text: str, guard: SpellingGuard, names: frozenset[str]) -> _Renamed:
        if self.backend is None or guard.hides(text) or MAY_BE_RENAMED.search(text):
            raise guard.refusal
        if names not in self._others:
            if len(self._others) >= MAX_OTHERS:
                self._others.clear()
            self._others[names] = self._renamed(names)
        if (other := self._others[names]) is None:
            raise guard.refusal
        return other

    def _renamed(self, names: frozenset[str]) -> _Renamed | None:
        """Made for the first text that needs it: it takes as long as to load the tokenizer, and as much memory."""
        from transformers import PreTrainedTokenizerFast

        others = other_names(names)
        if (backend := renamed_backend(self.backend, others)) is None:
            return None
        unknown = self.tokenizer.unk_token
        more = {} if unknown is None else {"unk_token": others.get(str(unknown), str(unknown))}
        encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, **more))
        ids = {name: self.special.ids[name] for name in names}
        return _Renamed(encoder, self.special.added_pattern, others, ids, self.tokenizer.unk_token_id)

    # ---------------------------------------------------------------- ids

    def num_special(self, texts: list[str]) -> int:
        """How many special tokens the texts have once they are tokenised, each by itself."""
        return sum(int(self.special.is_control[np.array(self.written_ids(text), np.int64)].sum()) for text in texts)

    def encodings(self, texts: list[str], add_special_tokens: bool = False) -> list[Any]:
        if self.backend is None:
            return [None] * len(texts)
        self.reset()
        return list(self.backend.encode_batch(texts, add_special_tokens=add_special_tokens))

    def ids_of(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[Ids]:
        """The ids of each text: those of `encodings`, without offsets."""
        results = [None] * len(texts) if self.fast is None else self.fast.ids(texts, add_special_tokens)
        left = [number for number, ids in enumerate(results) if ids is None]
        self.reset()
        encodings = self.backend.encode_batch_fast([texts[n] for n in left], add_special_tokens=add_special_tokens)
        of_reference = iter(np.array(encoding.ids, np.int32) for encoding in encodings)
        return [next(of_reference) if ids is None else ids for ids in results]

    def reset(self) -> None:
        """A call of transformers may have left these behind."""
        if self.backend.padding is not None:
            self.backend.no_padding()
        if self.backend.truncation is not None:
            self.backend.no_truncation()
        if self.backend.encode_special_tokens:  # to set it fails while another thread encodes
            self.backend.encode_special_tokens = False

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids(self, texts: list[str]) -> list[Ids]:
        """The ids of each text; beginnings that texts share (a system prompt, a list of tools) are tokenised once.

        A text may be cut before a special token: what stands on either side of one is tokenised by itself.
        """
        starts = self._shared(texts)
        rests = self.ids_of([text[len(start) :] for text, start in zip(texts, starts, strict=True)])
        return [np.concatenate([self._prefixes[a], b]) if a else b for a, b in zip(starts, rests, strict=True)]

    def _shared(self, texts: list[str]) -> list[str]:
        """The remembered beginning of each text, or "". One that two neighbours share is remembered."""
        starts, before = [], ""
        for text in texts:
            start = next((prefix for prefix in self._prefixes if text.startswith(prefix)), "")
            if not start and len(self._prefixes) < MAX_PREFIXES:
                start = self._common_start(before, text)
                if start:
                    (self._prefixes[start],) = self.ids_of([start])
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

    def _by_special_tokens(self, text: str, spans: list[TurnSpan], ids: Ids) -> Encoded | None:
        """What `_marked` gives, from the places of special tokens in the text and in the ids; None where they do not tell.

        The n-th special token of the text is the n-th special id, since a content that spells one is guarded (`spelled`).
        """
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
            if ids[begin:first].tolist() != expected:
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
            expected = self.ids_of([tail])[0].tolist()
            if len(self._tails) < MAX_TAILS and len(tail) < MAX_TAILS:
                self._tails[tail] = expected
        return expected

    def _refuse_forged(self, text: str, ids: Sequence[int]) -> None:
        """The n special tokens of a rendered text are all that its ids may have: others come from normalised text."""
        expected = sum(1 for _ in self.special.pattern.finditer(text))
        if excess(ids, self.special.is_control, expected) is not None:
            raise Reject(FORGED)

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
        offsets: list[tuple[int, int]] = encoding.offsets if spans else []
        begins, ends = [a for a, _ in offsets], [b for _, b in offsets]
        ranges, cuts = [], []
        for span in spans:
            first = bisect_right(ends, span.start)
            while first < len(ids) and begins[first] >= ends[first]:  # white space that is left out of its token's range
                first += 1
            if self._continues(text, span.start, begins, ids, first):
                ranges.append((first, bisect_left(begins, span.end)))
            else:
                cuts.append(span.start)
        return self._cut(text, spans, cuts) if cuts else (ids, ranges)

    def _continues(self, text: str, start: int, begins: list[int], ids: list[int], first: int) -> bool:
        """Whether the tokens before `first` are those of the prompt alone. What stands before a special token is
        tokenised without regard to what follows it, so only the prompt's end from its last special token is compared."""
        begin = first - 1
        while begin > 0 and ids[begin] not in self.special.special_ids:
            begin -= 1
        tail = text[begins[begin] if begin > 0 else 0 : start]
        expected = self._expected(tail)
        return first >= len(expected) and ids[first - len(expected) : first] == expected

    def _cut(self, text: str, spans: list[TurnSpan], cuts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        begins: list[int] = []
        starts: dict[int, int] = {}
        bounds = [0, *sorted(set(cuts)), len(text)]
        pieces = [text[a:b] for a, b in pairwise(bounds)]
        for at, piece, encoding in zip(bounds, pieces, self.encodings(pieces), strict=False):
            if at and self.tokenizer.decode(encoding.ids, clean_up_tokenization_spaces=False) != piece:
                raise Reject(JOINED)  # a tokenizer that marks the beginning of a text
            starts[at] = len(ids)
            ids += encoding.ids
            begins += [at + a for a, _ in encoding.offsets]
        firsts = [starts[s.start] if s.start in starts else bisect_left(begins, s.start) for s in spans]
        return ids, [(first, bisect_left(begins, s.end)) for first, s in zip(firsts, spans, strict=True)]

    def _located_slowly(self, text: str, spans: list[TurnSpan]) -> tuple[list[int], list[tuple[int, int]]]:
        """For tokenizers without offsets: the ids of each beginning of the text must be a beginning of the ids."""
        ids, ranges = self._plain(text), []
        for span in spans:
            before, until = self._plain(text[: span.start]), self._plain(text[: span.end])
            if ids[: len(before)] != before or ids[: len(until)] != until:
                raise Reject(JOINED)
            ranges.append((len(before), len(until)))
        return ids, ranges
