"""A model version that is ready to answer."""

from __future__ import annotations

from dataclasses import dataclass

from forge_ray.data.tokens.chat import ChatTokenizer
from forge_ray.inference.class_engine import ClassEngine
from forge_ray.inference.engine import Engine
from forge_ray.records import hex_of
from forge_ray.serve.calibration import ClassHead


@dataclass(frozen=True)
class Loaded:
    """One model version that is ready to answer. `adapter`: its name in `engine`; "" if it is the engine's own weights.
    `head`: of a classifier, which has an engine of its own kind; None of a model that generates text."""

    version: str
    digest: str
    engine: Engine | ClassEngine
    adapter: str
    tokenizer: ChatTokenizer
    stop_token_ids: tuple[int, ...]
    head: ClassHead | None = None

    @property
    def fingerprint(self) -> str:
        return "fp_" + hex_of(self.digest)[:16]

    @property
    def generator(self) -> Engine:
        """The engine of a model that generates text; the endpoints refuse a classifier before they ask for it."""
        if isinstance(self.engine, ClassEngine):
            raise TypeError(f"{self.version} is a classifier")
        return self.engine

    @property
    def classifier(self) -> tuple[ClassEngine, ClassHead]:
        """The engine and the head of a classifier; its endpoints refuse other models before they ask for it."""
        if not isinstance(self.engine, ClassEngine) or self.head is None:
            raise TypeError(f"{self.version} is no classifier")
        return self.engine, self.head
