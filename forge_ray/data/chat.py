"""Chat template → token ids and loss mask (level 2).

Only assistant turns of weight 1 are trained: their content and the end-of-turn token, nothing of the template around them.
`loss_mask[t] = 1` means that token t is a *target* (predicted from the tokens before it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from forge_ray.data.schema import DataRecord, Reject


@dataclass(frozen=True)
class Encoded:
    """Token ids of one document and, of the same length, which of them are trained."""

    ids: list[int]
    loss_mask: list[int]


def template_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the template sees: everything but our own `weight`."""
    return [{key: item for key, item in message.items() if key != "weight"} for message in messages]


def render(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, for_answer: bool) -> str:
    """The template's text (transformers' sandbox); `for_answer` ends where the assistant starts to speak."""
    try:
        text = tokenizer.apply_chat_template(
            template_messages(messages), tools=tools, tokenize=False, add_generation_prompt=for_answer
        )
    except Exception as error:  # jinja errors of many kinds: the template refuses these roles
        raise Reject(f"the chat template refuses the conversation: {str(error)[:80]}") from error
    return str(text)


def prompt_ids(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> list[int]:
    """Ids up to where the assistant answers: what serving and evaluation feed the engine."""
    return list(tokenizer(render(tokenizer, messages, tools, True), add_special_tokens=False)["input_ids"])


def end_of_turn_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise Reject("the tokenizer has no end-of-sequence token")
    return int(tokenizer.eos_token_id)


def encode(tokenizer: Any, record: DataRecord, sequence_length: int, overlong: str) -> list[Encoded]:
    """One document, or several where a plain text is longer than the sequence; raises `Reject`."""
    if "text" in record.content:
        return _encode_text(tokenizer, record.content["text"], sequence_length)
    encoded = encode_chat(tokenizer, record.messages, record.content.get("tools"))
    if len(encoded.ids) > sequence_length:
        if overlong == "reject":
            raise Reject("longer than sequence_length")
        encoded = Encoded(encoded.ids[:sequence_length], encoded.loss_mask[:sequence_length])
    if not any(encoded.loss_mask[1:]):  # the first token has nothing to be predicted from
        raise Reject("no trained token")
    return [encoded]


def encode_chat(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None) -> Encoded:
    """Tokenise the whole conversation once and mark the tokens that lie inside a trained answer."""
    text = render(tokenizer, messages, tools, False)
    spans = list(_answer_spans(tokenizer, messages, tools, text))
    ids, offsets = _tokenise(tokenizer, text, [start for start, _ in spans])
    loss_mask = [0] * len(ids)
    end_id = end_of_turn_id(tokenizer)
    for start, end in spans:
        inside = [i for i, (a, b) in enumerate(offsets) if start <= a and b <= end and a < b]
        last = max((i for i in inside if ids[i] == end_id), default=None)
        if last is None:
            raise Reject("the template closes the answer without the end-of-turn token")
        for i in inside:
            loss_mask[i] = int(i <= last)  # what the template writes after the end of turn is not generated
    return Encoded(ids, loss_mask)


def _tokenise(tokenizer: Any, text: str, starts: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character offsets. Where a token would join the template's end with an answer's start, the text is cut: an
    answer that is generated starts behind the prompt's last token, so one that is trained must too."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
    cuts = [start for start in starts if any(a < start < b for a, b in offsets)]
    if cuts:
        ids, offsets = [], []
        for first, last in pairwise([0, *cuts, len(text)]):
            encoding = tokenizer(text[first:last], add_special_tokens=False, return_offsets_mapping=True)
            ids += encoding["input_ids"]
            offsets += [(first + a, first + b) for a, b in encoding["offset_mapping"]]
    return ids, offsets


def _answer_spans(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, text: str
) -> Iterator[tuple[int, int]]:
    """Character ranges of the trained answers: from where generation would start to where the next turn would."""
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("weight", 1):
            continue
        prefix = render(tokenizer, messages[:number], tools, True)
        whole = render(tokenizer, messages[: number + 1], tools, False)
        if not (whole.startswith(prefix) and text.startswith(whole)):
            raise Reject("the chat template rewrites earlier turns")
        yield len(prefix), len(whole)


def _encode_text(tokenizer: Any, text: str, sequence_length: int) -> list[Encoded]:
    """Plain text: every token but a document's first is a target; the end token closes the last piece."""
    ids = [*tokenizer(text, add_special_tokens=True)["input_ids"]]
    if ids[-1:] != [end_of_turn_id(tokenizer)]:
        ids.append(end_of_turn_id(tokenizer))
    if len(ids) < 2:
        raise Reject("no trained token")
    cuts = [*range(0, len(ids), sequence_length), len(ids)]
    if cuts[-1] - cuts[-2] == 1:  # one token alone has nothing to be predicted from
        cuts[-2] -= 1
    return [Encoded(ids[a:b], [0] + [1] * (b - a - 1)) for a, b in pairwise(cuts)]
