"""`train.method`: what is trained, where it is not the answers of chats and texts (`sft`)."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from forge_ray.config.base import Config, SettingError, without_defaults

OF_PAIRS = ("dpo", "robust", "ipo", "hinge", "offset", "simpo", "orpo")
OF_ANSWERS = ("kto", "apo_zero")
WITHOUT_REFERENCE = ("simpo", "orpo")
# settings that only some kinds read
READ_BY = {
    "reference": ("dpo", "robust", "ipo", "hinge", "offset", "kto", "apo_zero"),
    "label_smoothing": ("dpo", "robust", "simpo"),
    "sft_weight": ("dpo", "robust", "ipo", "hinge", "offset", "simpo"),
    "gamma": ("simpo",),
    "offset_weight": ("offset",),
    "offset_scale": ("offset",),
    "good_weight": OF_ANSWERS,
    "bad_weight": OF_ANSWERS,
}


def loss_name(method: str) -> str:
    """What the loss of a run by this method (`sft` or a kind) is of, as an axis of a curve says it."""
    if method == "sft":
        return "loss per trained token (nats)"
    if method == "distil":
        return "distil loss per trained token (nats)"
    if method == "classify":
        return "classify loss per labelled text"
    return f"{method} loss per {'pair' if method in (*OF_PAIRS, 'reward') else 'answer'}"


def objective(method: str, sft_weight: float) -> str:
    """What a run by this method minimises, as documents say it. `sft_weight`: 0 where the method has none."""
    if method == "sft":
        return "cross-entropy of the trained tokens"
    if method == "distil":
        return "divergence from a teacher's distributions at the trained tokens, mixed with their cross-entropy"
    if method == "classify":
        return "cross-entropy of the labels of texts, read at their last token"
    if method == "reward":
        return "Bradley-Terry loss of the rewards of preferred and rejected answers"
    rows = "pairs of a preferred and a rejected answer" if method in OF_PAIRS else "single answers, judged good or bad"
    added = f" plus {sft_weight:g} times the preferred answer's cross-entropy per token" if sft_weight else ""
    return f"{method} loss of {rows}{added}"


class Preference(Config):
    """Training on judged answers: pairs of a preferred and a rejected one, or with `kto` and `apo_zero` single ones.
    Equations and papers: `docs/guides/preferences.md`."""

    kind: Literal["dpo", "robust", "ipo", "hinge", "offset", "simpo", "orpo", "kto", "apo_zero"] = Field(
        description="Loss. `dpo`: the usual one; `robust`: where some judgements are wrong; `ipo`: does not overfit certain"
        " pairs; `hinge`: SLiC's; `offset`: where pairs have a `margin`; `simpo`, `orpo`: without a reference model;"
        " `kto`: single answers, each good or bad; `apo_zero`: the same with the reference point at 0"
    )
    beta: float = Field(
        0.1, gt=0, description="Strength of the pull to the reference model; of `orpo`, weight of its term of odds"
    )
    reference: str = Field(
        "",
        description="Model that answers are compared with: a version of the store or an alias; default: the model that the"
        " run starts from",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs whose judgement is taken to be wrong (dpo, robust, simpo)"
    )
    sft_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the preferred answer's own loss per token, which keeps it from becoming less likely (RPO)",
    )
    gamma: float = Field(0.5, ge=0, description="Margin that the pair's difference should exceed (simpo)")
    offset_weight: float = Field(1.0, gt=0, description="Factor of the offset that a pair's margin gives (offset)")
    offset_scale: Literal["log", "linear"] = Field("log", description="Whether the offset grows with the margin or its log")
    good_weight: float = Field(1.0, gt=0, description="Weight of answers judged good (kto, apo_zero)")
    bad_weight: float = Field(1.0, gt=0, description="Weight of answers judged bad (kto, apo_zero)")

    @model_validator(mode="after")
    def _every_setting_is_read(self) -> Self:
        for name, kinds in READ_BY.items():
            if name in self.model_fields_set and self.kind not in kinds:
                raise SettingError(
                    f"{name}={getattr(self, name)} has no effect with kind={self.kind}",
                    f"remove it, or use kind: {' or '.join(kinds)}",
                )
        return self

    @property
    def has_reference(self) -> bool:
        return self.kind not in WITHOUT_REFERENCE

    @property
    def rows(self) -> str:
        """The kind of the records that are trained on."""
        return "feedback" if self.kind in OF_ANSWERS else "preference"

    @model_serializer(mode="wrap")
    def _serialised(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The settings that this kind reads: what decides the weights. `reference` is newer than ids of runs."""
        values = without_defaults(handler(self), {"reference": ""})
        return {name: value for name, value in values.items() if self.kind in READ_BY.get(name, (self.kind,))}
