"""The `eval.metrics` list: functions of a user's own that score answers, and which names they may give to their scores."""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config, SettingError

NAME = r"[a-z0-9_]+"
# of the project's own scores, costs and audits; `count` is what slices call their number of rows
BUILT_IN = frozenset(
    {"exact_match", "loss", "perplexity", "label_likelihood", "macro_f1", "text_loss", "text_perplexity", "bits_per_byte"}
    | {"json_valid", "json_match", "valid_schema", "field_precision", "field_recall", "field_f1"}
    | {"pair_accuracy", "pair_margin", "reward_margin", "kl", "average_precision", "ece", "ece_uncalibrated", "temperature"}
    | {"calls_match", "calls_match_any_order", "call_names_match", "needless_calls", "contamination"}
    | {"size_bytes", "latency_ms_per_token", "count"}
)
RESERVED = ("safety_", "leak_", "exposure_", "extraction_", "general_")  # beginnings of names of the project's own


def name_problem(name: str) -> str:
    """Why a score cannot have this name, as a clause; "" where it can."""
    if not re.fullmatch(NAME, name):
        return f"{name[:64]!r} does not match {NAME}"
    if name in BUILT_IN:
        return f"{name} is a metric that every evaluation may have"
    if beginning := next((text for text in RESERVED if name.startswith(text)), ""):
        return f"{name} begins with {beginning}, as metrics of every evaluation do"
    return ""


class OwnMetric(Config):
    """A function of your own, called with each evaluated chat and its answer; see docs/design/gates.md. Its text alone,
    `file.py:function`, is short for `{function: file.py:function}`."""

    function: str = Field(
        description="File and function, `path/to/file.py:function`: (row, answer) → scores by name; the file stands alone"
    )
    lower_is_better: tuple[str, ...] = Field(
        (), description="Names of its scores of which lower values are better; of all others higher ones are"
    )
    seconds_per_row: float = Field(10, gt=0, description="Processor seconds that one call may take; more end the evaluation")
    memory_gb: float = Field(2, gt=0, description="Memory in GB that the function may use, with the libraries it imports")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_file_and_function(self) -> Self:
        if not self.file.endswith(".py") or not self.name.isidentifier():
            raise SettingError(
                f"function={self.function!r} is not a Python file, a colon and the name of a function",
                "for example metrics/tone.py:tone",
            )
        if "://" in self.file:
            raise SettingError(
                f"function={self.function!r} is a URI, and code is taken from files alone", "copy the file here"
            )
        for name in self.lower_is_better:
            if problem := name_problem(name):
                raise SettingError(f"lower_is_better: {problem}", "name scores that the function returns")
        return self

    @property
    def file(self) -> str:
        return self.function.rpartition(":")[0]

    @property
    def name(self) -> str:
        return self.function.rpartition(":")[2]
