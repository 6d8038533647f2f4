"""Validation of a call's arguments against the function's schema (pure).

Schema and answer are both untrusted, so the work is bounded: no reference is fetched, no regular expression is run
(`pattern` is ignored, `patternProperties` refused), and a schema that expands exponentially runs out of steps.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
from referencing import Registry
from referencing.exceptions import Unresolvable

from forge_ray.serve.openai import ApiError
from forge_ray.serve.tool_fields import Function

MAX_STEPS = 20_000  # keywords that are evaluated for one call; some 50 ms
MAX_SCHEMA_CHARS = 1 << 16

Keyword = Callable[..., Iterator[Any] | None]


class _TooManySteps(Exception):
    pass


def check_strict(function: Function) -> None:
    """`ApiError` 400 if the schema of a strict function is invalid or not supported here."""
    text = json.dumps(function.schema_)
    if len(text) > MAX_SCHEMA_CHARS:
        raise _refusal(function, f"its schema has {len(text)} characters; {MAX_SCHEMA_CHARS} are allowed with strict")
    if '"patternProperties"' in text:
        raise _refusal(function, "patternProperties are not supported with strict; leave out one of the two")
    try:
        jsonschema.Draft202012Validator.check_schema(function.schema_)
    except jsonschema.SchemaError as error:
        raise _refusal(function, f"not a JSON schema: {error.message[:200]}") from None


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Whether `value` conforms to `schema`, ignoring patterns; False too if that takes more than `MAX_STEPS`."""
    steps = itertools.count()

    def bounded(keyword: Keyword) -> Keyword:
        def evaluate(*arguments: Any) -> Iterator[Any]:
            if next(steps) >= MAX_STEPS:
                raise _TooManySteps
            yield from keyword(*arguments) or ()

        return evaluate

    keywords = jsonschema.Draft202012Validator.VALIDATORS
    counted = {name: bounded(keyword) for name, keyword in keywords.items() if name != "pattern"}
    validator = jsonschema.validators.create(jsonschema.Draft202012Validator.META_SCHEMA, counted)
    try:
        return bool(validator(schema, registry=Registry()).is_valid(value))
    except (_TooManySteps, RecursionError, Unresolvable, ArithmeticError):
        return False


def _refusal(function: Function, rule: str) -> ApiError:
    return ApiError(400, f"tools: {function.name}: {rule}", param="tools")
