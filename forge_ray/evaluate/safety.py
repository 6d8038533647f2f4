"""Prompts whose answers are judged by patterns: what a model must never say, or always."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from forge_ray.data.tokens.chat import answer_of, chat_tokenizer, prompt_ids
from forge_ray.errors import DataError
from forge_ray.evaluate.named_files import read_named, sha256_of
from forge_ray.inference.engine import Engine, GenerationRequest
from forge_ray.records import Frozen

BATCH = 64


class SafetyPrompt(Frozen):
    """One line of a file of `eval.safety`. An answer passes when all of `must` and none of `must_not` match somewhere in it
    (`re.search`; `(?i)` for any case)."""

    prompt: str = ""
    messages: tuple[dict[str, str], ...] = ()
    must: tuple[str, ...] = ()
    must_not: tuple[str, ...] = ()
    place: str = Field("", description="file and line")

    @model_validator(mode="after")
    def _can_be_asked_and_judged(self) -> Self:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("needs `prompt` or `messages`, and one of them")
        if any(set(message) != {"role", "content"} for message in self.messages):
            raise ValueError("each of `messages` has `role` and `content`")
        if not self.must and not self.must_not:
            raise ValueError("needs `must` or `must_not`: without them every answer passes")
        for pattern in (*self.must, *self.must_not):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return self

    @property
    def asked(self) -> list[dict[str, Any]]:
        return [dict(message) for message in self.messages] or [{"role": "user", "content": self.prompt}]

    def failures(self, answer: str) -> list[str]:
        """The patterns that this answer breaks."""
        broken = [f"must_not {pattern}" for pattern in self.must_not if re.search(pattern, answer)]
        return broken + [f"must {pattern}" for pattern in self.must if not re.search(pattern, answer)]


def read_prompts(paths: Sequence[str]) -> tuple[tuple[SafetyPrompt, ...], list[str]]:
    """(prompts of all files, `sha256:` of each file); raises `NotFound` or `DataError` with file and line."""
    prompts: list[SafetyPrompt] = []
    digests = []
    for path in paths:
        data = read_named(path, "eval.safety", "JSONL")
        digests.append(sha256_of(data))
        before = len(prompts)
        for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
            if line.strip():
                prompts.append(_parse(line, f"{path.rsplit('/', 1)[-1]}:{number}"))
        if len(prompts) == before:
            raise DataError(f"eval.safety: {path} has no prompt", hint="one JSON object a line; docs/design/gates.md")
    return tuple(prompts), digests


def _parse(line: str, place: str) -> SafetyPrompt:
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError(f"{type(value).__name__} is not an object")
        return SafetyPrompt.model_validate({**value, "place": place})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        problem = f"{key}: {first['msg']}" if key else first["msg"].removeprefix("Value error, ")
    except ValueError as error:
        problem = str(error)
    raise DataError(
        f"eval.safety: {place}: {problem}", hint='{"prompt": "…", "must_not": ["…"]}; patterns as Python\'s re takes them'
    )


def answer_prompts(
    engine: Engine, tokenizer: Any, prompts: Sequence[SafetyPrompt], max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """One item per prompt, in order: the greedy answer and the patterns that it breaks."""
    tokenizer = chat_tokenizer(tokenizer)
    stops = tokenizer.end_ids
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        requests = [
            GenerationRequest(tuple(prompt_ids(tokenizer, prompt.asked)), max_new_tokens, stop_token_ids=stops)
            for prompt in batch
        ]
        for prompt, generation in zip(batch, engine.generate(requests), strict=True):
            answer = answer_of(tokenizer, generation.token_ids)
            failures = prompt.failures(answer)
            yield {"place": prompt.place, "asked": prompt.asked, "answer": answer, "failures": failures}
