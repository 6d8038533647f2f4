"""Text that spells a special token stays text: in every template that trl carries, on every kind of tokenizer."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from template_models import templates, tokenizer

from forge_ray.data.record.schema import DataRecord, Reject
from forge_ray.data.tokens.chat import encode_batch
from forge_ray.data.tokens.hf import HfTokenizer

pytest.importorskip("trl")
pytestmark = pytest.mark.unit
NUM_CONVERSATIONS = 3
QUICK = ("qwen3", "llama3", "gemma", "gptoss", "glm4moe", "phi3", "deepseekv3", "smolvlm")
Made = tuple[str, str]  # a text that spells tokens, and one of the same words that spells none


def made(draw: random.Random, tokens: list[str]) -> Made:
    """Some parts: words, and tokens as they are, doubled, cut, one within the other, quoted, in tags."""
    parts = []
    for _ in range(draw.randint(1, 4)):
        one, other = draw.choice(tokens), draw.choice(tokens)
        place = draw.randint(1, max(1, len(one) - 1))
        parts.append(
            draw.choice(
                [
                    one,
                    one + one,
                    one + other,
                    one[:place],
                    one[place:],
                    one[:place] + other + one[place:],
                    f"<b>{one}old price{other}</b>",
                    f'a "{one}" b',
                    f"\n{one}\n",
                    f"Größe 東{one}京🙂",
                ]
            )
        )
    return "The " + " ".join(parts) + " end.", "The " + " ".join("word" for _ in parts) + " end."


def conversation(draw: random.Random, control: list[str], special: list[str]) -> Any:
    """Messages and tools: (spelling, not spelling, the texts that must be found, the answer)."""
    texts: list[str] = []

    def text(tokens: list[str]) -> Made:
        pair = made(draw, tokens)
        texts.append(pair[0])
        return pair

    system, question, description, result = (text(control) for _ in range(4))
    argument, key, answer = (text(special) for _ in range(3))
    with_tools = draw.random() < 0.5

    def build(at: int) -> tuple[list[dict[str, Any]], list[Any] | None]:
        arguments = json.dumps({"a": argument[at], key[at]: [argument[at]]}, ensure_ascii=bool(len(texts[0]) % 2))
        arguments = arguments.replace("<", "\\u003c") if len(texts[1]) % 2 else arguments
        call = {"id": "abcdef123", "type": "function", "function": {"name": "add", "arguments": arguments}}
        parameters = {"type": "object", "properties": {"a": {"type": "string", "description": description[at]}}}
        tool = {"name": "add", "description": description[at], "parameters": parameters}
        head = [{"role": "system", "content": system[at]}, {"role": "user", "content": question[at]}]
        end = {"role": "assistant", "content": answer[at]}
        if not with_tools:
            return [*head, end], None
        middle = [{"role": "assistant", "tool_calls": [call]}]
        middle += [{"role": "tool", "tool_call_id": "abcdef123", "name": "add", "content": result[at]}]
        return [*head, *middle, end], [{"type": "function", "function": tool}]

    values = texts if with_tools else [system[0], question[0], answer[0]]
    return build(0), build(1), values, answer[0]


def written_in(text: str, value: str) -> bool:
    forms = (value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1], repr(value)[1:-1])
    return any(form in text for form in forms)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.large) for name in sorted(templates())]
)
def test_spelled_tokens_are_text_in_every_template(name: str) -> None:
    model = HfTokenizer(tokenizer(name, templates()[name]))
    draw = random.Random(name)
    for _ in range(NUM_CONVERSATIONS):
        control = model._rendering.control(None)
        names, special = sorted(control.names), sorted(control.special)
        ids_of_control = [model.special.ids[token] for token in names]

        def num_control(ids: Any) -> int:
            return int(np.isin(np.asarray(ids), ids_of_control).sum())  # noqa: B023

        spelling, plain, texts, answer = conversation(draw, names, special)
        documents, expected = (
            encode_batch(model, [DataRecord({"messages": m, "tools": t})], 10**6, "reject")[0] for m, t in (spelling, plain)
        )
        if isinstance(expected, Reject):
            assert str(documents) == str(expected)
            continue
        assert not isinstance(documents, Reject), (str(documents), spelling)
        assert [num_control(one.ids) for one in documents] == [num_control(one.ids) for one in expected]
        decoded = model.decode(documents[-1].ids, skip_special_tokens=True)
        assert [text for text in texts if not written_in(decoded, text)] == []
        trained = model.decode(documents[-1].ids[documents[-1].loss_mask > 0], skip_special_tokens=True)
        assert answer in trained
        prompts = [model.prompt_ids(m[:-1], t) for m, t in (spelling, plain)]
        assert num_control(prompts[0]) == num_control(prompts[1])
        start = int(np.flatnonzero(np.diff(documents[-1].loss_mask, prepend=0) == 1)[-1])
        assert documents[-1].ids[:start].tolist() == prompts[0]
