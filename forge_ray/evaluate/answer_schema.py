"""Whether answers conform to the JSON schema of `eval.json_schema` (pure, but for reading the file).

`format` is an annotation, as JSON Schema 2020-12 has it by default, and is not checked. References lead into the schema
itself: none is fetched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.validators import validator_for
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from forge_ray.errors import ConfigError
from forge_ray.evaluate.examples import Example
from forge_ray.evaluate.named_files import read_named, sha256_of

DEFAULT = "https://json-schema.org/draft/2020-12/schema"
SETTING = "eval.json_schema"
KEPT_AS = "schema.json"  # in the report's folder


@dataclass(frozen=True)
class AnswerSchema:
    """A schema that was checked, and the bytes of its file."""

    path: str
    source: bytes

    @property
    def sha256(self) -> str:
        return sha256_of(self.source)

    def valid(self, answer: str) -> bool:
        """Whether the answer is one JSON value, and conforms."""
        try:
            value = json.loads(answer, parse_constant=_refuse_constant, parse_float=_finite)
            return bool(_validator(json.loads(self.source)).is_valid(value))
        except (ValueError, RecursionError, OverflowError):  # the last: a quotient that `multipleOf` asks for
            return False


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    """Raises `ValueError` of a number beyond the range of a float, 1e999: no rule of a schema is about infinity."""
    if math.isinf(value := float(digits)):
        raise ValueError(f"{digits[:40]} is beyond the range of numbers")
    return value


def _validator(schema: dict[str, Any]) -> Any:
    registry: Registry[Any] = Registry()
    return validator_for(schema, default=Draft202012Validator)(schema, registry=registry)


def read_schema(path: str) -> AnswerSchema | None:
    """None for an empty path; raises `NotFound` or `ConfigError` where the file holds no schema that can be used."""
    if not path:
        return None
    source = read_named(path, SETTING, "JSON")
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise _problem(path, f"is not JSON: {error}", "correct the file") from None
    if not isinstance(schema, dict):
        raise _problem(path, f"holds {type(schema).__name__}, and a schema is an object", '{"type": "object", …}')
    dialect = schema.get("$schema", DEFAULT)
    checker = validator_for({"$schema": dialect}, default=None) if isinstance(dialect, str) else None
    if checker is None:
        raise _problem(path, f"names an unknown dialect, $schema={str(dialect)[:200]!r}", f"leave it out, or give {DEFAULT}")
    try:
        checker.check_schema(schema)
        if unresolved := next(_unresolved(schema), ""):
            hint = "put what it refers to under $defs: nothing is fetched"
            raise _problem(path, f"refers to {unresolved!r}, which is not in it", hint)
        _validator(schema).is_valid({})  # a schema that refers to itself at once would never end
    except SchemaError as error:
        raise _problem(
            path, f"is not a JSON schema: {error.message[:200]} at {error.json_path}", "correct the file"
        ) from None
    except RecursionError:
        raise _problem(path, "refers to itself without end", "let a reference lead deeper into the answer") from None
    return AnswerSchema(path, source)


def _unresolved(schema: dict[str, Any]) -> Iterator[str]:
    """The references in a schema that lead nowhere in it."""
    root = Resource.from_contents(schema, default_specification=DRAFT202012)
    registry: Registry[Any] = Registry()
    waiting = [(root, registry.resolver_with_root(root))]
    while waiting:
        resource, resolver = waiting.pop()
        if isinstance(resource.contents, dict):
            for key in ("$ref", "$dynamicRef"):
                if isinstance(reference := resource.contents.get(key), str):
                    try:
                        resolver.lookup(reference)
                    except Unresolvable:
                        yield reference
        waiting += [(below, resolver.in_subresource(below)) for below in resource.subresources()]


def with_validity(items: Iterator[dict[str, Any]], schema: AnswerSchema | None) -> Iterator[dict[str, Any]]:
    """The items, with `valid_schema` for chats that end in a text."""
    for item in items:
        is_judged = schema and "left_out" not in item and "kind" not in item
        yield {**item, "valid_schema": schema.valid(item["prediction"])} if schema and is_judged else item


def refuse_unfit(schema: AnswerSchema | None, chats: Sequence[Example]) -> None:
    """`ConfigError` where no reference answer conforms: then the schema is of other rows."""
    texts = [chat.answer for chat in chats if not chat.calls]
    if schema and not texts:
        raise _problem(schema.path, "has no answers to judge: no held-out row is a chat that ends in a text", "leave it out")
    if schema and not any(schema.valid(text) for text in texts):
        hint = "correct the schema or the rows: `forge data show` prints some"
        raise _problem(schema.path, f"fits none of the {len(texts)} reference answers", hint)


def _problem(path: str, clause: str, hint: str) -> ConfigError:
    return ConfigError(f"{SETTING}: {path} {clause}", hint=hint)
