"""An engine that says what a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from forge_ray.data.tokens.chat import ChatTokenizer
from forge_ray.errors import EngineError
from forge_ray.inference.engine import EngineHealth, Generation, GenerationRequest, Score, Token
from forge_ray.serve.loaded import Loaded

Script = Callable[[GenerationRequest], Sequence[int | Token | float | Exception]]


class Scripted:
    """Plays `script(request)`: ids and tokens are said, a number is a pause in seconds, an exception is raised."""

    max_request_tokens = 4096

    def __init__(self, script: Script) -> None:
        self.script = script
        self.lacks: dict[str, str] = {}
        self.requests: list[GenerationRequest] = []
        self.open = 0
        self.cancelled = 0

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Token]:
        self.requests.append(request)
        self.open += 1
        ended = False
        try:
            num_tokens = 0
            for item in self.script(request):
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, float):
                    await asyncio.sleep(item)
                    continue
                if num_tokens == request.max_new_tokens:
                    break
                num_tokens += 1
                yield item if isinstance(item, Token) else Token(item)
            ended = True
            yield Token(None, "length" if num_tokens == request.max_new_tokens else "stop")
        finally:
            self.open -= 1
            self.cancelled += not ended

    def embed(self, inputs: Sequence[Sequence[int]], adapter: str = "") -> list[list[float]]:
        return [[float(len(ids)), 0.5, -0.25] for ids in inputs]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        raise EngineError("not in a test", hint="stream")

    def score(self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        raise EngineError("not in a test", hint="stream")

    def load_adapter(self, name: str, folder: Path) -> None: ...

    def unload_adapter(self, name: str) -> None: ...

    def health(self) -> EngineHealth:
        return EngineHealth(True, "idle", self.open, 0)

    def close(self) -> None: ...


def saying(tokenizer: ChatTokenizer, text: str) -> Script:
    """Always this text, one token per piece that the tokenizer makes of it."""
    ids = ids_of(tokenizer, text)
    return lambda request: ids


def ids_of(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """The text's ids, special tokens by their names."""
    import re

    from forge_ray.serve.tools import MARK

    ids: list[int] = []
    for part in re.split(f"({MARK.pattern})", text):
        marker_id = tokenizer.marker_id(part) if MARK.fullmatch(part) else None
        ids += [marker_id] if marker_id is not None else tokenizer.piece_ids(part) if part else []
    return ids


def loaded(tokenizer: ChatTokenizer, engine: Any, version: str = "mv_0", adapter: str = "") -> Loaded:
    return Loaded(version, "sha256:" + version.encode().hex().ljust(64, "0"), engine, adapter, tokenizer, (2,))
