"""Sections of `deploy:` about an endpoint as a whole: its replicas, and what it keeps of its answers."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config, SettingError


class Replicas(Config):
    """How many replicas run, by the tokens that wait and run in all of them."""

    min: int = Field(1, ge=0, description="Minimum replicas; 0: none while idle, and the first request waits for a start")
    max: int = Field(1, ge=1, description="Maximum replicas")
    target_tokens: int = Field(
        0,
        ge=0,
        description="Tokens (prompts and answers to come) that one replica should hold; 0: half of its key-value cache",
    )
    surge: bool = Field(
        True, description="In a rollout, start new replicas before old ones stop; needs resources for twice as many"
    )
    upscale_delay_s: float = Field(5, ge=0, description="Seconds of high load before replicas are added")
    downscale_delay_s: float = Field(300, ge=0, description="Seconds of low load before replicas are removed")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise SettingError(f"replicas.min={self.min} exceeds replicas.max={self.max}", "raise max or lower min")
        return self


class KeepAnswers(Config):
    """Whether the store keeps prompts and answers, for `forge feedback import`. They are in files for their owner alone."""

    days: int = Field(
        0, ge=0, le=3650, description="Days that chats and their answers are kept in the store; 0: nothing of them is kept"
    )
    max_mib: int = Field(
        1024, ge=1, description="Maximum MiB of kept answers in the store; beyond it the oldest are removed, and counted"
    )
