"""Calls read off what a model writes: brackets in quotation marks, text around them, and text that only looks like calls."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from forge_ray.data.tokens.call_forms import CallForm, ParsedCall, parse

pytestmark = pytest.mark.unit
PYTHON = CallForm("python", "[", "]")
TAGS = {"before_name": "<f=", "after_name": ">", "before_key": "<p=", "after_key": ">", "after_value": "</p>"}
TAGGED = CallForm("tagged", "", "</f>", after_call="</f>", **TAGS)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("foo(a=1)", [ParsedCall("foo", {"a": 1})]),
        ("[foo(a=1), bar(b='x')]", [ParsedCall("foo", {"a": 1}), ParsedCall("bar", {"b": "x"})]),
        (
            "[foo(a='it\\'s :)', b=[1, (2)], c={'k': \"]\"})]",
            [ParsedCall("foo", {"a": "it's :)", "b": [1, 2], "c": {"k": "]"}})],
        ),
        ("As print(this) shows: [foo(a=1)] and so on", [ParsedCall("foo", {"a": 1})]),
        ("[foo(a=1), bar(", []),  # not whole yet
        ("[foo(a=')", []),
    ],
)
def test_calls_as_python_writes_them(text: str, calls: list[ParsedCall]) -> None:
    assert list(parse(PYTHON, text)) == calls


def test_text_that_looks_like_many_calls_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is read again with each of its tokens, while others wait."""
    num_read = 0
    read = ast.parse

    def counted(source: str, **more: Any) -> Any:
        nonlocal num_read
        num_read += len(source)
        return read(source, **more)

    monkeypatch.setattr(ast, "parse", counted)
    for text in ("[" + "a(b c) " * 500, "a(" * 500 + ")" * 499, "[" * 500 + "a(b c)]" * 500):
        num_read = 0
        assert list(parse(PYTHON, text)) == []
        assert num_read <= len(text)


def test_tags_that_are_not_whole_are_left_out() -> None:
    whole = "<p=a>\n1\n</p><p=b>x<p=y</p>"
    assert list(parse(TAGGED, f"<f=foo>{whole}<p=c>open</f>")) == [ParsedCall("foo", {"a": 1, "b": "x<p=y"})]
