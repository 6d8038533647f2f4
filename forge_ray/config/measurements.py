"""What an evaluation measures besides the scores of the held-out rows, each where its section of `eval:` is set."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config, SettingError

GENERAL = "general_"  # begins the names of the scores of general rows


class Contamination(Config):
    """Compares runs of words in evaluated rows with those in training rows."""

    ngram: int = Field(
        13,
        ge=2,
        description="Consecutive words that an evaluated row must share with a training row to count as contaminated",
    )
    template_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Runs of words in more than this share of the evaluated rows (and in at least three) are the task's"
        " template and are not counted",
    )


def is_dataset_id(rows: str) -> bool:
    """Whether a setting that takes a file or a dataset version names the version: `ds_…`, and there is no such file."""
    return rows.startswith("ds_") and not Path(rows).exists()


class GeneralConfig(Config):
    """Rows of general ability on which the loss of the trained model and of its base are compared: what training made it
    forget."""

    rows: str = Field(
        min_length=1,
        description="`chats` or `texts`, short rows that forge_ray carries; a file of conversations or texts; or a dataset"
        " version (ds_…), whose test split is scored",
    )
    sha256: str = Field(
        "", pattern=r"^((sha256:)?[0-9a-f]{64})?$", description="SHA-256 that the file of rows must have; empty: any"
    )
    max_examples: int = Field(0, ge=0, description="Maximum rows of each kind, the first ones by record id; 0: all")

    @model_validator(mode="after")
    def _pins_a_file(self) -> Self:
        if self.sha256 and is_dataset_id(self.rows):
            raise SettingError(
                f"general.sha256 pins a file, and rows={self.rows} is a dataset version, whose id is a digest already",
                "remove sha256",
            )
        return self


class KlConfig(Config):
    """The KL divergence to the model that a run started from, at the tokens of held-out answers; see
    docs/guides/preferences.md."""

    max_examples: int = Field(64, ge=1, description="Maximum held-out answers, the first ones by record id")


class LeakConfig(Config):
    """Compares training records with held-out ones, and planted canaries with unplanted ones; see docs/design/gates.md."""

    max_records: int = Field(64, ge=2, description="Maximum training records, and as many held-out records, to compare")
    max_canaries: int = Field(
        16, ge=1, description="Maximum canaries in the training rows, and as many held-out ones, to compare"
    )
    candidates: int = Field(
        127, ge=1, description="Random codes that a canary's code is ranked among; 127 can show an exposure of up to 7 bits"
    )
    seed: int = Field(0, ge=0, description="Seed for drawing the records, the random codes and the bootstrap samples")
