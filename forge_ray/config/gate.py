"""The `release.gate:` section: what a version must fulfil before its alias moves."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config, SettingError


class Threshold(Config):
    """Bounds of one metric, of which at least one is set."""

    min: float | None = Field(None, description="Lowest value that passes; null: no lower bound")
    max: float | None = Field(None, description="Highest value that passes; null: no upper bound")

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if self.min is None and self.max is None:
            raise SettingError("a threshold needs `min` or `max`", "for example {min: 0.5}")
        return self


CONFIDENCE = (
    "Judge the lower bound of the gain on the same rows at this confidence, such as 0.95, and not the measured gain, which"
    " may be chance; null: the measured one"
)


class BetterThan(Config):
    """Compares the version with another model on the same examples."""

    incumbent: str = Field(
        "base", description="Model to compare with: `base`, an alias or a model version; an alias that is not set yet passes"
    )
    metric: str = Field("exact_match", description="Metric to compare, such as exact_match, macro_f1 or loss")
    margin: float = Field(0.0, ge=0, description="Minimum improvement in the metric's own unit")
    confidence: float | None = Field(None, gt=0.5, lt=1, description=CONFIDENCE)


class NoWorseThan(Config):
    """Compares the version with another model on the same examples, as a whole or slice by slice."""

    incumbent: str = Field(
        "base", description="Model to compare with: `base`, an alias or a model version; an alias that is not set yet passes"
    )
    metric: str = Field("exact_match", description="Metric to compare, such as exact_match, macro_f1 or loss")
    slices: Literal["label", "source", "none"] = Field(
        "none", description="Compare each `label` or `source`, which eval.slices must list; `none`: all examples together"
    )
    tolerance: float = Field(0.0, ge=0, description="Maximum regression in the metric's own unit")
    min_examples: int = Field(1, ge=1, description="Slices with fewer examples are not compared")
    confidence: float | None = Field(None, gt=0.5, lt=1, description=CONFIDENCE)


class Budgets(Config):
    """Limits on the cost of answering."""

    size_bytes: int | None = Field(
        None,
        ge=1,
        description="Maximum bytes of the safetensors files that an engine loads, base and adapter; null: no limit",
    )
    latency_ms_per_token: float | None = Field(
        None,
        gt=0,
        description="Maximum median milliseconds per token of single requests to the evaluation engine; null: no limit",
    )


class LeakBounds(Config):
    """Bounds of the leak audit, which `eval.leak` switches on. `null`: no bound."""

    max_auc: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Maximum AUC of distinguishing training from held-out records by their loss; 0.5: they cannot be"
        " distinguished",
    )
    max_auc_gain: float | None = Field(None, ge=0, le=1, description="Maximum increase of that AUC over the base model's")
    max_exposure_mean: float | None = Field(
        None, ge=0, description="Maximum mean exposure, in bits, of canaries in the training rows; 1.44: not memorised"
    )
    max_exposure: float | None = Field(
        None, ge=0, description="Maximum exposure, in bits, of the worst canary, which is sometimes high by chance"
    )
    max_extraction_gain: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Maximum share of training answers reproduced word for word, minus that share of held-out answers",
    )


class Gate(Config):
    """What a version must fulfil to be released. One that fails is kept as rejected, with the reasons."""

    thresholds: dict[str, Threshold] = Field({}, description="Bounds by metric: of the scores, the costs or the leak audit")
    better_than: tuple[BetterThan, ...] = Field((), description="Models that the version must beat")
    no_worse_than: tuple[NoWorseThan, ...] = Field((), description="Models that the version must not regress against")
    budgets: Budgets = Budgets()
    leak: LeakBounds = LeakBounds()

    @property
    def comparisons(self) -> tuple[BetterThan | NoWorseThan, ...]:
        """The rules that compare with another model, in the order of the run file."""
        return (*self.better_than, *self.no_worse_than)
