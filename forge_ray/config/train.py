"""The `train:` section: method, adapter, optimizer, ZeRO, precision, cadence, scaling."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from forge_ray.config.base import Config


class Adapter(Config):
    """LoRA (arXiv:2106.09685): delta W = (alpha / r) B A on the named linear layers."""

    method: Literal["lora", "rslora", "dora"] = Field(
        "lora", description="`rslora`: alpha / sqrt(r) (arXiv:2312.03732); `dora`: also a magnitude (arXiv:2402.09353)"
    )
    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] = Field(
        (), description="weights that are no layer of their own: [mlp.experts.gate_up_proj, mlp.experts.down_proj]"
    )
    quantize: Literal["none", "nf4"] = Field("none", description="`nf4`: QLoRA (arXiv:2305.14314), on a GPU")

    @model_validator(mode="after")
    def _reaches_parameters(self) -> Self:
        if self.target_parameters and self.dropout:
            raise ValueError(
                f"dropout={self.dropout} cannot be applied to target_parameters={list(self.target_parameters)}"
                " hint: set train.adapter.dropout=0"
            )
        if self.target_parameters and self.method == "dora":
            raise ValueError(
                f"method=dora cannot be applied to target_parameters={list(self.target_parameters)}"
                " hint: set train.adapter.method=lora or rslora"
            )
        if not self.target_parameters and not self.target_modules:
            raise ValueError("target_modules and target_parameters are both empty hint: use target_modules: all-linear")
        return self


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
    asynchronous: bool = Field(True, description="write from a copy while training goes on")
    keep: int = Field(2, ge=2, description="newest complete checkpoints that stay; one alone would be lost with a bad disk")


class Spike(Config):
    """A loss that rises and stays: above mean + sigma * deviation of the `window` steps before, and `rise` nats above that
    mean, `patience` steps running. The run goes back to the checkpoint before and leaves the spike's steps out (PaLM,
    arXiv:2204.02311, section 5.1)."""

    sigma: float = Field(6.0, gt=0)
    rise: float = Field(0.5, gt=0)
    window: int = Field(50, ge=8)
    patience: int = Field(3, ge=1)


class Guards(Config):
    """When a run helps itself, and when it stops. Each act is an incident in the run's record."""

    spike: Spike | None = Field(Spike(), description="null: off")
    max_skipped: float = Field(0.01, ge=0, le=1, description="share of steps or rows that may be left out (3 always may)")
    hang_factor: float = Field(3.0, ge=1, description="a step is hung after this many median steps and `hang_slack_s`")
    hang_slack_s: float = Field(10.0, gt=0)
    first_step_s: float = Field(1800.0, gt=0, description="the same for what has no history yet: first step, first save")
    slow_rank: float = Field(1.5, gt=1, description="a worker is reported that is so much slower than the median")


class Workers(Config):
    """Elastic: as many workers as the cluster has room for, between these."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)
    resize_every_s: float = Field(60.0, gt=0, description="how often the cluster is looked at for more room")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max} hint: exchange them")
        return self


class Scaling(Config):
    """How many workers, and what each takes. Changes speed, never the order of samples."""

    num_workers: int | Workers = Field(1, description="0 runs the loop in this process, without Ray; {min, max}: elastic")
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0, le=1)
    max_failures: int = Field(2, ge=-1, description="restarts in a row without a new checkpoint; -1 is without end")

    @field_validator("num_workers", mode="before")
    @classmethod
    def _a_number(cls, value: Any) -> Any:
        if isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise ValueError(f"num_workers={value} is not a number of workers hint: use 0 or more, or {{min, max}}")
        return value

    @property
    def max_workers(self) -> int:
        return self.num_workers.max if isinstance(self.num_workers, Workers) else self.num_workers


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
    router: Literal["auto", "frozen", "trained"] = Field(
        "auto", description="of a mixture of experts; `auto`: trained, but frozen beside an adapter"
    )
    router_aux_loss: float = Field(0.0, ge=0, description="weight of the load-balancing loss (arXiv:2101.03961); 0: off")
    export: Literal["adapter", "merged"] = Field("adapter", description="what a LoRA run exports; a full run exports all")
    validation: Validation = Validation()
    checkpoint: Checkpointing = Checkpointing()
    scaling: Scaling = Scaling()
    guards: Guards = Guards()

    @model_validator(mode="after")
    def _batch_reaches_all(self) -> Self:
        workers = self.scaling.max_workers
        if self.global_batch < workers:
            raise ValueError(
                f"global_batch={self.global_batch} leaves some of {workers} workers without a row"
                f" hint: use train.global_batch={workers} or more, or fewer workers"
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
        """What decides the weights: all but how often we look, on how many workers it runs, and what is done in trouble
        (which the incidents of its record say)."""
        return self.model_dump(mode="json", exclude={"validation", "checkpoint", "scaling", "guards"})

    @model_validator(mode="after")
    def _router_is_trained(self) -> Self:
        if self.router == "trained" and self.adapter:
            raise ValueError("router=trained beside an adapter: its export has no place for it hint: set train.router=auto")
        if self.router_aux_loss and (self.adapter or self.router == "frozen"):
            raise ValueError(
                f"router_aux_loss={self.router_aux_loss} has nothing to balance, the router is frozen"
                " hint: set train.router_aux_loss=0, or train every weight with train.router=trained"
            )
        return self

    @model_validator(mode="after")
    def _adapter_fits(self) -> Self:
        if self.adapter is None:
            return self
        if self.adapter.quantize == "nf4" and not self.scaling.gpus_per_worker:
            raise ValueError(
                "adapter.quantize=nf4 needs a GPU, gpus_per_worker=0"
                " hint: set train.scaling.gpus_per_worker=1, or train.adapter.quantize=none"
            )
        if self.adapter.quantize == "nf4" and self.zero_stage == 3:
            raise ValueError(
                "adapter.quantize=nf4 makes weights that zero_stage=3 cannot divide"
                " hint: set train.zero_stage=2: each worker holds the whole model, in 4 bits"
            )
        if self.adapter.method == "dora" and self.zero_stage == 3:
            raise ValueError(
                "adapter.method=dora needs whole weights for their norms, zero_stage=3 divides them"
                " hint: set train.zero_stage=2, or train.adapter.method=rslora"
            )
        return self
