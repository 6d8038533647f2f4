"""The `data.curate` list: rules that drop or change records, read from top to bottom."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from forge_ray.config.base import Config


class ExactDuplicates(Config):
    """Equal records are used once in any case; as a rule, they are dropped at this point and kept for audit."""

    rule: Literal["exact_duplicates"]


class NearDuplicates(Config):
    """MinHash LSH over all shards and sources; the first record of a cluster stays."""

    rule: Literal["near_duplicates"]
    threshold: float = Field(0.8, gt=0, lt=1, description="estimated Jaccard similarity from which two are the same")
    ngram: int = Field(5, ge=1, le=20, description="words per shingle")
    num_hashes: int = Field(128, ge=16, le=512)


Rule = Annotated[ExactDuplicates | NearDuplicates, Field(discriminator="rule")]
