"""The `data:` section: where the rows are and how they become packed sequences."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config


class Source(Config):
    path: str = Field(description="file or glob; relative to the current folder, or a URI that pyarrow.fs knows")
    format: Literal["auto", "jsonl", "parquet"] = Field("auto", description="`auto` goes by the file's ending")


class Splits(Config):
    """Shares of the records held out. A record's split is a function of its content, so it never moves."""

    validation: float = Field(0.05, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"splits.validation={self.validation} + splits.test={self.test} leave nothing to train on"
                " hint: keep their sum below 1"
            )
        return self


class DataConfig(Config):
    sources: tuple[Source, ...] = Field(min_length=1)
    sequence_length: int = Field(512, ge=8, description="tokens per packed row")
    splits: Splits = Splits()
    shuffle_seed: int = Field(0, ge=0, description="orders the records before packing")
    overlong: Literal["reject", "truncate"] = Field(
        "reject", description="chat rows longer than `sequence_length`; plain text is always split, never cut"
    )
    block_rows: int = Field(64, ge=1, description="packed rows per block: the unit that is read and shuffled")
    max_invalid_fraction: float = Field(0.01, ge=0, le=1, description="above this share of bad rows the stage fails")
