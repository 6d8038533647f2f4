"""The `train.scaling` section."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from forge_ray.config.base import Config, SettingError


class Workers(Config):
    """Elastic: as many workers as the cluster has resources for, within these bounds."""

    min: int = Field(ge=1, description="Minimum workers")
    max: int = Field(ge=1, description="Maximum workers")
    resize_every_s: float = Field(60.0, gt=0, description="Seconds between checks for resources for more workers")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise SettingError(f"min={self.min} exceeds max={self.max}", "swap them")
        return self


class Scaling(Config):
    """How many workers, and the resources of each. Changes speed, never the order of samples."""

    num_workers: int | Workers = Field(1, description="Number of workers; 0: this process, without Ray; {min, max}: elastic")
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores per worker")
    gpus_per_worker: float = Field(0, ge=0, le=1, description="GPUs per worker: 0 to train on CPUs, 1 to train on GPUs")
    max_failures: int = Field(2, ge=-1, description="Maximum restarts in a row without a new checkpoint; -1: no limit")

    @field_validator("num_workers", mode="before")
    @classmethod
    def _a_number(cls, value: Any) -> Any:
        if isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise SettingError(f"num_workers={value} is not a number of workers", "use 0 or more, or {min, max}")
        return value

    @property
    def max_workers(self) -> int:
        return self.num_workers.max if isinstance(self.num_workers, Workers) else self.num_workers
