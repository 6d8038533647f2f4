"""Schemas made at random, the same in each run: what a model may write under one conforms to it, or a keyword is named."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from forge_ray.errors import RequestError
from forge_ray.inference.engine import GenerationRequest
from forge_ray.inference.grammar import Grammars, Matcher

pytestmark = pytest.mark.unit

END = 2
COMPILE_S = 2.0
MOST_TOKENS = 400
NAMES = ("a", "ab", "abc", "größe", "名前", "🙂", 'q"\\\n', "", " ", "a/b", "m~n", "$ref", "x y")
VALUES: tuple[Any, ...] = (None, True, False, 0, -7, 2.5, "", "a", "ab", "ü\n", [], [1, None], {}, {"a": [{}]})
PATTERNS = ("^[a-c]{1,4}$", "^(x|yz)+$", "[0-9]{2}", "^é?$")
REFUSED: dict[str, Any] = {
    "not": {"type": "string"},
    "uniqueItems": True,
    "propertyNames": {"maxLength": 3},
    "if": {"type": "string"},
    "contains": {"type": "integer"},
    "dependentRequired": {"a": ["ab"]},
}
Make = Callable[["Maker", int], dict[str, Any]]


class Maker:
    """Makes schemas; `targets`: what references may point to."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.targets = ["#"]

    def whole(self) -> dict[str, Any]:
        chance = self.random
        names = chance.sample(("Node", "größe", "a/b"), chance.randint(0, 2))
        self.targets += [f"#/$defs/{name.replace('/', '~1')}" for name in names]
        root = self.object(3)
        properties = [name for name in root["properties"] if name and not set(name) & set('~%"\\\n')]
        self.targets += [f"#/properties/{name.replace('/', '~1')}" for name in properties]
        definitions = {name: self.schema(1) for name in names}
        if properties and chance.random() < 0.5:  # a reference that asks for nothing it could not end
            root["properties"]["back"] = {"anyOf": [{"$ref": chance.choice(self.targets)}, {"type": "null"}]}
        if chance.random() < 0.15:
            keyword = chance.choice(sorted(REFUSED))
            root["properties"]["odd"] = {keyword: REFUSED[keyword]}
        return root | ({"$defs": definitions} if definitions else {})

    def schema(self, depth: int) -> dict[str, Any]:
        leaves: list[Make] = [Maker.scalar, Maker.text, Maker.number, Maker.constant, Maker.choice]
        nested: list[Make] = [Maker.object, Maker.array, Maker.either, Maker.optional_reference]
        return self.random.choice(leaves + nested if depth > 0 else leaves)(self, depth - 1)

    def scalar(self, depth: int) -> dict[str, Any]:
        kinds = ["boolean", "null", "integer", "string", "number"]
        return {"type": self.random.choice([*kinds, ["string", "null"], ["integer", "boolean", "null"]])}

    def text(self, depth: int) -> dict[str, Any]:
        low = self.random.randint(0, 3)
        bounds = {"minLength": low, "maxLength": low + self.random.randint(0, 5)}
        return {"type": "string"} | self.random.choice(
            [bounds, {"pattern": self.random.choice(PATTERNS)}, {"format": "date"}]
        )

    def number(self, depth: int) -> dict[str, Any]:
        low = self.random.randint(-50, 50)
        bound = self.random.choice(["minimum", "exclusiveMinimum"])
        return {"type": self.random.choice(["integer", "number"]), bound: low, "maximum": low + self.random.randint(1, 99)}

    def constant(self, depth: int) -> dict[str, Any]:
        return {"const": self.random.choice(VALUES)}

    def choice(self, depth: int) -> dict[str, Any]:
        return {"enum": self.random.sample(VALUES, self.random.randint(1, 6)), "description": "One of these."}

    def object(self, depth: int) -> dict[str, Any]:
        names = self.random.sample(NAMES, self.random.randint(0, 5))
        closed: Any = self.random.choice([False, False, True, {"type": "integer"}])
        return {
            "type": "object",
            "properties": {name: self.schema(depth) for name in names},
            "required": [name for name in names if self.random.random() < 0.6],
            "additionalProperties": closed,
        }

    def array(self, depth: int) -> dict[str, Any]:
        low = self.random.randint(0, 2)
        bounds = {"minItems": low, "maxItems": low + self.random.randint(0, 3)}
        return {"type": "array", "items": self.schema(depth)} | self.random.choice([bounds, {}])

    def either(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth) for _ in range(self.random.randint(1, 3))]}

    def optional_reference(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [{"type": "null"}, {"$ref": self.random.choice(self.targets)}]}


def keywords_of(schema: Any) -> Iterator[str]:
    for key, item in schema.items() if isinstance(schema, dict) else ():
        yield key
        yield from keywords_of(item)
    for item in schema if isinstance(schema, list) else ():
        yield from keywords_of(item)


def compiled(grammars: Grammars, schema: dict[str, Any]) -> Matcher | None:
    """A matcher, in time; None where a keyword of the schema is named."""
    started = time.process_time()
    try:
        matcher = grammars.matcher(json.dumps(schema, ensure_ascii=False), (END,))
        matcher.allowed()
    except RequestError as error:
        if not any(keyword in error.message for keyword in keywords_of(schema) if len(keyword) > 1):
            pytest.fail(f"{error.message} names no keyword of {schema}")
        return None
    finally:
        assert time.process_time() - started < COMPILE_S, schema
    return matcher


def walked(matcher: Matcher, tokenizer: Tokenizer, seed: int) -> str | None:
    """What a model without a preference writes: any token that may come, after a while one that closes something. None if
    it did not end."""
    generator = np.random.default_rng(seed)
    closing = np.array(
        [any(mark in (tokenizer.id_to_token(i) or "") for mark in '"}]') for i in range(tokenizer.get_vocab_size())]
    )
    written: list[int] = []
    while len(written) < MOST_TOKENS:
        allowed = matcher.allowed().numpy()
        assert allowed.any(), tokenizer.decode(written)
        if allowed[END] and generator.random() < 0.7:
            return str(tokenizer.decode(written, skip_special_tokens=False))
        allowed[END] = allowed[END] and allowed.sum() == 1
        preferred = allowed & closing if len(written) > 40 and (allowed & closing).any() else allowed
        written.append(int(generator.choice(np.flatnonzero(preferred))))
        if written[-1] == END:
            return str(tokenizer.decode(written[:-1], skip_special_tokens=False))
        matcher.accept(written[-1])
    return None


@pytest.mark.parametrize("num_schemas", [60, pytest.param(2000, marks=pytest.mark.large)])
def test_what_may_be_written_conforms(grammars: Grammars, tokenizer: Tokenizer, num_schemas: int) -> None:
    ended = refused = endless = 0
    for seed in range(num_schemas):
        schema = Maker(seed).whole()
        matcher = compiled(grammars, schema)
        if matcher is None:
            refused += 1
            continue
        text = walked(matcher, tokenizer, seed)
        if text is not None:
            ended += 1
            value = json.loads(text)
            try:
                jsonschema.validate(value, schema, jsonschema.Draft202012Validator)
            except RecursionError:  # of a reference to itself without a step into the value, which the validator follows
                endless += 1
    assert endless <= num_schemas / 100
    assert refused < num_schemas / 3
    assert ended > (num_schemas - refused) * 0.8


@pytest.mark.large
def test_what_the_tiny_model_writes_conforms(tiny_model_dir: Path, grammars: Grammars, tokenizer: Tokenizer) -> None:
    from http_server import ENGINE

    from forge_ray.config.base import parse
    from forge_ray.config.release import EngineConfig
    from forge_ray.inference.choose import open_engine

    schemas = [schema for seed in range(100) if compiled(grammars, schema := Maker(seed).whole()) is not None]
    engine = open_engine(tiny_model_dir, None, parse(EngineConfig, ENGINE), use_gpu=False)
    try:
        prompt = tuple(tokenizer.encode("Which colour?", add_special_tokens=False).ids)
        requests = [
            GenerationRequest(
                prompt_ids=prompt,
                max_new_tokens=200,
                seed=seed,
                stop_token_ids=(END,),
                json_schema=json.dumps(schema, ensure_ascii=False),
            )
            for seed, schema in enumerate(schemas)
        ]
        answers = engine.generate(requests)
    finally:
        engine.close()
    whole = [(answer, schema) for answer, schema in zip(answers, schemas, strict=True) if answer.finish_reason == "stop"]
    assert len(whole) > len(schemas) / 4
    for answer, schema in whole:
        ids = [token for token in answer.token_ids if token != END]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
