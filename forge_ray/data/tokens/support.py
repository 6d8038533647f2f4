"""What a model's chat template supports, in words: for `forge models check`, and when a model is imported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.adapt import probe_tools
from forge_ray.data.tokens.chat import ChatTokenizer, encode_chat

QUESTION, ANSWER = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "Four."}
CALL = {"id": "call_0001", "type": "function", "function": {"name": "CALLEDWORD", "arguments": '{"KEYWORD": "2"}'}}
OTHER = {"id": "call_0002", "type": "function", "function": {"name": "OTHERCALLWORD", "arguments": '{"OTHERKEYWORD": "3"}'}}
ASKS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_0001", "content": "The sum is 4."}
OTHERS = {"role": "tool", "tool_call_id": "call_0002", "content": "The sum is 5."}
Messages = list[dict[str, Any]]
PROBES: dict[str, tuple[Messages, bool]] = {
    "one turn": ([QUESTION, ANSWER], False),
    "several turns": ([QUESTION, ANSWER, {**QUESTION, "content": "And 3 + 3?"}, {**ANSWER, "content": "Six."}], False),
    "system prompt": ([{"role": "system", "content": "Be brief."}, QUESTION, ANSWER], False),
    "reasoning": ([QUESTION, {**ANSWER, "reasoning_content": "Two and two."}], False),
    "tools": ([QUESTION, ANSWER], True),
    "tool calls": ([QUESTION, ASKS], True),
    "tool results": ([QUESTION, ASKS, RESULT, ANSWER], True),
    "parallel calls": ([QUESTION, {**ASKS, "tool_calls": [CALL, OTHER]}, RESULT, OTHERS, ANSWER], True),
    "text beside a call": ([QUESTION, {**ASKS, "content": "Let me add."}], True),
    "names of speakers": ([{**QUESTION, "name": "olga"}, ANSWER], False),
}


@dataclass(frozen=True)
class Support:
    """`reasons`: what the template has no place for → why; `rendered`: a conversation as it is trained, ⟦trained parts⟧
    marked."""

    supported: tuple[str, ...]
    reasons: dict[str, str]
    ends: tuple[str, ...]
    call_style: str
    documents: dict[str, int]  # of each supported conversation
    rendered: str


def support_of(tokenizer: ChatTokenizer) -> Support:
    """Ask a tokenizer with each probe."""
    reasons: dict[str, str] = {}
    documents: dict[str, int] = {}
    for name, (messages, with_tools) in PROBES.items():
        (outcome,) = tokenizer.encode_chats([(messages, probe_tools() if with_tools else None)])
        if isinstance(outcome, Reject):
            reasons[name] = str(outcome)
        else:
            documents[name] = len(outcome)
    whole = next((name for name in ("tool results", "several turns") if name in documents), "one turn")
    ends = tuple(tokenizer.decode([token]) for token in tokenizer.end_ids)
    return Support(tuple(documents), reasons, ends, tokenizer.call_style, documents, _marked(tokenizer, whole))


def _marked(tokenizer: ChatTokenizer, name: str) -> str:
    messages, with_tools = PROBES[name]
    try:
        encoded = encode_chat(tokenizer, messages, probe_tools() if with_tools else None)
    except Reject:
        return ""
    return "".join(_pieces(tokenizer, encoded.ids.tolist(), encoded.loss_mask.tolist()))


def _pieces(tokenizer: ChatTokenizer, ids: list[int], mask: list[int]) -> Iterator[str]:
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            text = tokenizer.decode(ids[start:end])
            yield f"⟦{text}⟧" if mask[start] else text
            start = end
