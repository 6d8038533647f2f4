"""Every chat template of trl's package, each with 18 conversations: right, or refused because it has no place for something.

A cell is *right* when the ids before each trained answer are those that serving sends, the trained ids end with a token at
which generation stops, and all of the conversation is in the text; it is *refused* with a reason of the template's own.
Wrong, and silently lost: none. `pytest -s` prints the table.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from template_models import templates, tokenizer

from forge_ray.data.record.schema import DataRecord, Reject
from forge_ray.data.tokens.chat import encode_batch
from forge_ray.data.tokens.hf import HfTokenizer
from forge_ray.data.tokens.lost import lost

pytest.importorskip("trl")
pytestmark = [pytest.mark.unit, pytest.mark.slow]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calls(*arguments: dict[str, Any], text: str = "") -> dict[str, Any]:
    tool_calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": "add", "arguments": json.dumps(value)}}
        for i, value in enumerate(arguments)
    ]
    return {"role": "assistant", **({"content": text} if text else {}), "tool_calls": tool_calls}


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": text}


SYSTEM = {"role": "system", "content": "Be brief, Grüße."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "number", "description": "One."},
                    "b": {"type": "string", "description": "Two."},
                },
                "required": ["a"],
            },
        },
    }
]
ONE, TWO = {"a": 27, "b": "zwölf"}, {"a": 31, "b": "vier"}
CASES: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "single": ([user("2+2?"), says("four")], None),
    "turns": ([user("first?"), says("eins"), user("second?"), says("zwei"), user("third?"), says("drei")], None),
    "system": ([SYSTEM, user("2+2?"), says("four")], None),
    "system, turns": ([SYSTEM, user("first?"), says("eins"), user("second?"), says("zwei")], None),
    "call": ([user("2+2?"), calls(ONE)], TOOLS),
    "tools": ([user("2+2?"), calls(ONE), result(0, "sum is 39"), says("thirty-nine")], TOOLS),
    "text beside call": ([user("2+2?"), calls(ONE, text="Let me add.")], TOOLS),
    "parallel": ([user("two"), calls(ONE, TWO), result(0, "first sum"), result(1, "other sum"), says("done")], TOOLS),
    "after tools": (
        [user("2+2?"), calls(ONE), result(0, "sum is 39"), says("thirty-nine"), user("and?"), says("nothing")],
        TOOLS,
    ),
    "reasoning": ([user("2+2?"), says("four", reasoning_content="because it is even")], None),
    "reasoning, turns": (
        [
            user("first?"),
            says("eins", reasoning_content="thought of one"),
            user("second?"),
            says("zwei", reasoning_content="thought of two"),
        ],
        None,
    ),
    "reasoning, call": ([user("2+2?"), {**calls(ONE), "reasoning_content": "it needs a tool"}], TOOLS),
    "think text": ([user("2+2?"), says("so </think> is text")], None),
    "weight 0": ([user("first?"), says("eins", weight=0), user("second?"), says("zwei")], None),
    "unicode": ([user("Größe 東京 🙂?"), says("naïve 東 🙂 é")], None),
    "white": ([user("  spaces  "), says("an\n\nanswer\twith white")], None),
    "tools unused": ([user("hello"), says("hi there")], TOOLS),
    "name": ([{**user("2+2?"), "name": "opsbot"}, says("four")], None),
}
OWN_REASONS = ("this model's template", "the chat template refuses")


def verdict(model: HfTokenizer, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
    """`right`, the reason of a refusal, or what is wrong."""
    (documents,) = encode_batch(model, [DataRecord({"messages": messages, "tools": tools})], 8192, "reject")
    if isinstance(documents, Reject):
        return str(documents)
    trained = [i for i, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("weight", 1)]
    starts = [
        (document, start) for document in documents for start in np.flatnonzero(np.diff(document.loss_mask, prepend=0) == 1)
    ]
    if len(starts) != len(trained):
        return f"WRONG: {len(starts)} trained answers of {len(trained)}"
    for (document, start), number in zip(starts, trained, strict=True):
        if document.ids[:start].tolist() != model.prompt_ids(messages[:number], tools):
            return "WRONG: serving sends another prompt"
        end = int(np.argmin(np.append(document.loss_mask[start:], 0))) + int(start)
        if int(document.ids[end - 1]) not in model.end_ids:
            return "WRONG: it does not end"
        written = model.decode(document.ids[:end].tolist())
        if missing := lost(written, messages[: number + 1]):
            return f"WRONG: lost: {missing}"
        if end - start < 2:
            return "WRONG: the end alone is trained"
    return "right"


@pytest.mark.parametrize("name", sorted(templates()))
def test_each_conversation_is_right_or_rightly_refused(name: str) -> None:
    model = HfTokenizer(tokenizer(name, templates()[name]))
    verdicts = {case: verdict(model, *conversation) for case, conversation in CASES.items()}
    wrong = {case: what for case, what in verdicts.items() if what != "right" and not what.startswith(OWN_REASONS)}
    print(name, dict(Counter("right" if what == "right" else what[:60] for what in verdicts.values())))
    assert wrong == {}
