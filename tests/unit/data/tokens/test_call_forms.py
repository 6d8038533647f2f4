"""Calls read off what a model writes: brackets in quotation marks, text around them, and text that only looks like calls."""

from __future__ import annotations

import ast
import time
from types import SimpleNamespace
from typing import Any

import pytest

from forge_ray.data.tokens import call_forms
from forge_ray.data.tokens.call_forms import JSON, CallForm, ParsedCall, parse

pytestmark = pytest.mark.unit
PYTHON = CallForm("python", "[", "]")
TAGS = {"before_name": "<f=", "after_name": ">", "before_key": "<p=", "after_key": ">", "after_value": "</p>"}
TAGGED = CallForm("tagged", "", "</f>", after_call="</f>", **TAGS)
BRACED = CallForm("braced", "", "", before_name="<c>call:", after_name="{", after_key="<q>")


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
        (
            '[foo(a={"b": [null, true, {"c": false}]}, d=null)]',
            [ParsedCall("foo", {"a": {"b": [None, True, {"c": False}]}, "d": None})],
        ),
        ("[foo(a=nil)]", []),
        ("see f( and then [foo(a=1)]", [ParsedCall("foo", {"a": 1})]),
        ("get_user(the user's id) then [foo(a=1)]", [ParsedCall("foo", {"a": 1})]),
        ("get_user(the user's id) then [ foo(a=')', b='y')]", [ParsedCall("foo", {"a": ")", "b": "y"})]),
        ("as [f( and so \"g(an 8\" disc) it's: [foo(a='[g(b=1)]')]", [ParsedCall("foo", {"a": "[g(b=1)]"})]),
        ("call f(with this) first: foo(a=1)", [ParsedCall("foo", {"a": 1})]),
        ("[foo(a=1), bar(", []),  # not whole yet
        ("[foo(a='see [bar(b=1)] and", []),
        ('[foo(a=1), bar(b=2), baz(c="[bar(b=1)]', []),
        ('[foo("[bar(b=1)]', []),
        ("[foo(a=nil, b='[bar(c=1)]')]", []),
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
    for text in ("[" + "a(b c) " * 500, "a(" * 500 + ")" * 499, "[" * 500 + "a(b c)]" * 500, "a(b,,) 'x' " * 500):
        num_read = 0
        assert list(parse(PYTHON, text)) == []
        assert num_read <= len(text)


@pytest.mark.parametrize(
    "part", ["f(a b ", "[g(it's a ", "[ g(a \" b's ", "[ ", "' [f(a b) \"", "f(a=1 ", "[f(a b)) ", "a b" + " " * 60]
)
def test_the_work_of_reading_python_calls_grows_with_their_text(part: str) -> None:
    num_parts = 200_000 // len(part)
    start = time.process_time()
    assert list(parse(PYTHON, part * num_parts + "f(")) == []
    assert time.process_time() - start < 2  # quadratic would be minutes


def test_tags_that_are_not_whole_are_left_out() -> None:
    whole = "<p=a>\n1\n</p><p=b>x<p=y</p>"
    assert list(parse(TAGGED, f"<f=foo>{whole}<p=c>open</f>")) == [ParsedCall("foo", {"a": 1, "b": "x<p=y"})]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("<c>call:foo{}", [ParsedCall("foo", {})]),
        (
            "<c>call:foo{a:<q>x, {b:<q>,n:-1.5,o:{k:[true,<q>]<q>]}}<c><c>call:bar{a:<q><q>}",
            [ParsedCall("foo", {"a": "x, {b:", "n": -1.5, "o": {"k": [True, "]"]}}), ParsedCall("bar", {"a": ""})],
        ),
        ("<c>call:foo{a:<q><c>call:bar{}<q>}", [ParsedCall("foo", {"a": "<c>call:bar{}"})]),  # a call in a text is a text
        (
            "<c>call:foo{a:[1,None,True,<q>None<q>],None:False}",
            [ParsedCall("foo", {"a": [1, None, True, "None"], "None": False})],
        ),
        ("<c>call:foo{a:1}<c>call:bar{a:<q>}", [ParsedCall("foo", {"a": 1})]),  # not whole yet
        ("<c>call:foo{a:1}<c>call:bar{a 1}<c>call:foo{}", [ParsedCall("foo", {"a": 1})]),  # no arguments
        ("<c>call:foo{a:[1}]", []),
    ],
)
def test_calls_with_other_quotation_marks(text: str, calls: list[ParsedCall]) -> None:
    assert list(parse(BRACED, text)) == calls


def test_the_work_of_reading_braced_calls_grows_with_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    num_read = 0
    read = JSON.raw_decode

    def counted(source: str, *more: Any) -> Any:
        nonlocal num_read
        num_read += len(source)
        return read(source, *more)

    monkeypatch.setattr(call_forms, "JSON", SimpleNamespace(raw_decode=counted))
    text = "".join(f"<c>call:foo{{a:<q>text {number}<q>,n:{number}}}<c>" for number in range(2000))
    assert list(parse(BRACED, text)) == [ParsedCall("foo", {"a": f"text {n}", "n": n}) for n in range(2000)]
    assert num_read <= len(text)
