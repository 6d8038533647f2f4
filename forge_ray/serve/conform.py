"""Do the arguments of a call conform to their schema? (pure)

Schema and answer both come from outside, so the work is bounded: no reference is fetched, no regular expression is run
(`pattern` is not looked at, `patternProperties` refused), and a schema that multiplies itself runs out of steps.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
from referencing import Registry
from referencing.exceptions import Unresolvable

from forge_ray.serve.fields import Function
from forge_ray.serve.openai import ApiError

MAX_STEPS = 20_000  # keywords that are looked at for one call; some 50 ms
MAX_SCHEMA_CHARS = 1 << 16

Keyword = Callable[..., Iterator[Any] | None]


class _TooMuch(Exception):
    pass


def check_strict(function: Function) -> None:
    """`ApiError` 400 where the schema of a strict function is none, or one that is not checked here."""
    text = json.dumps(function.schema_)
    if len(text) > MAX_SCHEMA_CHARS:
        raise _refusal(function, f"its schema has {len(text)} characters; {MAX_SCHEMA_CHARS} are allowed with strict")
    if '"patternProperties"' in text:
        raise _refusal(function, "patternProperties are not checked; leave them or strict out")
    try:
        jsonschema.Draft202012Validator.check_schema(function.schema_)
    except jsonschema.SchemaError as error:
        raise _refusal(function, f"not a JSON schema: {error.message[:200]}") from None


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Whether `value` is of `schema`, patterns apart; False too where that takes more than `MAX_STEPS`."""
    steps = itertools.count()

    def bounded(keyword: Keyword) -> Keyword:
        def looked_at(*arguments: Any) -> Iterator[Any]:
            if next(steps) >= MAX_STEPS:
                raise _TooMuch
            yield from keyword(*arguments) or ()

        return looked_at

    keywords = jsonschema.Draft202012Validator.VALIDATORS
    counted = {name: bounded(keyword) for name, keyword in keywords.items() if name != "pattern"}
    validator = jsonschema.validators.create(jsonschema.Draft202012Validator.META_SCHEMA, counted)
    try:
        return bool(validator(schema, registry=Registry()).is_valid(value))
    except (_TooMuch, RecursionError, Unresolvable, ArithmeticError):
        return False


def _refusal(function: Function, rule: str) -> ApiError:
    return ApiError(400, f"tools: {function.name}: {rule}", param="tools")
