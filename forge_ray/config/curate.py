"""The `data.curate` list: rules that drop, mark or change records, read from top to bottom."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from forge_ray.config.base import Config, SettingError

Action = Literal["flag", "mask", "drop"]
PersonalData = Literal["email", "phone", "iban", "card", "national_id", "ip"]
MIN_NGRAM = 5  # words in a row: fewer in common are no evidence
Secret = Literal["private_key", "cloud_key", "token", "jwt", "password", "high_entropy"]


class ExactDuplicates(Config):
    """Drops exact duplicates at this point of the list and keeps them for audit. Without this rule, too, equal records are
    used only once."""

    rule: Literal["exact_duplicates"]


class NearDuplicates(Config):
    """Drops near-duplicates, found by MinHash LSH across all shards and sources; the first record of a cluster is kept."""

    rule: Literal["near_duplicates"]
    threshold: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="Estimated Jaccard similarity from which two records are duplicates; lower it to drop more",
    )
    ngram: int = Field(5, ge=1, le=20, description="Words per shingle; fewer words make more records similar")
    num_hashes: int = Field(
        128,
        ge=16,
        le=512,
        description="MinHash functions per record; more estimate the similarity more exactly and take longer",
    )


class Length(Config):
    """Drops records whose texts together are too short or too long."""

    rule: Literal["length"]
    min_chars: int = Field(0, ge=0, description="Minimum characters of a record, all its texts together; 0: no minimum")
    max_chars: int = Field(0, ge=0, description="Maximum characters of a record, all its texts together; 0: no maximum")
    min_words: int = Field(0, ge=0, description="Minimum words of a record, all its texts together; 0: no minimum")

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if not (self.min_chars or self.max_chars or self.min_words):
            raise SettingError("rule: length has no limit", "set min_chars, max_chars or min_words")
        if self.max_chars and self.min_chars > self.max_chars:
            raise SettingError(
                f"min_chars={self.min_chars} exceeds max_chars={self.max_chars}", "raise max_chars or lower min_chars"
            )
        return self


class Repetition(Config):
    """Drops records with a text that repeats itself (arXiv:2112.11446, table A1). Shares are of a text's lines or
    characters."""

    rule: Literal["repetition"]
    max_duplicate_lines: float = Field(0.3, gt=0, le=1, description="Maximum share of lines that repeat an earlier line")
    max_top_ngram: float = Field(
        0.2, gt=0, le=1, description="Maximum share of characters in the most frequent pair of words"
    )
    max_duplicate_ngrams: float = Field(
        0.15, gt=0, le=1, description="Maximum share of characters in repeated runs of five words"
    )
    min_words: int = Field(50, ge=5, description="Texts with fewer words are not checked")


class Language(Config):
    """Keeps records in the listed languages. Code and tables have no language: do not use this rule on data with them."""

    rule: Literal["language"]
    keep: tuple[str, ...] = Field(min_length=1, description="ISO 639-1 codes of the languages to keep, such as [en, de]")
    min_probability: float = Field(0.5, gt=0, le=1, description="Minimum probability of the listed languages together")
    min_chars: int = Field(
        40, ge=1, description="Records with fewer characters are kept unchecked: a few words do not identify a language"
    )


class Secrets(Config):
    """Finds keys, tokens and passwords."""

    rule: Literal["secrets"]
    action: Action = Field(
        "drop",
        description="For a record with a match: `flag` marks it, `mask` replaces the match with a placeholder, `drop`"
        " removes the record",
    )
    kinds: tuple[Secret, ...] = Field(
        ("private_key", "cloud_key", "token", "jwt", "password", "high_entropy"),
        min_length=1,
        description="Kinds of secrets to look for",
    )


class PersonalDataRule(Config):
    """Finds personal data by pattern and checksum. Names and postal addresses are not detected."""

    rule: Literal["personal_data"]
    action: Action = Field(
        "mask",
        description="For a record with a match: `flag` marks it, `mask` replaces the match with a placeholder such as"
        " `<EMAIL>`, `drop` removes the record",
    )
    kinds: tuple[PersonalData, ...] = Field(
        ("email", "phone", "iban", "card", "national_id", "ip"),
        min_length=1,
        description="Kinds of personal data to look for",
    )


class Licence(Config):
    """Keeps records whose `licence` column, or else their source's `licence`, is in the list; drops all others."""

    rule: Literal["licence"]
    allow: tuple[str, ...] = Field(
        min_length=1, description="Licence tags to keep, spelt as in the data, such as [cc-by-4.0, mit]"
    )


class Consent(Config):
    """Keeps records whose consent column permits their use; drops all others, and those without that column."""

    rule: Literal["consent"]
    field: str = Field("consent", min_length=1, description="Column that holds the consent; dots lead into nested objects")
    allow: tuple[str, ...] = Field(
        ("true", "yes", "1"), min_length=1, description="Values that count as consent; upper and lower case are equal"
    )


class Decontaminate(Config):
    """Drops records that share a run of words with an evaluation set, so that its scores stay meaningful."""

    rule: Literal["decontaminate"]
    against: tuple[str, ...] = Field(min_length=1, description="Evaluation sets: files, globs or dataset versions")
    ngram: int = Field(
        13,
        ge=MIN_NGRAM,
        le=50,
        description="Consecutive shared words that count as contamination (arXiv:2005.14165, appendix C)",
    )


class HeldOut(Config):
    """Drops records that are test rows of other dataset versions, or that share a run of words with one, unless they are
    test rows here too. Added at the end of the list for every earlier cycle of the base model."""

    rule: Literal["held_out"]
    by: Literal["record", "conversation"] = Field(
        "record",
        description="What is compared: whole records; or also their conversations, so that another answer to the question of"
        " a test row, and later turns, are dropped too",
    )
    against: tuple[Annotated[str, Field(pattern="^ds_")], ...] = Field(
        min_length=1, description="Dataset versions whose test records are not trained on"
    )
    ngram: int = Field(
        13,
        ge=0,
        le=50,
        description="Consecutive words of its text or question that a record must share with a test record to be dropped,"
        " at least 5; 0: equal records alone",
    )

    @model_validator(mode="after")
    def _is_evidence(self) -> Self:
        if 0 < self.ngram < MIN_NGRAM:
            raise SettingError(
                f"rule: held_out has ngram={self.ngram}, and so few words in common prove nothing",
                f"ngram of at least {MIN_NGRAM}, or 0 for equal records alone",
            )
        return self

    @model_serializer(mode="wrap")
    def _serialised(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `by` where it is the default: the ids of dataset versions from before that setting stay."""
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name != "by" or value != "record"}


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
    | Decontaminate
    | HeldOut,
    Field(discriminator="rule"),
]
