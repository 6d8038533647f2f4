"""The `train:` section: method, adapter, optimizer, ZeRO, precision, cadence, scaling."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from forge_ray.config.base import Config, SettingError


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
            raise SettingError(
                f"dropout={self.dropout} cannot be applied to target_parameters={list(self.target_parameters)}",
                "set train.adapter.dropout=0",
            )
        if self.target_parameters and self.method == "dora":
            raise SettingError(
                f"method=dora cannot be applied to target_parameters={list(self.target_parameters)}",
                "set train.adapter.method=lora or rslora",
            )
        if not self.target_parameters and not self.target_modules:
            raise SettingError("target_modules and target_parameters are both empty", "use target_modules: all-linear")
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


class EarlyStopping(Config):
    """The run ends when `patience` validations in a row are not better than the best one by more than `min_delta` nats."""

    patience: int = Field(3, ge=1)
    min_delta: float = Field(0.0, ge=0)


class Validation(Config):
    every_steps: int = Field(0, ge=0, description="0: only at the end")
    max_rows: int = Field(64, ge=0, description="packed validation rows per pass; 0 disables validation")
    background: bool = Field(False, description="in a task beside the workers, from the checkpoint, while training goes on")
    cpus: float = Field(1, gt=0, description="of that task")
    gpus: float = Field(0, ge=0, le=1, description="of that task")
    timeout_s: float = Field(1800.0, gt=0, description="of that task, waiting for its room included")
    keep_best: bool = Field(False, description="the checkpoint with the lowest loss stays, whatever `checkpoint.keep` says")
    early_stopping: EarlyStopping | None = Field(None, description="null: off")


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


class Offload(Config):
    """What ZeRO keeps in main memory when the GPU has no room for it (arXiv:2101.06840); the optimizer then steps there."""

    optimizer: Literal["none", "cpu"] = Field("none", description="AdamW's moments and fp32 weights; zero_stage 1 to 3")
    parameters: Literal["none", "cpu"] = Field("none", description="the weights themselves; zero_stage 3")


class Guards(Config):
    """When a run helps itself, and when it stops. Each act is an incident in the run's record."""

    spike: Spike | None = Field(Spike(), description="null: off")
    max_skipped: float = Field(0.01, ge=0, le=1, description="share of steps or rows that may be left out (3 always may)")
    hang_factor: float = Field(3.0, ge=1, description="a step is hung after this many median steps and `hang_slack_s`")
    hang_slack_s: float = Field(10.0, gt=0)
    first_step_s: float = Field(1800.0, gt=0, description="the same for what has no history yet: first step, first save")
    slow_rank: float = Field(1.5, gt=1, description="a worker is reported that is so much slower than the median")
    refuse_impossible: bool = Field(True, description="false (`--force`): start what the plan says cannot fit")


class Workers(Config):
    """Elastic: as many workers as the cluster has room for, between these."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)
    resize_every_s: float = Field(60.0, gt=0, description="how often the cluster is looked at for more room")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise SettingError(f"min={self.min} is more than max={self.max}", "exchange them")
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
            raise SettingError(f"num_workers={value} is not a number of workers", "use 0 or more, or {min, max}")
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
    compile: bool = Field(False, description="each block through torch.compile; wants a C++ compiler on every worker")
    offload: Offload = Offload()
    sequence_parallel: int = Field(1, ge=1, description="workers that share each row, a slice of it each (arXiv:2309.14509)")
    router: Literal["auto", "frozen", "trained"] = Field(
        "auto", description="of a mixture of experts; `auto`: trained, but frozen beside an adapter"
    )
    router_aux_loss: float = Field(0.0, ge=0, description="weight of the load-balancing loss (arXiv:2101.03961); 0: off")
    export: Literal["adapter", "merged"] = Field("adapter", description="what a LoRA run exports; a full run exports all")
    export_step: Literal["last", "best"] = Field(
        "last", description="`best`: the checkpoint with the lowest validation loss"
    )
    validation: Validation = Validation()
    checkpoint: Checkpointing = Checkpointing()
    scaling: Scaling = Scaling()
    guards: Guards = Guards()
    sinks: tuple[Literal["tensorboard", "mlflow"], ...] = Field(
        (), description="where metrics go too; docs/design/training.md"
    )

    @model_validator(mode="after")
    def _batch_reaches_all(self) -> Self:
        workers = self.scaling.max_workers
        groups = -(-workers // self.sequence_parallel)
        if self.global_batch < groups:
            raise SettingError(
                f"global_batch={self.global_batch} leaves some of {workers} workers without a row",
                f"use train.global_batch={groups} or more, or fewer workers",
            )
        return self

    @model_validator(mode="after")
    def _workers_make_groups(self) -> Self:
        """An elastic run may come to any number between; one that is no multiple is refused when it starts."""
        number, size = self.scaling.num_workers, self.sequence_parallel
        is_elastic = isinstance(number, Workers)
        counts = {"min": number.min, "max": number.max} if isinstance(number, Workers) else {"num_workers": number or 1}
        for name, count in counts.items():
            if count % size:
                where = f"train.scaling.num_workers.{name}" if is_elastic else "train.scaling.num_workers"
                raise SettingError(
                    f"sequence_parallel={size}: {name}={count} workers do not make groups of {size}",
                    f"use {where}={-(-count // size) * size}, or train.sequence_parallel=1",
                )
        return self

    @model_validator(mode="after")
    def _offload_is_possible(self) -> Self:
        offload = self.offload
        chosen = next((name for name in ("parameters", "optimizer") if getattr(offload, name) != "none"), "")
        what = f"offload.{chosen}=cpu"
        if chosen and self.engine != "deepspeed":
            raise SettingError(f"{what} with engine={self.engine}", "set train.engine=deepspeed and train.zero_stage=3")
        if chosen and not self.zero_stage:
            raise SettingError(f"{what} with zero_stage=0", "set train.zero_stage=2, or 3 for offload.parameters")
        if chosen == "parameters" and self.zero_stage != 3:
            raise SettingError(
                f"{what} with zero_stage={self.zero_stage}, which keeps whole weights on every GPU",
                "set train.zero_stage=3, or train.offload.parameters=none",
            )
        return self

    @model_validator(mode="after")
    def _engine_supports(self) -> Self:
        if self.engine == "torch" and self.zero_stage:
            raise SettingError(
                f"engine=torch has no zero_stage={self.zero_stage}", "set train.zero_stage=0, or train.engine=deepspeed"
            )
        return self

    @model_validator(mode="after")
    def _export_needs_adapter(self) -> Self:
        if self.export == "merged" and self.adapter is None:
            raise SettingError(
                "export=merged without an adapter: a full fine-tune has nothing to merge",
                "remove train.export, or add train.adapter",
            )
        return self

    @model_validator(mode="after")
    def _validation_has_its_checkpoints(self) -> Self:
        of, every = self.validation, self.checkpoint.every_steps
        wants = {
            "train.validation.background": of.background,
            "train.validation.keep_best": of.keep_best,
            "train.export_step=best": self.export_step == "best",
        }
        asked = [name for name, wanted in wants.items() if wanted]
        if asked and (not of.every_steps or not every or of.every_steps % every):
            raise SettingError(
                f"{asked[0]} is about checkpoints: validation.every_steps={of.every_steps} must be a multiple of"
                f" checkpoint.every_steps={every}, and neither 0",
                f"set train.validation.every_steps={of.every_steps or every or 50} and"
                f" train.checkpoint.every_steps={of.every_steps or every or 50}",
            )
        if of.early_stopping and not of.every_steps:
            raise SettingError(
                "early_stopping with validation.every_steps=0 never looks", "set train.validation.every_steps"
            )
        if (asked or of.early_stopping) and not of.max_rows:
            raise SettingError(
                f"{asked[0] if asked else 'early_stopping'} with validation.max_rows=0 has nothing to go by",
                "set train.validation.max_rows=64",
            )
        if of.background and not self.scaling.max_workers:
            raise SettingError(
                "validation.background with scaling.num_workers=0: there is no Ray to run it beside the training",
                "set train.scaling.num_workers=1, or train.validation.background=false",
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What decides the weights: all but how often we look, on how many workers it runs and how they share rows, where
        the weights lie, and what is done in trouble (which the incidents of its record say). Validation is part of it where
        it decides when to stop or what to export."""
        around = {"validation", "checkpoint", "scaling", "guards", "sinks", "sequence_parallel"}
        value = self.model_dump(mode="json", exclude=dict.fromkeys(around, True) | {"offload": {"parameters"}})
        if self.validation.early_stopping or self.export_step == "best":
            decides = {"every_steps", "max_rows", "background", "early_stopping"}
            value["validation"] = self.validation.model_dump(mode="json", include=decides)
        return value

    @model_validator(mode="after")
    def _router_is_trained(self) -> Self:
        if self.router == "trained" and self.adapter:
            raise SettingError("router=trained beside an adapter: its export has no place for it", "set train.router=auto")
        if self.router_aux_loss and self.sequence_parallel > 1:
            raise SettingError(
                f"router_aux_loss={self.router_aux_loss} with sequence_parallel={self.sequence_parallel}: each worker sees a"
                " slice of the tokens to be balanced",
                "set train.sequence_parallel=1, or train.router_aux_loss=0",
            )
        if self.router_aux_loss and (self.adapter or self.router == "frozen"):
            raise SettingError(
                f"router_aux_loss={self.router_aux_loss} has nothing to balance, the router is frozen",
                "set train.router_aux_loss=0, or train every weight with train.router=trained",
            )
        return self

    @model_validator(mode="after")
    def _blocks_can_be_compiled(self) -> Self:
        if self.compile and (self.zero_stage == 3 or self.router_aux_loss):
            what = "zero_stage=3 gathers weights" if self.zero_stage == 3 else "router_aux_loss looks at routers"
            raise SettingError(f"compile=true: {what} in the middle of a block", "set train.compile=false")
        return self

    @model_validator(mode="after")
    def _adapter_fits(self) -> Self:
        if self.adapter is None:
            return self
        if self.adapter.quantize == "nf4" and not self.scaling.gpus_per_worker:
            raise SettingError(
                "adapter.quantize=nf4 needs a GPU, gpus_per_worker=0",
                "set train.scaling.gpus_per_worker=1, or train.adapter.quantize=none",
            )
        if self.adapter.quantize == "nf4" and self.zero_stage == 3:
            raise SettingError(
                "adapter.quantize=nf4 makes weights that zero_stage=3 cannot divide",
                "set train.zero_stage=2: each worker holds the whole model, in 4 bits",
            )
        if self.adapter.method == "dora" and self.zero_stage == 3:
            raise SettingError(
                "adapter.method=dora needs whole weights for their norms, zero_stage=3 divides them",
                "set train.zero_stage=2, or train.adapter.method=rslora",
            )
        return self
