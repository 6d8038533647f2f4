"""Answers against a JSON schema: what conforms, which schemas are refused, and how the share counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge_ray.errors import ConfigError, NotFound
from forge_ray.evaluate.answer_schema import AnswerSchema, read_schema, refuse_unfit, with_validity
from forge_ray.evaluate.chance import wilson
from forge_ray.evaluate.examples import Example
from forge_ray.evaluate.measures import intervals, statistics

pytestmark = pytest.mark.unit

INVOICE = {
    "type": "object",
    "properties": {"total": {"$ref": "#/$defs/amount"}, "currency": {"type": "string", "pattern": "^[A-Z]{3}$"}},
    "required": ["total"],
    "additionalProperties": False,
    "$defs": {"amount": {"type": "number", "minimum": 0}},
}


def schema_of(folder: Path, content: Any) -> AnswerSchema:
    file = folder / "schema.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    schema = read_schema(str(file))
    assert schema is not None
    return schema


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('{"total": 3}', True),
        (' {"total": 3.5, "currency": "EUR"}\n', True),
        ('{"total": -3}', False),
        ('{"total": "3"}', False),
        ('{"total": 3, "currency": "euro"}', False),
        ('{"total": 3, "vat": 1}', False),
        ("{}", False),
        ("[3]", False),
        ("3", False),
        ("", False),
        ('{"total": 3', False),
        ('```json\n{"total": 3}\n```', False),
        ('{"total": Infinity}', False),
        ("[" * 100_000, False),
        ("9" * 5000, False),
        ('{"total": 1e999}', False),
        ('{"total": -1e999}', False),
    ],
)
def test_answers_conform_or_not(tmp_path: Path, answer: str, valid: bool) -> None:
    assert schema_of(tmp_path, INVOICE).valid(answer) is valid


def test_dialect_is_the_schema_s_own(tmp_path: Path) -> None:
    """In draft 4 `exclusiveMinimum` is a flag of `minimum`; in 2020-12 it is a number."""
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 3, "exclusiveMinimum": True}
    assert [schema_of(tmp_path, old).valid(answer) for answer in ("3", "4")] == [False, True]
    with pytest.raises(ConfigError, match="is not a JSON schema: True is not of type 'number'"):
        schema_of(tmp_path, {key: value for key, value in old.items() if key != "$schema"})


@pytest.mark.parametrize(
    ("content", "clause"),
    [
        ("{", "is not JSON: "),
        ("[1]", "holds list, and a schema is an object"),
        ({"type": "objekt"}, "is not a JSON schema: 'objekt' is not valid"),
        ({"properties": {"a": {"pattern": "("}}}, "is not a JSON schema: '(' is not a 'regex' at $.properties.a.pattern"),
        ({"$schema": "https://example.com/mine"}, "names an unknown dialect, $schema='https://example.com/mine'"),
        ({"$schema": 3}, "names an unknown dialect, $schema='3'"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}}, "refers to '#/$defs/a', which is not in it"),
        ({"items": {"$ref": "https://example.com/a.json"}}, "refers to 'https://example.com/a.json', which is not in it"),
        ({"$ref": "#"}, "refers to itself without end"),
    ],
)
def test_wrong_schema_is_refused(tmp_path: Path, content: Any, clause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        schema_of(tmp_path, content)
    assert caught.value.message.startswith(f"eval.json_schema: {tmp_path}/schema.json ")
    assert clause in caught.value.message
    assert caught.value.hint


def test_file_that_is_not_there_is_refused_and_none_is_no_schema(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"eval.json_schema: '.*nowhere.json' does not exist"):
        read_schema(str(tmp_path / "nowhere.json"))
    assert read_schema("") is None


def test_schema_of_other_rows_is_refused(tmp_path: Path) -> None:
    schema = schema_of(tmp_path, INVOICE)
    chats = [Example("rec_1", (), None, "yes"), Example("rec_2", (), None, '{"total": 1}')]
    refuse_unfit(schema, chats)
    with pytest.raises(ConfigError, match="fits none of the 1 reference answers"):
        refuse_unfit(schema, chats[:1])
    with pytest.raises(ConfigError, match="no held-out row is a chat that ends in a text"):
        refuse_unfit(schema, [])
    refuse_unfit(None, [])


def test_share_is_of_chats_that_end_in_a_text(tmp_path: Path) -> None:
    chat = {"record": "rec_1", "reference": "x", "logprob": -1.0, "num_tokens": 1}
    items = [chat | {"prediction": '{"total": 1}'}, chat | {"prediction": "{}"}, {"record": "rec_2", "left_out": "why"}]
    items += [chat | {"kind": "call", "prediction": "", "calls": [], "called": []}]
    judged = list(with_validity(iter(items), schema_of(tmp_path, INVOICE)))
    assert [item.get("valid_schema") for item in judged] == [True, False, None, None]
    kept = [item for item in judged if "left_out" not in item]
    assert statistics(kept, ())["valid_schema"].value == 0.5
    assert intervals(kept, ())["valid_schema"] == wilson(1, 2)
    assert list(with_validity(iter(items), None)) == items
