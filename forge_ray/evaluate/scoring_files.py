"""The files that `eval:` names and that decide scores: safety prompts, the user's own functions, a JSON schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from forge_ray.config.release import EvalConfig
from forge_ray.evaluate.answer_schema import KEPT_AS, AnswerSchema, read_schema
from forge_ray.evaluate.own import ScoringFunction, read_functions
from forge_ray.evaluate.safety import SafetyPrompt, read_prompts


@dataclass(frozen=True)
class ScoringFiles:
    """What was read of them."""

    prompts: tuple[SafetyPrompt, ...] = ()
    functions: tuple[ScoringFunction, ...] = ()
    schema: AnswerSchema | None = None

    @property
    def sources(self) -> dict[str, bytes]:
        """The bytes of functions and schema, by the names under which a report keeps them."""
        kept = {function.kept_as: function.source for function in self.functions}
        return kept | ({KEPT_AS: self.schema.source} if self.schema else {})


def files_of(config: EvalConfig) -> tuple[ScoringFiles, dict[str, Any]]:
    """The files, and the settings by which a report is known: digests of their bytes in place of their names."""
    prompts, digests = read_prompts(config.safety)
    functions, schema = read_functions(config.metrics), read_schema(config.json_schema)
    settings: dict[str, Any] = {"safety": digests} if digests else {}
    settings |= {"metrics": [function.settings for function in functions]} if functions else {}
    return ScoringFiles(prompts, functions, schema), settings | ({"json_schema": schema.sha256} if schema else {})
