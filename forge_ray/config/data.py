"""The `data:` section: the sources of rows, and how they become packed sequences."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from forge_ray.config.base import Config, SettingError, without_defaults
from forge_ray.config.curate import Rule
from forge_ray.config.encodings import UTF_8, encoding_named

Format = Literal["auto", "jsonl", "json", "parquet", "csv", "arrow", "text", "html", "pdf", "docx", "xlsx"]
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
    """Give `prompt` with `answer`, or `text`, or `messages`, or `chosen` with `rejected`. Dots lead into nested objects:
    `customer.question`."""

    system: str = Field("", description="Column of the system prompt")
    prompt: str = Field("", description="Column of the user's turn")
    answer: str = Field("", description="Column of the assistant's turn")
    text: str = Field("", description="Column of plain text")
    messages: str = Field("", description="Column of a list of chat messages")
    chosen: str = Field("", description="Column of the preferred answer")
    rejected: str = Field("", description="Column of the rejected answer")
    margin: str = Field("", description="Column of a number: by how much the preferred answer is better")

    @model_serializer(mode="wrap")
    def _serialised(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the newer settings where they are the default: the ids of dataset versions from before them stay."""
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name != "margin" or value}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        pair = bool(self.chosen) and bool(self.rejected)
        if sum([bool(self.prompt and self.answer), bool(self.text), bool(self.messages), pair]) != 1:
            raise SettingError(
                "mapping needs exactly one of: `prompt` with `answer`, `text`, `messages`, `chosen` with `rejected`",
                "for example mapping: {prompt: question, answer: reply}",
            )
        if self.margin and not pair:
            raise SettingError(
                f"mapping.margin={self.margin} without `chosen` and `rejected`: only pairs have one",
                "remove it, or name the columns of a pair",
            )
        return self


class Source(Config):
    """Files of one format, with rows of one shape."""

    path: str = Field(
        description="File, glob or folder of a saved Hugging Face dataset, relative to the working directory, or a URI"
        " for pyarrow.fs",
    )
    name: str = Field("", description="Name of the source in counts and cards; empty: its path")
    format: Format = Field("auto", description="File format; `auto` goes by the ending of the file's name")
    encoding: str = Field(
        UTF_8,
        description="Encoding of JSONL, JSON, CSV, text and HTML files that begin with no byte order mark, for example"
        " `windows-1252`, `utf-16-le` or `shift_jis`",
    )
    sheet: str = Field("", description="Sheet of a workbook with several; empty: the only visible one that holds rows")
    shape: Shape = Field("auto", description="Shape of the rows; `auto` goes by the columns of each row")
    mapping: Mapping | None = Field(None, description="Column names, for rows of no known shape; null: none")
    epochs: float = Field(
        1.0,
        gt=0,
        le=100,
        description="Times each training record of the source is used per epoch; a fraction uses that share of the records",
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="Share of the training tokens relative to the other sources' weights; set it on every source or on none",
    )
    checksums: str = Field(
        "", description="File in sha256sum's format that lists every file of the source; any difference is an error"
    )
    licence: str = Field("", description="Licence tag of the rows that have no `licence` column")
    split: str = Field(
        "",
        description="Split to read where the files are those of several, as in a saved DatasetDict or a folder of the hub:"
        " its name, or `all`; empty: such files are refused",
    )

    @model_serializer(mode="wrap")
    def _serialised(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the newer settings where they are the default: the ids of dataset versions from before them stay."""
        values: dict[str, Any] = handler(self)
        defaults = {"split": "", "encoding": UTF_8, "sheet": ""}
        return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, name: str) -> str:
        if own := encoding_named(name):
            return own
        raise SettingError(
            f"{name[:40]!r} is not an encoding of text that is read here",
            "write for example windows-1252, iso-8859-15, utf-16-le, shift_jis or gb18030, or convert the files to UTF-8",
        )


class Splits(Config):
    """Shares of the records held out from training. A record's content alone decides its split, so it never changes."""

    by: Literal["record", "conversation"] = Field(
        "record",
        description="What decides: the whole record; or how its conversation begins, up to the end of the first user turn,"
        " so that all turns of a conversation are in the same split",
    )
    validation: float = Field(0.05, ge=0, lt=1, description="Share of the records held out for validation during training")
    test: float = Field(0.1, ge=0, le=1, description="Share of the records held out for evaluation after training")

    @model_serializer(mode="wrap")
    def _serialised(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `by` where it is the default: the ids of dataset versions from before that setting stay."""
        return without_defaults(handler(self), {"by": "record"})

    @model_validator(mode="after")
    def _are_shares(self) -> Self:
        if self.validation + self.test > 1:
            raise SettingError(
                f"splits.validation={self.validation} + splits.test={self.test} are more than all records",
                "keep their sum below 1, or at 1 for a dataset that is only evaluated",
            )
        return self


class Subject(Config):
    """An HMAC of one column is stored with each record, so that a person's rows are found without storing who it is."""

    field: str = Field(min_length=1, description="Column that identifies the person; dots lead into nested objects")
    key_file: str = Field("", description="File with the HMAC key; empty: keys/subject.key of the store, created if absent")
    caseless: bool = Field(False, description="Whether upper and lower case are equal in this column, as in email addresses")

    @model_serializer(mode="wrap")
    def _serialised(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `caseless` where it is off: the ids of dataset versions from before that setting stay."""
        return without_defaults(handler(self), {"caseless": False})


class DataConfig(Config):
    """Where the rows are and how they become packed sequences."""

    sources: tuple[Source, ...] = Field(min_length=1, description="Sources of rows; several of them form a mixture")
    curate: tuple[Rule, ...] = Field((), description="Rules that drop, mark or change records, applied in this order")
    sequence_length: int = Field(
        512,
        ge=8,
        description="Tokens per packed row; raise it when too many chats are rejected as too long, at the cost of memory",
    )
    splits: Splits = Splits()
    shuffle_seed: int = Field(0, ge=0, description="Seed of the order of the records before packing")
    overlong: Literal["reject", "truncate"] = Field(
        "reject",
        description="Quarantine or cut a chat longer than `sequence_length`; plain text is always split into several rows"
        " instead",
    )
    reasoning: Literal["train", "keep", "drop"] = Field(
        "train",
        description="What is done with the reasoning of answers: trained; in the context and not trained; or removed",
    )
    form: Literal["answers", "labels"] = Field(
        "answers",
        description="What a chat's document is. `answers`: the conversation, of which the answers are trained; `labels`: the"
        " prompt of its last answer, which is kept as the label, for `train.method: {kind: classify}`",
    )
    tools: Literal["template", "text"] = Field(
        "template",
        description="How tools, tool calls and tool results are written: by the model's chat template; or as text, for"
        " models whose template has no place for them. The trained model is evaluated and served likewise",
    )
    date: str = Field(
        "",
        pattern=r"^(\d{4}-\d{2}-\d{2})?$",
        description="The date that a chat template prints, such as 2026-06-01; empty: that of the build, which the dataset's"
        " record holds, where the template prints one",
    )
    subject: Subject | None = Field(
        None, description="Make the rows of a person findable, for deletion on request; null: off"
    )
    block_rows: int = Field(64, ge=1, description="Packed rows per block, the unit that is read and shuffled")
    max_line_bytes: int = Field(
        16 << 20, ge=1024, description="Maximum bytes of an input line; longer lines are quarantined unread"
    )
    max_invalid_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Maximum share of invalid rows; above it the data stage fails, below it they are quarantined",
    )

    @model_serializer(mode="wrap")
    def _serialised(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the newer settings where they are the default: the ids of dataset versions from before them stay."""
        return without_defaults(handler(self), {"reasoning": "train", "form": "answers", "tools": "template", "date": ""})

    @model_validator(mode="after")
    def _weights_on_all_or_none(self) -> Self:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and (not all(weighted) or any(source.epochs != 1.0 for source in self.sources)):
            raise SettingError(
                "sources: a mixture has either a weight on every source, or epochs",
                "give every source a `weight`, or none",
            )
        return self
