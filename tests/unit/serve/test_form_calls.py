"""Calls in a template's own form: the text around them, and a mark that is only mentioned."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from forge_ray.data.tokens.call_forms import CallForm
from forge_ray.serve.form_calls import FormParser

pytestmark = pytest.mark.unit

TAGS = {"before_name": "<f=", "after_name": ">", "before_key": "<p=", "after_key": ">", "after_value": "</p>"}
FORM = CallForm("tagged", "\n<call>\n", "\n</call>", after_call="</f>", **TAGS)
CALL = "<call>\n<f=add><p=a>1</p></f>\n</call>"


def parsed(text: str, step: int) -> tuple[str, list[Any]]:
    """(text, calls) of an answer that arrives `step` characters at a time."""
    parser = FormParser(FORM, lambda name, arguments: (name, arguments) if name == "add" else None)
    pieces = [text[start : start + step] for start in range(0, len(text), step)]
    parts = [*itertools.chain.from_iterable(map(parser.push, pieces)), *parser.flush()]
    return "".join(part for part in parts if isinstance(part, str)), [part for part in parts if not isinstance(part, str)]


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "The mark is\n<call>\nand it ends a line.",
        "\n<call> is the mark",
        "\n\n<call> is the mark",
        " \n<call>",
        "a\n",
        "The mark\n<call>\n<f=subtract><p=a>1</p></f>\n</call>",
    ],
    ids=repr,
)
def test_a_mark_that_is_only_mentioned_keeps_its_text(text: str, step: int) -> None:
    assert parsed(text, step) == (text, [])


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_the_line_end_in_front_of_a_call_is_the_form_s(step: int) -> None:
    assert parsed(f"I add.\n{CALL}", step) == ("I add.", [("add", {"a": 1})])
    assert parsed(f"\n{CALL}", step) == ("", [("add", {"a": 1})])
