"""A model version that is ready to answer."""

from __future__ import annotations

from dataclasses import dataclass

from forge_ray.data.tokens.chat import ChatTokenizer
from forge_ray.inference.engine import Engine
from forge_ray.records import hex_of


@dataclass(frozen=True)
class Loaded:
    """One model version that is ready to answer. `adapter`: its name in `engine`; "" if it is the engine's own weights."""

    version: str
    digest: str
    engine: Engine
    adapter: str
    tokenizer: ChatTokenizer
    stop_token_ids: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        return "fp_" + hex_of(self.digest)[:16]
