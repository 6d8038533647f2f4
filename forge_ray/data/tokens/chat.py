"""Records → token ids and loss mask, with the tokenizer that a model's folder names.

Only assistant turns of weight 1 are trained: their content, their tool calls and the end of turn, nothing of the template
around them. `loss_mask[t] = 1` means that token t is a *target* (predicted from the tokens before it).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import numpy as np

from forge_ray.data.record.schema import DataRecord, Reject
from forge_ray.data.tokens.answers import split
from forge_ray.data.tokens.fast import FastEncoder
from forge_ray.data.tokens.hf import HfTokenizer
from forge_ray.data.tokens.labels import label_document
from forge_ray.data.tokens.proof import prove
from forge_ray.data.tokens.template import Chat, ChatTokenizer, Encoded
from forge_ray.data.tokens.text_tools import TextTools, Tools, tools_of, with_tools
from forge_ray.data.tokens.units import conversations_of, together

__all__ = [
    "ChatTokenizer",
    "Encoded",
    "answer_of",
    "chat_tokenizer",
    "encode",
    "encode_batch",
    "encode_chat",
    "end_of_turn_id",
    "load_tokenizer_dir",
    "prompt_ids",
]


NO_DOCUMENT = Reject("neither a chat nor a text")


def load_tokenizer_dir(folder: Path, date: str = "", tools: Tools = "template") -> ChatTokenizer:
    """The tokenizer of a model's folder; from local files only, no remote code. `date`: the one that its template prints
    (ISO 8601), "" for today's. `tools`: `text` writes tools as text, as it is done for a model that was trained so.

    Where the folder holds Mistral's own tokenizer file beside a `tokenizer.json`, Mistral's is used: mistral-common is the
    reference for these models, the chat template a copy of it.
    """
    from forge_ray.data.tokens.mistral import load_mistral, mistral_file

    own: ChatTokenizer
    if (path := mistral_file(folder)) is not None:
        own = load_mistral(path)
    else:
        loaded = _tokenizer_class(folder).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        own = HfTokenizer(loaded, date)
    return with_tools(with_tools(own, tools), tools_of(folder))


def inner_tokenizer(tokenizer: ChatTokenizer) -> ChatTokenizer:
    """What makes the ids where tools are written as text."""
    return tokenizer.inner if isinstance(tokenizer, TextTools) else tokenizer


def with_fast(tokenizer: ChatTokenizer, fast: FastEncoder) -> ChatTokenizer:
    """The tokenizer with an encoder that is proven to make its ids; another library's tokenizer as it is."""
    if isinstance(tokenizer, TextTools):
        return cast(ChatTokenizer, replace(tokenizer, inner=with_fast(tokenizer.inner, fast)))
    return replace(tokenizer, fast=fast) if isinstance(tokenizer, HfTokenizer) else tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """What `AutoTokenizer` chooses; where the folder itself names the general class, without looking at model
    configurations, for which transformers imports torch: seconds in every worker of a dataset build."""
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if named.get("tokenizer_class") == "TokenizersBackend" and (folder / "tokenizer.json").is_file():
        from transformers import TokenizersBackend

        return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def chat_tokenizer(tokenizer: Any) -> ChatTokenizer:
    """`tokenizer` itself, or a bare transformers tokenizer wrapped."""
    wrapped: ChatTokenizer = tokenizer if hasattr(tokenizer, "encode_chats") else HfTokenizer(tokenizer)
    return wrapped


def prompt_ids(tokenizer: Any, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None) -> list[int]:
    """Ids up to where the assistant answers: what serving and evaluation feed the engine."""
    return chat_tokenizer(tokenizer).prompt_ids(messages, tools)


def end_of_turn_id(tokenizer: Any) -> int:
    return chat_tokenizer(tokenizer).end_of_turn_id


def answer_of(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The answer in generated ids, without reasoning and what else the template writes around it."""
    wrapped = chat_tokenizer(tokenizer)
    form = wrapped.answer_form
    if form is None or not (form.has_reasoning or form.opening.strip()):
        return wrapped.decode(token_ids, skip_special_tokens=True)
    ids = list(token_ids)
    while ids and ids[-1] in wrapped.end_ids:
        ids.pop()
    return split(wrapped.decode(ids), form)[1]


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, Any]], tools: list[Any] | None) -> Encoded:
    """One conversation at full length, or, of several documents, the last answer's; raises `Reject`."""
    (documents,) = chat_tokenizer(tokenizer).encode_chats([(messages, tools)])
    if isinstance(documents, Reject):
        raise documents
    return documents[-1]


def encode(tokenizer: Any, record: DataRecord, sequence_length: int, overlong: str) -> list[Encoded]:
    """`encode_batch` of one record; raises `Reject`."""
    (result,) = encode_batch(tokenizer, [record], sequence_length, overlong)
    if isinstance(result, Reject):
        raise result
    return result


def encode_batch(
    tokenizer: Any,
    records: Sequence[DataRecord],
    sequence_length: int,
    overlong: str,
    reasoning: str = "train",
    form: str = "answers",
) -> list[list[Encoded] | Reject]:
    """Per record its documents, or why it cannot be used. They are several where a plain text is longer than the sequence, a
    template writes the history of each answer anew, or two answers are compared (`units.py`). `reasoning`: that of answers
    is trained, kept as context, or dropped. `form`: of `labels` the prompt alone is the document (`labels.py`)."""
    tokenizer = chat_tokenizer(tokenizer)
    if form == "labels":
        return [label_document(tokenizer, record, sequence_length, overlong, reasoning) for record in records]
    results: list[list[Encoded] | Reject] = [NO_DOCUMENT] * len(records)
    texts = [i for i, record in enumerate(records) if "text" in record.content]
    conversations: list[Chat] = []
    whose_chat = []
    for i, record in enumerate(records):
        for messages in conversations_of(record) if "messages" in record.content else ():
            turns = _without_reasoning(messages) if reasoning == "drop" else messages
            conversations.append((turns, record.content.get("tools")))
            whose_chat.append(i)
    bodies = _without_ends(tokenizer, [records[i].content["text"] for i in texts])
    for i, ids in zip(texts, tokenizer.text_ids(bodies), strict=True):
        results[i] = ids if isinstance(ids, Reject) else _text_documents(ids, tokenizer.end_of_turn_id, sequence_length)
    encoded = zip(whose_chat, tokenizer.encode_chats(conversations, reasoning != "keep"), strict=True)
    for i, group in groupby(encoded, key=itemgetter(0)):
        answers = [documents for _, documents in group]
        if records[i].kind in ("preference", "feedback"):
            results[i] = together(answers, sequence_length, overlong)
        elif isinstance(answers[0], Reject):
            results[i] = answers[0]
        else:
            results[i] = _all_fitted(answers[0], sequence_length, overlong)
    whose, documents = [], []
    for i, result in enumerate(results):
        if not isinstance(result, Reject):
            whose += [i] * len(result)
            documents += result
    for number, reason in prove(tokenizer, documents).items():
        results[whose[number]] = Reject(reason)
    return results


def _without_ends(tokenizer: ChatTokenizer, texts: list[str]) -> list[str]:
    """The texts without an end token that each is written with, since one is put behind every text. Where a text spells
    another special token too (`<s>old price</s>`), its end is text as well."""
    if not texts:
        return []
    end = tokenizer.decode([tokenizer.end_of_turn_id])
    return [text[: -len(end)] if text.endswith(end) and not tokenizer.spells(text[: -len(end)]) else text for text in texts]


def _without_reasoning(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: item for key, item in turn.items() if key != "reasoning_content"} for turn in messages]


def _all_fitted(documents: list[Encoded], sequence_length: int, overlong: str) -> list[Encoded] | Reject:
    fitted: list[Encoded] = []
    for document in documents:
        one = _fitted(document, sequence_length, overlong)
        if isinstance(one, Reject):
            return one
        fitted += one
    return fitted


def _fitted(encoded: Encoded, sequence_length: int, overlong: str) -> list[Encoded] | Reject:
    if len(encoded.ids) > sequence_length:
        if overlong == "reject":
            return Reject("longer than sequence_length")
        encoded = Encoded(encoded.ids[:sequence_length], encoded.loss_mask[:sequence_length], truncated=True)
    if encoded.loss_mask[0]:  # the first token has nothing to be predicted from
        encoded.loss_mask[0] = 0
    return [encoded]


def _text_documents(ids: list[int], end_id: int, sequence_length: int) -> list[Encoded] | Reject:
    """Plain text: every token but a document's first is a target; the end token closes the last piece."""
    if ids[-1:] != [end_id]:
        ids = [*ids, end_id]
    if len(ids) < 2:
        return Reject("no trained token")
    cuts = [*range(0, len(ids), sequence_length), len(ids)]
    if cuts[-1] - cuts[-2] == 1:  # one token alone has nothing to be predicted from
        cuts[-2] -= 1
    documents = [Encoded(np.array(ids[a:b], np.int32), np.ones(b - a, np.int8)) for a, b in pairwise(cuts)]
    for document in documents:
        document.loss_mask[0] = 0
    return documents
