"""Tool calls in generated ids, in whatever form the model writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.adapt import CALL, arguments_of, call_turn, probe_tools
from forge_ray.data.tokens.answers import split
from forge_ray.data.tokens.call_forms import CallForm, form_of, parse
from forge_ray.data.tokens.chat import encode_chat
from forge_ray.data.tokens.template import ChatTokenizer
from forge_ray.evaluate import measures
from forge_ray.evaluate.examples import Example

ARGUMENTS = {"FIRSTKEY": "FIRSTVALUE", "SECONDKEY": "SECONDVALUE"}


def call_form(tokenizer: ChatTokenizer) -> CallForm | None:
    """The form of the model's calls; None where it has no place for them. Mistral's own tokenizers, which have no template,
    are asked to write one."""
    if tokenizer.call_form is not None or not tokenizer.call_style:
        form: CallForm | None = tokenizer.call_form
        return form
    turn = call_turn({"name": CALL["name"], "arguments": json.dumps(ARGUMENTS)})
    try:
        encoded = encode_chat(tokenizer, [{"role": "user", "content": "QUESTIONWORD"}, turn], probe_tools())
    except Reject:
        return None
    ids: list[int] = encoded.ids[encoded.loss_mask > 0].tolist()
    return form_of(_text(tokenizer, ids), CALL["name"], ARGUMENTS)


def expected_calls(example: Example) -> list[dict[str, Any]]:
    """Name and arguments of the calls that a chat ends in, in order."""
    return [{"name": call["function"]["name"], "arguments": arguments_of(call["function"])} for call in example.calls]


def calls_in(tokenizer: ChatTokenizer, form: CallForm | None, token_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Name and arguments of the calls in generated ids, in order, as far as they are whole."""
    if form is None:
        return []
    return [{"name": call.name, "arguments": call.arguments} for call in parse(form, _text(tokenizer, token_ids))]


def _text(tokenizer: ChatTokenizer, token_ids: Sequence[int]) -> str:
    ids = list(token_ids)
    while ids and ids[-1] in tokenizer.end_ids:
        ids.pop()
    text = tokenizer.decode(ids)
    return split(text, tokenizer.answer_form)[1] if tokenizer.answer_form is not None else text


def call_fields(example: Example, called: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of an item about calls: none without tools."""
    if not example.calls:
        return {"called": called} if example.tools else {}
    return {"kind": measures.CALL, "calls": expected_calls(example), "called": called}
