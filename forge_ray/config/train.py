"""The `train:` section: method, adapter, optimizer, ZeRO, precision, cadence, scaling."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config


class Adapter(Config):
    """LoRA (arXiv:2106.09685): delta W = (alpha / r) B A on the named linear layers."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class Optimizer(Config):
    """AdamW (arXiv:1711.05101)."""

    lr: float = Field(2e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)


class Schedule(Config):
    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of all steps")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final lr / peak lr")


class Validation(Config):
    every_steps: int = Field(0, ge=0, description="0: only at the end")
    max_rows: int = Field(64, ge=0, description="packed validation rows per pass; 0 disables validation")


class Checkpointing(Config):
    every_steps: int = Field(0, ge=0, description="0: only at the end")
    keep: int = Field(2, ge=2, description="newest complete checkpoints that stay; one alone would be lost with a bad disk")


class Scaling(Config):
    """How many workers, and what each takes. Changes speed, never the order of samples."""

    num_workers: int = Field(1, ge=0, description="0 runs the loop in this process, without Ray")
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0, le=1)
    max_failures: int = Field(2, ge=-1, description="worker-group restarts before the run fails; -1 is without end")


class TrainConfig(Config):
    method: Literal["sft"] = Field("sft", description="supervised fine-tuning; on plain text it is continued pre-training")
    seed: int = Field(0, ge=0)
    epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(0, ge=0, description="0: as `epochs` says")
    global_batch: int = Field(8, ge=1, description="packed rows per optimizer step, over all workers")
    micro_batch_size: int = Field(1, ge=1, description="packed rows per forward pass of one worker")
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    max_grad_norm: float = Field(1.0, ge=0, description="0 disables clipping")
    adapter: Adapter | None = Field(None, description="absent: every weight is trained")
    engine: Literal["deepspeed", "torch"] = Field("deepspeed", description="`torch` needs neither DeepSpeed nor Ray")
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO (arXiv:1910.02054)")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="`auto`: bf16 where the hardware multiplies it")
    activation_checkpointing: bool = False
    export: Literal["adapter", "merged"] = Field("adapter", description="what a LoRA run exports; a full run exports all")
    validation: Validation = Validation()
    checkpoint: Checkpointing = Checkpointing()
    scaling: Scaling = Scaling()

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        per_pass = max(self.scaling.num_workers, 1) * self.micro_batch_size
        if self.global_batch % per_pass:
            near = max(per_pass, self.global_batch // per_pass * per_pass)
            raise ValueError(
                f"global_batch={self.global_batch} is not a multiple of"
                f" scaling.num_workers * micro_batch_size = {per_pass}"
                f" hint: use train.global_batch={near} or {near + per_pass}"
            )
        return self

    @model_validator(mode="after")
    def _engine_supports(self) -> Self:
        if self.engine == "torch" and self.zero_stage:
            raise ValueError(
                f"engine=torch has no zero_stage={self.zero_stage} hint: set train.zero_stage=0, or train.engine=deepspeed"
            )
        return self

    @model_validator(mode="after")
    def _export_needs_adapter(self) -> Self:
        if self.export == "merged" and self.adapter is None:
            raise ValueError(
                "export=merged without an adapter: a full fine-tune has nothing to merge"
                " hint: remove train.export, or add train.adapter"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What decides the weights: all but how often we look and on how many workers it runs."""
        return self.model_dump(mode="json", exclude={"validation", "checkpoint", "scaling"})
