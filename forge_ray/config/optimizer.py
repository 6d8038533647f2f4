"""The `train.optimizer` and `train.schedule` sections."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from forge_ray.config.base import Config, SettingError, without_defaults

BETAS, EPS = (0.9, 0.95), 1e-8
DECAY_RATIO = 0.1


class Optimizer(Config):
    """AdamW (arXiv:1711.05101), or where its state does not fit, the same in 8 bits (arXiv:2110.02861) or Adafactor
    (arXiv:1804.04235)."""

    name: Literal["adamw", "adamw_8bit", "adafactor"] = Field(
        "adamw",
        description="`adamw_8bit` keeps the two numbers a weight in 8 bits each, on GPUs with engine=torch; `adafactor`"
        " keeps row and column means in place of them, and steps in proportion to the size of the weights; a full fine-tune"
        " with engine=torch alone",
    )
    lr: float = Field(
        2e-4,
        gt=0,
        description="Peak learning rate, after warm-up; 1e-4 to 1e-3 suits LoRA, 1e-5 to 5e-5 a full fine-tune, 1e-3 to 1e-2"
        " adafactor",
    )
    betas: tuple[float, float] = Field(
        BETAS, description="Decay rates of the running means of the gradient and of its square; of adamw"
    )
    eps: float = Field(EPS, gt=0, description="Added to the denominator of the update, for numerical stability; of adamw")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled decay: each step shrinks the weights by lr * weight_decay")

    @model_validator(mode="after")
    def _every_setting_is_read(self) -> Self:
        changed = {"betas": (self.betas, BETAS), "eps": (self.eps, EPS)}
        for name, (value, default) in changed.items():
            if self.name == "adafactor" and value != default:
                raise SettingError(
                    f"{name}={value} has no effect with name=adafactor",
                    f"remove train.optimizer.{name}, or set train.optimizer.name=adamw",
                )
        return self

    @model_serializer(mode="wrap")
    def _serialised(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What this optimizer reads, and no `name` for adamw: the ids of runs from before that setting stay."""
        values: dict[str, Any] = handler(self)
        unread = {"name"} if self.name == "adamw" else {"betas", "eps"}
        return {name: value for name, value in values.items() if name not in unread}


class Schedule(Config):
    """Learning rate over the run: linear warm-up, then decay; with `wsd` it stays at its peak in between."""

    name: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="Shape of the decay after warm-up; `constant`: none; `wsd`: warm-up, stable, decay (arXiv:2404.06395),"
        " linear over the last `decay_ratio` of the steps",
    )
    warmup_ratio: float = Field(
        0.03, ge=0, le=1, description="Share of all steps spent on warm-up; raise it when the loss is unstable at the start"
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Final learning rate / peak; not used by `constant`")
    decay_ratio: float = Field(DECAY_RATIO, gt=0, le=1, description="Share of all steps spent on the decay of `wsd`")

    @model_validator(mode="after")
    def _decays_after_warmup(self) -> Self:
        if self.name != "wsd" and self.decay_ratio != DECAY_RATIO:
            raise SettingError(
                f"decay_ratio={self.decay_ratio} has no effect with name={self.name}",
                "set train.schedule.name=wsd, or remove train.schedule.decay_ratio",
            )
        if self.name == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise SettingError(
                f"warmup_ratio={self.warmup_ratio} + decay_ratio={self.decay_ratio} are more than all steps",
                "keep their sum at 1 or below",
            )
        return self

    @model_serializer(mode="wrap")
    def _serialised(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `decay_ratio` where it is not read: the ids of runs from before that setting stay."""
        values: dict[str, Any] = handler(self)
        return values if self.name == "wsd" else without_defaults(values, {"decay_ratio": DECAY_RATIO})


class Offload(Config):
    """What ZeRO keeps in main memory when the GPU's is too small (arXiv:2101.06840); the optimizer then runs on the CPU."""

    optimizer: Literal["none", "cpu"] = Field(
        "none", description="`cpu` keeps AdamW's moments and fp32 weights in main memory; needs zero_stage 1 to 3"
    )
    parameters: Literal["none", "cpu"] = Field(
        "none", description="`cpu` keeps the model's weights in main memory; needs zero_stage 3"
    )
