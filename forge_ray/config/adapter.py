"""The `train.adapter` section."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from forge_ray.config.base import Config, SettingError, without_defaults


class Adapter(Config):
    """LoRA (arXiv:2106.09685): delta W = (alpha / r) B A on the named linear layers."""

    method: Literal["lora", "rslora", "dora"] = Field(
        "lora",
        description="`lora` scales by alpha / r, `rslora` by alpha / sqrt(r) (arXiv:2312.03732); `dora` also trains"
        " magnitudes (arXiv:2402.09353)",
    )
    r: int = Field(16, ge=1, description="Rank of the update; raise it when the training loss stays too high")
    alpha: float = Field(32, gt=0, description="Scale: the update is multiplied by alpha / r; usually r to 2 r")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout probability on the adapter's input; raise it against overfitting"
    )
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="Linear layers to adapt: `all-linear`, or names such as [q_proj, v_proj]"
    )
    target_parameters: tuple[str, ...] = Field(
        (), description="Weights to adapt that are not layers: [mlp.experts.gate_up_proj, mlp.experts.down_proj]"
    )
    modules_to_save: tuple[str, ...] = Field(
        (),
        description="Modules to train in full next to the adapter, such as [embed_tokens, lm_head] for new tokens; such"
        " an adapter is served merged",
    )
    lr_ratio: float = Field(
        1.0,
        gt=0,
        description="Learning rate of B over that of A, which is `optimizer.lr` (LoRA+, arXiv:2402.12354); 4 to 16 learns"
        " faster, with a lower `optimizer.lr`",
    )
    quantize: Literal["none", "nf4"] = Field(
        "none", description="`nf4` keeps the base model in 4 bits (QLoRA, arXiv:2305.14314); needs a GPU"
    )

    @model_serializer(mode="wrap")
    def _serialised(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the newer settings where they are the default: the ids of runs from before them stay."""
        return without_defaults(handler(self), {"lr_ratio": 1.0, "modules_to_save": []})

    @model_validator(mode="after")
    def _reaches_parameters(self) -> Self:
        if self.target_parameters and self.dropout:
            raise SettingError(
                f"dropout={self.dropout} cannot be applied to target_parameters={list(self.target_parameters)}",
                "set train.adapter.dropout=0",
            )
        if self.target_parameters and self.method == "dora":
            raise SettingError(
                f"method=dora cannot be applied to target_parameters={list(self.target_parameters)}",
                "set train.adapter.method=lora or rslora",
            )
        if self.modules_to_save and self.quantize != "none":
            raise SettingError(
                f"modules_to_save={list(self.modules_to_save)} with quantize={self.quantize}: weights in 4 bits cannot be"
                " trained in full",
                "set train.adapter.quantize=none, or remove train.adapter.modules_to_save",
            )
        if not self.target_parameters and not self.target_modules:
            raise SettingError("target_modules and target_parameters are both empty", "use target_modules: all-linear")
        return self
