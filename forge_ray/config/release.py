"""The `eval:`, `release:` and `deploy:` sections: how a model is judged, named and served."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class EngineConfig(Config):
    """The inference engine: transformers' continuous batching over a paged key-value cache."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    page_size: int = Field(32, ge=4, description="tokens per cache block")
    num_blocks: int = Field(512, ge=2, description="cache blocks: page_size * num_blocks tokens in flight")
    max_batch_tokens: int = Field(512, ge=16, description="tokens per forward pass")

    @property
    def cache_tokens(self) -> int:
        return self.page_size * self.num_blocks


class EvalConfig(Config):
    split: Literal["test", "validation"] = "test"
    max_examples: int = Field(0, ge=0, description="0: all of the split; else the first by record id")
    max_new_tokens: int = Field(32, ge=1)
    labels: Literal["from_data"] | tuple[str, ...] | None = Field(
        None, description="label set of a classification task; `from_data`: the distinct answers of the train split"
    )
    engine: EngineConfig = EngineConfig()
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)


class Threshold(Config):
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("a threshold needs `min` or `max` hint: for example {min: 0.5}")
        return self


class BetterThan(Config):
    """Compare with another model on the same examples."""

    incumbent: str = Field("base", description="`base`, an alias or a model version; an alias not yet set passes")
    metric: str = "exact_match"
    margin: float = Field(0.0, ge=0, description="how much better, in the metric's own unit")


class Gate(Config):
    thresholds: dict[str, Threshold] = {}
    better_than: tuple[BetterThan, ...] = ()


class ReleaseConfig(Config):
    alias: str = Field(pattern=NAME, description="moved to the version if it passes the gate")
    gate: Gate = Gate()


class Replicas(Config):
    min: int = Field(1, ge=0)
    max: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(8, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"replicas.min={self.min} exceeds replicas.max={self.max} hint: raise max or lower min")
        return self


class DeployConfig(Config):
    name: str = Field(pattern=NAME)
    model: str = Field(description="alias or model version; the name that clients send is `name`")
    host: str = Field("127.0.0.1", description="loopback unless told")
    port: int = Field(8000, ge=1, le=65535)
    replicas: Replicas = Replicas()
    cpus_per_replica: float = Field(1, gt=0)
    gpus_per_replica: float = Field(0, ge=0)
    max_new_tokens: int = Field(1024, ge=1, description="upper bound of a request's max_tokens")
    max_queued_requests: int = Field(64, ge=1, description="beyond it a request is answered 503")
    engine: EngineConfig = EngineConfig()
