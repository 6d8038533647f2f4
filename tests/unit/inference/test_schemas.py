"""JSON schemas as agents send them: compiled in time and kept in full, or refused by the name of the keyword."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from forge_ray.errors import RequestError
from forge_ray.inference.grammar import MAX_ITEMS, Grammars, Matcher

pytestmark = pytest.mark.unit

END = 2
COMPILE_S = 2.0


def closed(required: bool = True, **properties: Any) -> dict[str, Any]:
    more: dict[str, Any] = {"required": list(properties)} if required else {}
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


INTEGER, STRING = {"type": "integer"}, {"type": "string"}
LINK = closed(value=STRING, next={"anyOf": [{"$ref": "#/$defs/Link"}, {"type": "null"}]})
MANY = {f"property_{number}": STRING | {"description": "One of many."} for number in range(300)}
KINDS = [closed(kind={"const": f"kind_{number}"}, value=INTEGER) for number in range(300)]
ODD = {"größe": INTEGER, "名前": STRING, "🙂": {"type": "boolean"}, 'q"\\\n\t': {"type": "null"}, "": INTEGER, " ": STRING}

# name → schema, a value that conforms, one that does not
SCHEMAS: dict[str, tuple[Any, Any, Any]] = {
    "recursion to the root": (
        closed(False, value=INTEGER, children={"type": "array", "items": {"$ref": "#"}}),
        {"value": 1, "children": [{"value": 2, "children": [{"value": 3}]}]},
        {"value": 1, "children": [{"value": "2"}]},
    ),
    "recursion in definitions": (
        {"$defs": {"Link": LINK}, "$ref": "#/$defs/Link"},
        {"value": "a", "next": {"value": "b", "next": None}},
        {"value": "a", "next": {"value": "b"}},
    ),
    "references into properties": (
        closed(a=closed(x=INTEGER), b={"$ref": "#/properties/a"}, c={"$ref": "#/properties/a/properties/x"}),
        {"a": {"x": 1}, "b": {"x": 2}, "c": 3},
        {"a": {"x": 1}, "b": {"x": "2"}, "c": 3},
    ),
    "references to odd names": (
        closed(False, **{"größe": INTEGER, "a/b": STRING, "m~n": STRING}, r={"$ref": "#/properties/größe"})
        | {"required": ["r"]},
        {"r": 1},
        {"r": "x"},
    ),
    "names of many alphabets, and empty ones": (
        closed(**ODD),
        {"größe": 1, "名前": "é", "🙂": True, 'q"\\\n\t': None, "": 0, " ": ""},
        {"größe": 1, "名前": "é", "🙂": True, 'q"\\\n\t': None, "": 0},
    ),
    "anyOf with shared prefixes": (
        {
            "anyOf": [
                {"const": "red"},
                {"const": "redder"},
                closed(kind={"const": "a"}),
                closed(kind={"const": "ab"}, x=STRING),
            ]
        },
        {"kind": "ab", "x": "z"},
        {"kind": "a", "x": "z"},
    ),
    "const of every type": (
        closed(a={"const": {"b": [1, None, "é"]}}, c={"const": 2.5}, d={"const": None}, e={"const": ""}, f={"const": False}),
        {"a": {"b": [1, None, "é"]}, "c": 2.5, "d": None, "e": "", "f": False},
        {"a": {"b": [1, None, "e"]}, "c": 2.5, "d": None, "e": "", "f": False},
    ),
    "enum of mixed types": ({"enum": [1, "1", None, True, {"a": []}, 2.5, "", "ü"]}, {"a": []}, "2"),
    "a type that may be null": ({"type": ["string", "null"], "enum": ["a", None]}, None, "b"),
    "300 properties": (closed(**MANY), dict.fromkeys(MANY, ""), {"property_0": ""}),
    "300 optional properties": (closed(False, **MANY), {"property_0": "", "property_299": ""}, {"property_300": ""}),
    "300 kinds": ({"anyOf": KINDS}, {"kind": "kind_299", "value": 1}, {"kind": "kind_300", "value": 1}),
    "an enum of 2000": ({"enum": [f"value {n}" for n in range(2000)]}, "value 1999", "value 2000"),
    "bounds": (
        closed(n=INTEGER | {"minimum": 3, "maximum": 12}, s=STRING | {"minLength": 2, "maxLength": 4})
        | {"description": "x", "title": "y", "examples": [1], "default": {}},
        {"n": 12, "s": "abcd"},
        {"n": 13, "s": "abcd"},
    ),
    "a map": ({"type": "object", "additionalProperties": INTEGER}, {"x": 1}, {"x": "1"}),
    "allOf": (
        {"allOf": [closed(a=INTEGER) | {"additionalProperties": True}, {"properties": {"b": STRING}, "required": ["b"]}]},
        {"a": 1, "b": "x"},
        {"a": 1},
    ),
}


def may_write(matcher: Matcher, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the grammar lets a model write the text, and end there."""
    for token_id in tokenizer.encode(text, add_special_tokens=False).ids:
        if not bool(matcher.allowed()[token_id]):
            return False
        matcher.accept(token_id)
    return bool(matcher.allowed()[END])


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_compiled_in_time_and_kept(grammars: Grammars, tokenizer: Tokenizer, name: str) -> None:
    schema, good, bad = SCHEMAS[name]
    text = json.dumps(schema, ensure_ascii=False)
    started = time.process_time()
    matcher = grammars.matcher(text, (END,))
    matcher.allowed()
    assert time.process_time() - started < COMPILE_S
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(good)
    assert not validator.is_valid(bad)
    assert may_write(matcher, tokenizer, json.dumps(good, ensure_ascii=False))
    assert not may_write(grammars.matcher(text, (END,)), tokenizer, json.dumps(bad, ensure_ascii=False))


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": STRING}, "not"),
        ({"if": STRING, "then": {"minLength": 2}}, "if"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "array", "contains": INTEGER}, "contains"),
        ({"oneOf": [closed(False, a=STRING), closed(False, b=STRING)]}, "oneOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"type": "string", "format": "phone"}, "format"),
        ({"type": "array", "maxItems": 100_000}, "maxItems"),
        ({"type": "array", "maxItems": 100_000.0}, "maxItems"),
        ({"type": "array", "items": {"type": "array", "minItems": MAX_ITEMS}, "maxItems": 1}, "minItems"),
        ({"$ref": "#/$defs/none"}, "/$defs/none"),
        ({"$ref": "https://example.com/schema.json"}, "https://example.com/schema.json"),
    ],
)
def test_a_keyword_that_cannot_be_kept_is_named_in_time(grammars: Grammars, schema: Any, keyword: str) -> None:
    started = time.process_time()
    with pytest.raises(RequestError, match="json_schema") as caught:
        grammars.matcher(json.dumps(schema), (END,))
    assert keyword in caught.value.message
    assert time.process_time() - started < COMPILE_S


def test_a_schema_without_a_value_allows_no_token(grammars: Grammars) -> None:
    assert not bool(grammars.matcher('{"$ref": "#"}', (END,)).allowed().any())


def test_blanks_are_bounded(grammars: Grammars, tokenizer: Tokenizer) -> None:
    schema = json.dumps(closed(a=INTEGER, b={"type": "array"}))
    for num_blanks, may in ((0, True), (1, True), (32, True), (33, False), (500, False)):
        for blank in (" ", "\n", "\t"):
            gap = blank * num_blanks
            for text in (f'{{"a":{gap}1,"b":[]}}', f'{{"a":1,{gap}"b":[]}}', f'{{"a":1,"b":[1{gap},2]}}'):
                assert may_write(grammars.matcher(schema, (END,)), tokenizer, text) == may
    for text in ('{ "a":1,"b":[]}', '{"a":1,"b":[] }', '{"a":1,"b":[ 1]}', '\n{"a":1,"b":[]}', '{"a":1,"b":[]}\n'):
        assert not may_write(grammars.matcher(schema, (END,)), tokenizer, text)


def test_what_templates_write_may_be_written(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """As Python's and jinja's JSON is spaced, and as JavaScript's."""
    value = {"a": 1, "b": [1, {"c": "x, y: z"}]}
    schema = json.dumps(closed(a=INTEGER, b={"type": "array"}))
    for separators in ((", ", ": "), (",", ":")):
        text = json.dumps(value, separators=separators)
        assert may_write(grammars.matcher(schema, (END,)), tokenizer, text)
