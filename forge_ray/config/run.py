"""The run file: one YAML that says the whole path from rows to endpoint."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config
from forge_ray.config.data import DataConfig
from forge_ray.config.release import NAME, DeployConfig, EvalConfig, ReleaseConfig
from forge_ray.config.train import TrainConfig


class RunConfig(Config):
    name: str = Field(pattern=NAME)
    base_model: str = Field(description="alias or model version, or a folder or GGUF file to import first")
    licence: str = Field("", description="licence of a base model imported from a path (SPDX identifier)")
    data: DataConfig
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    release: ReleaseConfig
    deploy: DeployConfig | None = None

    @model_validator(mode="after")
    def _rows_can_be_shared(self) -> Self:
        length, size = self.data.sequence_length, self.train.sequence_parallel
        if length % size:
            raise ValueError(
                f"train.sequence_parallel={size} does not divide data.sequence_length={length}"
                f" hint: use data.sequence_length={-(-length // size) * size}, or another number of workers to a row"
            )
        return self
