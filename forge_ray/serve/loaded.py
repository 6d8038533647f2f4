"""A model version that is ready to answer."""

from __future__ import annotations

from dataclasses import dataclass

from forge_ray.data.tokens.chat import ChatTokenizer
from forge_ray.inference.engine import Engine


@dataclass(frozen=True)
class Loaded:
    """One model version that is ready to answer. `adapter` is its name in `engine`, "" where it is that engine's weights."""

    version: str
    digest: str
    engine: Engine
    adapter: str
    tokenizer: ChatTokenizer
    stop_token_ids: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        return "fp_" + self.digest.removeprefix("sha256:")[:16]
