"""Mistral models by mistral-common, which is the reference for their tokens: ids, loss mask and prompts.

Special tokens are written by id, so no text of a row or a request can become one. Validation is mistral-common's own:
its finetuning mode for rows, its serving mode for prompts; what it refuses is a `Reject` with its words. The library is
that of `forge-ray[mistral]`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.adapt import with_short_ids
from forge_ray.data.tokens.answers import AnswerForm
from forge_ray.data.tokens.hf import BYTE_PIECE
from forge_ray.data.tokens.render import any_of
from forge_ray.data.tokens.template import CallStyle, Chat, Encoded, Messages
from forge_ray.models.model_files import mistral_file, require_mistral_common

__all__ = ["MistralChat", "load_mistral", "mistral_file"]


def load_mistral(path: Path) -> MistralChat:
    require_mistral_common(path.name, path.parent.name)
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    finetuning = MistralTokenizer.from_file(path, mode=ValidationMode.finetuning)
    serving = MistralTokenizer(
        finetuning.instruct_tokenizer,
        validator=type(finetuning._chat_completion_request_validator)(ValidationMode.serving),
        request_normalizer=finetuning._instruct_request_normalizer,
    )
    return MistralChat(finetuning, serving)


@dataclass(frozen=True, eq=False)
class MistralChat:
    """A `ChatTokenizer` on one tokenizer file, with its two validations. `settings` are written into prompts: a
    `reasoning_effort` of `efforts`, and a `response_format` where the file `shows_formats`; else the file's defaults are."""

    finetuning: Any
    serving: Any
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def efforts(self) -> tuple[str, ...]:
        """Values of `reasoning_effort` that the file knows; none before version 15."""
        builder = self._tokenizer.model_settings_builder
        effort = builder.reasoning_effort if builder is not None else None
        return tuple(map(str, effort.values)) if effort is not None else ()

    @property
    def shows_formats(self) -> bool:
        """Whether a prompt shows the model the schema that its answer must follow."""
        builder = self._tokenizer.model_settings_builder
        return builder is not None and builder.json_schema is not None

    @property
    def _tokenizer(self) -> Any:
        return self.finetuning.instruct_tokenizer.tokenizer

    @property
    def end_of_turn_id(self) -> int:
        return int(self._tokenizer.eos_id)

    @property
    def eos_token_id(self) -> int | None:
        return self.end_of_turn_id

    @property
    def bos_id(self) -> int | None:
        return int(self._tokenizer.bos_id)

    @property
    def pad_id(self) -> int:
        """SentencePiece files have no pad token and say -1."""
        pad = int(self._tokenizer.pad_id)
        return pad if pad >= 0 else self.end_of_turn_id

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.n_words)

    @property
    def has_chat(self) -> bool:
        return True

    @property
    def call_style(self) -> CallStyle:
        """Told by the version of the tokenizer."""
        match self._tokenizer.version.value:
            case "v1":
                return ""
            case "v2" | "v3" | "v7":
                return "mistral-v3"
            case "v11":
                return "mistral-v11"
            case _:
                return "mistral-v13"

    @property
    def call_form(self) -> None:
        """The styles of Mistral's versions say it."""

    @property
    def answer_form(self) -> AnswerForm | None:
        """Reasoning is between two special tokens, where the version has them."""
        if self.marker_id("[THINK]") is None:
            return None
        return AnswerForm("", "[THINK]", "[/THINK]", frozenset(), "", "", has_reasoning=True)

    def written_ids(self, text: str) -> list[int]:
        return self.piece_ids(text)

    def marker_id(self, token: str) -> int | None:
        """The id of a special token."""
        try:
            token_id = int(self._tokenizer.get_special_token(token))
        except (KeyError, ValueError):
            return None
        return token_id if self._tokenizer.id_to_piece(token_id) == token else None  # SentencePiece says 0 of what it lacks

    def piece_ids(self, text: str) -> list[int]:
        """Ids of a text inside a turn, without begin and end tokens; no text becomes a special token."""
        return list(self._tokenizer.encode(text, bos=False, eos=False))

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, in UTF-8; maybe a part of a character. A special token is its name."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        if self._tokenizer.is_special(token_id):
            return str(self._tokenizer.id_to_piece(token_id)).encode()
        if hasattr(self._tokenizer, "id_to_byte_piece"):
            return bytes(self._tokenizer.id_to_byte_piece(token_id))
        piece = str(self._tokenizer.id_to_piece(token_id))
        byte = BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()

    def spells(self, text: str) -> bool:
        """Whether a special token is spelled in the text."""
        return self._special.search(text) is not None

    @cached_property
    def _special(self) -> re.Pattern[str]:
        tokens = [token for token in range(self.vocab_size) if self._tokenizer.is_special(token)]
        return any_of({str(self._tokenizer.id_to_piece(token)) for token in tokens})

    def text_ids(self, texts: Sequence[str]) -> list[list[int] | Reject]:
        """Plain texts behind one begin token; the end token is the caller's, for a prompt has none."""
        return [list(self._tokenizer.encode(text, bos=True, eos=False)) for text in texts]

    def prompt_ids(self, messages: Messages, tools: list[Any] | None = None) -> list[int]:
        """Ids up to where the assistant answers, exactly those of `encode_chat_completion` in serving mode."""
        with _refusals():
            request = _request(messages, tools, False, self.settings)
            return [int(token) for token in self.serving.encode_chat_completion(request).tokens]

    @property
    def end_ids(self) -> tuple[int, ...]:
        return (self.end_of_turn_id,)

    def encode_chats(self, chats: Sequence[Chat], train_reasoning: bool = True) -> list[list[Encoded] | Reject]:
        """Each conversation as one document, or one per answer where serving sends another prompt before it: some versions
        put the system prompt or the tools into the last question alone."""
        results: list[list[Encoded] | Reject] = []
        for messages, tools in chats:
            try:
                documents = self._documents(messages, tools)
                results.append(documents if train_reasoning else [self._behind_reasoning(one) for one in documents])
            except Reject as error:
                results.append(error)
        return results

    def _documents(self, messages: Messages, tools: list[Any] | None) -> list[Encoded]:
        trained = [i for i, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("weight", 1)]
        if any(one["role"] == other["role"] == "assistant" for one, other in pairwise(messages)):
            return [self._encode(messages, tools)]  # neighbours are one turn: no prompt ends between them
        with contextlib.suppress(Reject):
            whole = self._encode(messages, tools)
            starts = np.flatnonzero(np.diff(whole.loss_mask, prepend=0) == 1).tolist()
            prompts = [self.prompt_ids(messages[:i], tools) for i in trained]
            if len(starts) == len(trained) and all(
                whole.ids[:start].tolist() == prompt for start, prompt in zip(starts, prompts, strict=True)
            ):
                return [whole]
        return [self._of_answer(messages[: i + 1], tools) for i in trained] or [self._encode(messages, tools)]

    def _behind_reasoning(self, document: Encoded) -> Encoded:
        """The document with reasoning in context, not trained."""
        closing, mask = self.marker_id("[/THINK]"), document.loss_mask.copy()
        for place in np.flatnonzero((document.ids == closing) & (mask == 1)).tolist() if closing is not None else ():
            start = place
            while start >= 0 and mask[start]:
                mask[start] = 0
                start -= 1
        return Encoded(document.ids, mask)

    def _of_answer(self, messages: Messages, tools: list[Any] | None) -> Encoded:
        """The prompt of the last turn as serving sends it, and this turn."""
        others = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in messages[:-1]]
        whole, prompt = self._encode([*others, messages[-1]], tools), self.prompt_ids(messages[:-1], tools)
        answer = whole.ids[int(whole.loss_mask.argmax()) :]
        mask = np.array([0] * len(prompt) + [1] * len(answer), np.int8)
        return Encoded(np.array([*prompt, *answer.tolist()], np.int32), mask)

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Text of the ids; special tokens by their names unless skipped, ids outside the vocabulary never."""
        in_vocabulary = [int(token) for token in ids if 0 <= token < self.vocab_size]
        if skip_special_tokens:
            return str(self._tokenizer.decode(in_vocabulary))
        text = ""
        for special, group in groupby(in_vocabulary, self._tokenizer.is_special):
            run = list(group)
            text += "".join(map(self._tokenizer.id_to_piece, run)) if special else self._tokenizer.decode(run)
        return text

    def _encode(self, messages: Messages, tools: list[Any] | None) -> Encoded:
        """The whole conversation in finetuning mode; trained is what each assistant turn of weight 1 consists of."""
        trained = iter(_weights(messages))
        ids, mask = list(self.finetuning.instruct_tokenizer.start()), [0]
        with _refusals():
            for is_answer, tokens in self._turns(_request(messages, tools, True)):
                bit = int(is_answer and next(trained))
                if bit and not tokens:
                    raise Reject("this tokenizer version leaves out tool calls before the last user turn")
                ids += tokens
                mask += [bit] * len(tokens)
        return Encoded(np.array(ids, np.int32), np.array(mask, np.int8))

    def _turns(self, request: Any) -> Iterator[tuple[bool, list[int]]]:
        """(is an answer, tokens) per turn: the loop of mistral-common's `encode_instruct`, which tells no boundaries."""
        from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage

        instruct = self.finetuning.instruct_tokenizer
        checked = self.finetuning._chat_completion_request_validator.validate_request(request)
        normal = self.finetuning._instruct_request_normalizer.from_chat_completion_request(checked)
        instruct.validate_messages(normal.messages)
        if check := getattr(instruct, "_validate_tool_results", None):  # from v2 on; only v2 refuses anything
            check(normal)
        first_user, last_user = instruct.find_first_last_user(normal)
        for i, message in enumerate(normal.messages):
            if isinstance(message, AssistantMessage):
                yield True, instruct.encode_assistant_message(message, i < last_user)
            elif isinstance(message, ToolMessage):
                yield False, instruct.encode_tool_message(message, i < last_user)[0]
            elif isinstance(message, UserMessage):
                position = (i == last_user, i == first_user)
                more = {"system_prompt": normal.system_prompt, "force_img_first": True, "settings": normal.settings}
                yield False, instruct.encode_user_message(message, normal.available_tools, *position, **more)[0]
            else:
                yield False, instruct.encode_system_message(message)[0]


def _weights(messages: Messages) -> list[int]:
    """One weight per assistant turn as mistral-common sees them: neighbours of equal weight are one turn."""
    runs = groupby(messages, lambda message: (message["role"], message.get("weight", 1)))
    return [int(weight) for (role, weight), _ in runs if role == "assistant"]


def _request(
    messages: Messages, tools: list[Any] | None, finetuning: bool, settings: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """A request of mistral-common; OpenAI's form is read by its own converters."""
    from mistral_common.protocol.instruct.messages import FinetuningAssistantMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    plain = [_openai(message) for message in with_short_ids(messages)]
    request: Any = ChatCompletionRequest.from_openai(plain, tools or None, model="served", **settings)
    if finetuning:  # with their weights, so that turns of different weight stay apart
        for i, (message, original) in enumerate(zip(request.messages, messages, strict=True)):
            if original["role"] == "assistant":
                fields = {name: getattr(message, name) for name in ("content", "tool_calls", "prefix")}
                request.messages[i] = FinetuningAssistantMessage(**fields, weight=float(original.get("weight", 1)))
    return request


def _openai(message: dict[str, Any]) -> dict[str, Any]:
    """A message as mistral-common reads it: reasoning as a part of the content, a name where it has a meaning there."""
    turn = {key: item for key, item in message.items() if key not in ("weight", "reasoning_content") and item is not None}
    if reasoning := message.get("reasoning_content"):
        thought = {"type": "thinking", "thinking": reasoning, "closed": True}
        texts = [{"type": "text", "text": turn["content"]}] if turn.get("content") else []
        turn["content"] = [thought, *texts]
    return turn


class _refusals:
    """What mistral-common refuses, in pydantic's, its own or plain errors, becomes a `Reject`."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from mistral_common.exceptions import MistralCommonException

        if isinstance(error, (MistralCommonException, ValueError, AssertionError, TypeError, KeyError, RecursionError)):
            if isinstance(error, Reject):
                return
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise Reject(f"mistral-common refuses the conversation: {reason}") from error
