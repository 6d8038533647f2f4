"""`train.method: {kind: distil}`: what a run learns from another model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from forge_ray.config.base import Config


class Distil(Config):
    """Distillation (arXiv:1503.02531): at each trained token the model learns the distribution of a frozen teacher over the
    vocabulary, mixed with the row's own token. The teacher has the same tokenizer. Guide: `docs/guides/distil.md`."""

    kind: Literal["distil"] = Field(description="`distil`: learn from the distributions of a teacher")
    teacher: str = Field(
        min_length=1, description="Model to learn from: a version of the store, an adapter version too, or an alias"
    )
    k: int = Field(
        64,
        ge=1,
        description="Likeliest tokens of the teacher that are kept at each trained token, 8 bytes each; the rest counts as"
        " one",
    )
    temperature: float = Field(
        1.0,
        ge=0.1,
        le=100,
        description="Divides the logits of both before they are compared; above 1 unlikely tokens count for more",
    )
    hard_weight: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Weight of the row's own tokens, as supervised fine-tuning has them; the teacher has the rest",
    )
