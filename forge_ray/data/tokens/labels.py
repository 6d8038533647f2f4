"""The documents of `data.form: labels`: the prompt of a chat's last answer, ending where serving would begin to generate.

The answer is the label, which is no part of the document (`dataset/labels.py`). The one trained position is the document's
last token, at which a head over labels is read.
"""

from __future__ import annotations

import numpy as np

from forge_ray.data.record.schema import DataRecord, Reject
from forge_ray.data.tokens.proof import TWO_BEGINS
from forge_ray.data.tokens.template import ChatTokenizer, Encoded
from forge_ray.data.tokens.units import TOO_LONG

NO_LABEL = "no label: data.form=labels takes chats that end in an answer of text"
TOO_SHORT = "a prompt of one token"
PAD_AT_END = "the prompt ends with the model's pad token, which a classifier takes for padding"


def label_document(
    tokenizer: ChatTokenizer, record: DataRecord, sequence_length: int, overlong: str, reasoning: str
) -> list[Encoded] | Reject:
    """The one document of a record, or why it cannot be used. `reasoning`: that of earlier answers is dropped or stays."""
    if record.kind != "chat" or not label_text(record.content):
        return Reject(NO_LABEL)
    messages = [
        {key: item for key, item in turn.items() if reasoning != "drop" or key != "reasoning_content"}
        for turn in record.messages[:-1]
    ]
    try:
        ids = tokenizer.prompt_ids(messages, record.content.get("tools"))
    except Reject as reason:
        return reason
    is_cut = len(ids) > sequence_length
    if is_cut and overlong == "reject":
        return Reject(TOO_LONG)
    ids = ids[:sequence_length]
    if len(ids) < 2:
        return Reject(TOO_SHORT)
    if ids[-1] == tokenizer.pad_id:
        return Reject(PAD_AT_END)
    if ids[0] == ids[1] == tokenizer.bos_id:
        return Reject(TWO_BEGINS)
    loss_mask = np.zeros(len(ids), np.int8)
    loss_mask[-1] = 1
    return [Encoded(np.array(ids, np.int32), loss_mask, truncated=is_cut)]


def label_text(content: dict[str, object]) -> str:
    """The label of a chat: its last answer; "" where it does not end in one of text alone."""
    messages = content.get("messages")
    last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else {}
    text = last.get("content") if last.get("role") == "assistant" and not last.get("tool_calls") else ""
    return text if isinstance(text, str) else ""
