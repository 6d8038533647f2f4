"""The `train.guards` section."""

from __future__ import annotations

from pydantic import Field

from forge_ray.config.base import Config


class Spike(Config):
    """A spike is a loss above mean + sigma * deviation of the `window` steps before, and `rise` nats above that mean, for
    `patience` steps in a row. The run resumes from the checkpoint before the spike and skips the spike's steps (PaLM,
    arXiv:2204.02311, section 5.1)."""

    sigma: float = Field(
        6.0, gt=0, description="Standard deviations above the mean of the recent losses that count as a rise"
    )
    rise: float = Field(0.5, gt=0, description="Minimum rise above that mean, in nats per token")
    window: int = Field(50, ge=8, description="Number of recent losses, one a step, in the mean and the deviation")
    patience: int = Field(3, ge=1, description="Steps in a row above these bounds before the run goes back")


class Guards(Config):
    """When a run recovers automatically, and when it stops. Each intervention is an incident in the run's record."""

    spike: Spike | None = Field(Spike(), description="Go back to a checkpoint when the loss rises and stays high; null: off")
    max_skipped: float = Field(
        0.01, ge=0, le=1, description="Maximum share of steps or rows left out before the run stops; 3 are always allowed"
    )
    hang_factor: float = Field(
        3.0, ge=1, description="A step is hung after this many times the median step, plus `hang_slack_s`"
    )
    hang_slack_s: float = Field(10.0, gt=0, description="Seconds added to the time after which a step is hung")
    first_step_s: float = Field(
        1800.0, gt=0, description="Seconds after which a step or save is hung while its median is unknown, as at the start"
    )
    slow_rank: float = Field(1.5, gt=1, description="Report a worker that takes this many times the median of all workers")
    refuse_impossible: bool = Field(
        True, description="Refuse to start what the plan predicts will not fit; false (`--force`): start anyway"
    )
