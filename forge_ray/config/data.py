"""The `data:` section: where the rows are and how they become packed sequences."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config, SettingError
from forge_ray.config.curate import Rule

Format = Literal["auto", "jsonl", "json", "parquet", "csv", "arrow", "text", "html", "pdf", "docx"]
Shape = Literal[
    "auto",
    "chat",
    "text",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "classification",
    "preference",
    "openai_preference",
    "feedback",
]


class Mapping(Config):
    """For rows of no known shape: which column plays which part. Dots lead into objects: `customer.question`."""

    system: str = Field("", description="column of the system prompt")
    prompt: str = Field("", description="column of the user's turn")
    answer: str = Field("", description="column of the assistant's turn")
    text: str = Field("", description="column of a plain text")
    messages: str = Field("", description="column of a list of messages")
    chosen: str = Field("", description="column of the preferred answer")
    rejected: str = Field("", description="column of the other answer")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        pair = bool(self.chosen) and bool(self.rejected)
        if sum([bool(self.prompt and self.answer), bool(self.text), bool(self.messages), pair]) != 1:
            raise SettingError(
                "mapping needs `prompt` with `answer`, or `text`, or `messages`, or `chosen` with `rejected`: one of them",
                "for example mapping: {prompt: question, answer: reply}",
            )
        return self


class Source(Config):
    path: str = Field(description="file, folder of a saved HF dataset, or glob; relative to here, or a URI for pyarrow.fs")
    name: str = Field("", description="what its rows are counted under; empty: the path")
    format: Format = Field("auto", description="`auto` goes by the file's ending")
    shape: Shape = Field("auto", description="`auto` goes by the columns of each row")
    mapping: Mapping | None = Field(None, description="columns of rows of no known shape")
    epochs: float = Field(1.0, gt=0, le=100, description="times that its training records are used; a fraction takes a part")
    weight: float | None = Field(None, gt=0, description="share of training tokens, against the other sources' weights")
    checksums: str = Field("", description="file in sha256sum's format that lists each file; any difference is an error")
    licence: str = Field("", description="licence tag of all its rows, where no column says it")


class Splits(Config):
    """Shares of the records held out. A record's split is a function of its content, so it never moves."""

    validation: float = Field(0.05, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> Self:
        if self.validation + self.test >= 1:
            raise SettingError(
                f"splits.validation={self.validation} + splits.test={self.test} leave nothing to train on",
                "keep their sum below 1",
            )
        return self


class Subject(Config):
    """Lets a person's rows be found later without storing who they are: an HMAC of one column is kept beside the record."""

    field: str = Field(min_length=1, description="column that names the person; dots lead into objects")
    key_file: str = Field("", description="file with the HMAC key; empty: keys/subject.key of the store, made when absent")


class DataConfig(Config):
    sources: tuple[Source, ...] = Field(min_length=1)
    curate: tuple[Rule, ...] = Field((), description="rules that drop or change records, applied in this order")
    sequence_length: int = Field(512, ge=8, description="tokens per packed row")
    splits: Splits = Splits()
    shuffle_seed: int = Field(0, ge=0, description="orders the records before packing")
    overlong: Literal["reject", "truncate"] = Field(
        "reject", description="chat rows longer than `sequence_length`; plain text is always split, never cut"
    )
    subject: Subject | None = None
    block_rows: int = Field(64, ge=1, description="packed rows per block: the unit that is read and shuffled")
    max_line_bytes: int = Field(16 << 20, ge=1024, description="longer lines are quarantined unread")
    max_invalid_fraction: float = Field(0.01, ge=0, le=1, description="above this share of bad rows the stage fails")

    @model_validator(mode="after")
    def _weights_on_all_or_none(self) -> Self:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and (not all(weighted) or any(source.epochs != 1.0 for source in self.sources)):
            raise SettingError(
                "sources: a mixture has a weight on every source, or epochs, not both",
                "give each source a `weight`, or leave all out",
            )
        return self
