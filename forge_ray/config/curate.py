"""The `data.curate` list: rules that drop, mark or change records, read from top to bottom."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config, SettingError

Action = Literal["flag", "mask", "drop"]
PersonalData = Literal["email", "phone", "iban", "card", "national_id", "ip"]
Secret = Literal["private_key", "cloud_key", "token", "jwt", "password", "high_entropy"]


class ExactDuplicates(Config):
    """Equal records are used once in any case; as a rule, they are dropped at this point and kept for audit."""

    rule: Literal["exact_duplicates"]


class NearDuplicates(Config):
    """MinHash LSH over all shards and sources; the first record of a cluster stays."""

    rule: Literal["near_duplicates"]
    threshold: float = Field(0.8, gt=0, lt=1, description="estimated Jaccard similarity from which two are the same")
    ngram: int = Field(5, ge=1, le=20, description="words per shingle")
    num_hashes: int = Field(128, ge=16, le=512)


class Length(Config):
    """Drops records whose texts together are too short or too long."""

    rule: Literal["length"]
    min_chars: int = Field(0, ge=0)
    max_chars: int = Field(0, ge=0, description="0: no limit")
    min_words: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if not (self.min_chars or self.max_chars or self.min_words):
            raise SettingError("rule: length has no limit", "set min_chars, max_chars or min_words")
        if self.max_chars and self.min_chars > self.max_chars:
            raise SettingError(f"min_chars={self.min_chars} is above max_chars={self.max_chars}", "no text can be both")
        return self


class Repetition(Config):
    """Drops texts that repeat themselves (arXiv:2112.11446, table A1). The shares are of a text's lines and characters."""

    rule: Literal["repetition"]
    max_duplicate_lines: float = Field(0.3, gt=0, le=1, description="share of lines that stood before")
    max_top_ngram: float = Field(0.2, gt=0, le=1, description="share of characters in the most frequent pair of words")
    max_duplicate_ngrams: float = Field(0.15, gt=0, le=1, description="share of characters in repeated runs of five words")
    min_words: int = Field(50, ge=5, description="shorter texts are not judged")


class Language(Config):
    """Keeps records in the languages listed. Code and tables have no language: give their source no such rule."""

    rule: Literal["language"]
    keep: tuple[str, ...] = Field(min_length=1, description="ISO 639-1 codes, such as [en, de]")
    min_probability: float = Field(0.5, gt=0, le=1, description="of those languages together")
    min_chars: int = Field(40, ge=1, description="shorter records are not judged: a few words have no sure language")


class Secrets(Config):
    """Keys, tokens and passwords."""

    rule: Literal["secrets"]
    action: Action = Field(
        "drop", description="`flag` marks the record, `mask` writes `<EMAIL>` and the like, `drop` leaves it out"
    )
    kinds: tuple[Secret, ...] = Field(("private_key", "cloud_key", "token", "jwt", "password", "high_entropy"), min_length=1)


class PersonalDataRule(Config):
    """Patterns with their checksums; names and addresses have none, so they are not found."""

    rule: Literal["personal_data"]
    action: Action = Field(
        "mask", description="`flag` marks the record, `mask` writes `<EMAIL>` and the like, `drop` leaves it out"
    )
    kinds: tuple[PersonalData, ...] = Field(("email", "phone", "iban", "card", "national_id", "ip"), min_length=1)


class Licence(Config):
    """Keeps records whose `licence` column, or else whose source's `licence`, is in the list; others are dropped."""

    rule: Literal["licence"]
    allow: tuple[str, ...] = Field(min_length=1)


class Consent(Config):
    """Keeps records whose column says that they may be used; a record without that column is dropped."""

    rule: Literal["consent"]
    field: str = Field("consent", min_length=1, description="column of the row; dots lead into objects")
    allow: tuple[str, ...] = Field(("true", "yes", "1"), min_length=1, description="values that mean yes")


class Decontaminate(Config):
    """Drops records that share a run of words with an evaluation set, so that its scores stay honest."""

    rule: Literal["decontaminate"]
    against: tuple[str, ...] = Field(min_length=1, description="files, globs or dataset versions that hold evaluation sets")
    ngram: int = Field(13, ge=5, le=50, description="words in a row that count as contamination (arXiv:2005.14165, C)")


Rule = Annotated[
    ExactDuplicates
    | NearDuplicates
    | Length
    | Repetition
    | Language
    | Secrets
    | PersonalDataRule
    | Licence
    | Consent
    | Decontaminate,
    Field(discriminator="rule"),
]
