"""The `train:` section: method, adapter, optimizer, ZeRO, precision, validation, checkpoints, scaling."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from forge_ray.config.adapter import Adapter
from forge_ray.config.base import Config, SettingError, without_defaults
from forge_ray.config.classify import REWARD, Classify, Reward, Target
from forge_ray.config.distil import Distil
from forge_ray.config.guards import Guards
from forge_ray.config.method import Preference
from forge_ray.config.optimizer import Offload, Optimizer, Schedule
from forge_ray.config.scaling import Scaling, Workers


class EarlyStopping(Config):
    """Each validation is compared with the best one before it."""

    patience: int = Field(3, ge=1, description="Validations in a row without an improvement before the run ends")
    min_delta: float = Field(0.0, ge=0, description="Minimum decrease that counts as improvement, in nats per token")


class Validation(Config):
    """Loss of held-out rows, measured during training."""

    every_steps: int = Field(0, ge=0, description="Optimizer steps between validations; 0: only at the end")
    max_rows: int = Field(64, ge=0, description="Maximum packed validation rows per pass; 0 disables validation")
    background: bool = Field(False, description="Validate from a checkpoint in a task of its own while training continues")
    cpus: float = Field(1, gt=0, description="CPU cores of the background task")
    gpus: float = Field(0, ge=0, le=1, description="GPUs of the background task; 0: on the CPU")
    timeout_s: float = Field(
        1800.0, gt=0, description="Maximum seconds of the background task, including the wait for its CPUs and GPUs"
    )
    keep_best: bool = Field(False, description="Keep the checkpoint with the lowest validation loss, besides the newest")
    early_stopping: EarlyStopping | None = Field(
        None, description="End the run when the validation loss no longer falls; null: off"
    )


class Checkpointing(Config):
    """Saved states that an interrupted run resumes from."""

    every_steps: int = Field(0, ge=0, description="Optimizer steps between checkpoints; 0: only at the end")
    asynchronous: bool = Field(True, description="Write from a copy in memory while training continues")
    keep: int = Field(2, ge=2, description="Newest complete checkpoints to keep; two or more, in case one is damaged")


class TrainConfig(Config):
    """How the model is trained."""

    method: Literal["sft"] | Annotated[Preference | Classify | Reward | Distil, Field(discriminator="kind")] = Field(
        "sft",
        description="`sft`: supervised fine-tuning; on plain text it is continued pre-training. Training on judged answers"
        " has settings of its own, for example {kind: dpo}; so have a head over labels, {kind: classify, targets: […]}, and"
        " distillation, {kind: distil, teacher: …}",
    )
    seed: int = Field(0, ge=0, description="Seed of the order of rows, the adapter's initial weights and dropout")
    epochs: float = Field(
        1.0,
        gt=0,
        description="Passes over the training rows, or a part of one; raise it while the validation loss still falls",
    )
    max_steps: int = Field(0, ge=0, description="Maximum optimizer steps, to end before `epochs` does; 0: no limit")
    global_batch: int = Field(8, ge=1, description="Packed rows per optimizer step, over all workers")
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="Packed rows per forward pass of one worker; lower it when memory runs out. `auto`: as many as fit,"
        " decided when the run first starts, and kept with it (`forge plan` names the number)",
    )
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    max_grad_norm: float = Field(1.0, ge=0, description="Norm to which larger gradients are clipped; 0 disables clipping")
    adapter: Adapter | None = Field(None, description="Train a LoRA adapter; null: train every weight")
    freeze: tuple[str, ...] = Field(
        (),
        description="Modules or weights that a full fine-tune leaves as they are, by the end of their name: [embed_tokens,"
        " layers.0]; a tied weight is one weight with two names",
    )
    neftune_alpha: float = Field(
        0.0,
        ge=0,
        description="Noise on the embeddings of training rows, alpha / sqrt(tokens of the document * hidden size) (NEFTune,"
        " arXiv:2310.05914); 5 to 15 for chats, 0: off",
    )
    engine: Literal["deepspeed", "torch"] = Field(
        "deepspeed", description="Training engine; `torch` needs neither DeepSpeed nor Ray, and zero_stage 0"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="DeepSpeed ZeRO (arXiv:1910.02054): 1 divides the optimizer state among workers, 2 gradients too, 3"
        " weights too",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Precision of the computation; `auto`: bf16 on a GPU or a CPU with bf16 arithmetic, else fp32"
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, but slower"
    )
    compile: bool = Field(
        False,
        description="Compile each block with torch.compile, which delays the start; needs a C++20 compiler, Python's"
        " headers and openssl on every worker (a C compiler and Python's headers on GPUs)",
    )
    offload: Offload = Offload()
    sequence_parallel: int = Field(
        1, ge=1, description="Workers that share each row, one slice each; raise it for longer sequences (arXiv:2309.14509)"
    )
    router: Literal["auto", "frozen", "trained"] = Field(
        "auto", description="Router of a mixture of experts; `auto`: trained, but frozen with an adapter"
    )
    router_aux_loss: float = Field(
        0.0, ge=0, description="Weight of the router's load-balancing loss (arXiv:2101.03961); 0: off"
    )
    init_from: Literal["continue", "merge"] | None = Field(
        None,
        description="Where base_model is an adapter version. `continue`: train that adapter on, on the same base, with a new"
        " optimizer state; `merge`: add it to its base, and train a new adapter, or every weight, on the sum",
    )
    export: Literal["adapter", "merged"] = Field(
        "adapter",
        description="What a LoRA run exports: the adapter, or the base model with it merged; a full run exports all weights",
    )
    export_step: Literal["last", "best"] = Field(
        "last", description="Export the last step, or with `best` the checkpoint with the lowest validation loss"
    )
    validation: Validation = Validation()
    checkpoint: Checkpointing = Checkpointing()
    scaling: Scaling = Scaling()
    guards: Guards = Guards()
    sinks: tuple[Literal["tensorboard", "mlflow"], ...] = Field(
        (), description="Trackers that receive the metrics too; see docs/design/training.md"
    )

    @model_serializer(mode="wrap")
    def _serialised(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the newer settings where they are the default: the ids of runs from before them stay."""
        return without_defaults(handler(self), {"freeze": [], "neftune_alpha": 0.0})

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
        """Check the bounds of an elastic run too; the numbers in between are checked when the workers start."""
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
            raise SettingError(f"{what} needs engine=deepspeed (engine is {self.engine})", "set train.engine=deepspeed")
        if chosen and not self.zero_stage:
            raise SettingError(f"{what} needs ZeRO (zero_stage is 0)", "set train.zero_stage=2, or 3 for offload.parameters")
        if chosen == "parameters" and self.zero_stage != 3:
            raise SettingError(
                f"{what} needs zero_stage=3 (zero_stage is {self.zero_stage}, which keeps whole weights on every GPU)",
                "set train.zero_stage=3, or train.offload.parameters=none",
            )
        return self

    @model_validator(mode="after")
    def _engine_supports(self) -> Self:
        if self.engine == "torch" and self.zero_stage:
            raise SettingError(
                f"engine=torch does not support zero_stage={self.zero_stage}",
                "set train.zero_stage=0, or train.engine=deepspeed",
            )
        return self

    @model_validator(mode="after")
    def _continue_needs_adapter(self) -> Self:
        if self.init_from == "continue" and self.adapter is None:
            raise SettingError(
                "init_from=continue without an adapter: it trains an adapter on",
                "add train.adapter with the settings of the run that made the adapter, or set train.init_from=merge",
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
        asked = [name for name, is_set in wants.items() if is_set]
        if asked and (not of.every_steps or not every or of.every_steps % every):
            raise SettingError(
                f"{asked[0]} needs a checkpoint at every validation: validation.every_steps={of.every_steps} must be a"
                f" multiple of checkpoint.every_steps={every}, and neither may be 0",
                f"set train.validation.every_steps={of.every_steps or every or 50} and"
                f" train.checkpoint.every_steps={of.every_steps or every or 50}",
            )
        if of.early_stopping and not of.every_steps:
            raise SettingError(
                "early_stopping needs periodic validation: validation.every_steps is 0", "set train.validation.every_steps"
            )
        if (asked or of.early_stopping) and not of.max_rows:
            raise SettingError(
                f"{asked[0] if asked else 'early_stopping'} needs validation rows: validation.max_rows is 0",
                "set train.validation.max_rows=64",
            )
        if of.background and not self.scaling.max_workers:
            raise SettingError(
                "validation.background needs Ray, and scaling.num_workers=0 trains without it",
                "set train.scaling.num_workers=1, or train.validation.background=false",
            )
        return self

    @model_validator(mode="after")
    def _documents_stay_whole(self) -> Self:
        if not isinstance(self.method, str | Distil) and self.sequence_parallel > 1:
            raise SettingError(
                f"method.kind={self.method.kind} with sequence_parallel={self.sequence_parallel}: a worker would see"
                " parts of the documents whose losses need all of their tokens",
                "set train.sequence_parallel=1",
            )
        return self

    @model_validator(mode="after")
    def _optimizer_suits_engine(self) -> Self:
        if self.optimizer.name == "adamw_8bit" and self.engine != "torch":
            raise SettingError(
                f"optimizer.name=adamw_8bit keeps a scale for each block of a weight, and engine={self.engine} cuts weights"
                " anew for each number of workers",
                "set train.engine=torch and train.zero_stage=0, or train.optimizer.name=adamw",
            )
        if self.optimizer.name == "adamw_8bit" and not self.scaling.gpus_per_worker:
            raise SettingError(
                "optimizer.name=adamw_8bit runs on GPUs, and scaling.gpus_per_worker is 0",
                "set train.scaling.gpus_per_worker=1, or train.optimizer.name=adamw",
            )
        if self.optimizer.name == "adafactor" and self.engine != "torch":
            raise SettingError(
                f"optimizer.name=adafactor needs the rows and columns of weights, and engine={self.engine} lays weights"
                " end to end",
                "set train.engine=torch and train.zero_stage=0, or train.optimizer.name=adamw",
            )
        if self.optimizer.name == "adafactor" and self.adapter:
            raise SettingError(
                "optimizer.name=adafactor steps in proportion to the size of the weights, and an adapter's matrices B begin"
                " at zero",
                "set train.optimizer.name=adamw, or remove train.adapter",
            )
        return self

    @model_validator(mode="after")
    def _noise_is_possible(self) -> Self:
        if not self.neftune_alpha:
            return self
        if isinstance(self.method, Preference | Reward):
            raise SettingError(
                f"neftune_alpha={self.neftune_alpha} with method.kind={self.method.kind}: answers would be compared under"
                " different noise",
                "set train.neftune_alpha=0, or train.method=sft",
            )
        if self.sequence_parallel > 1:
            raise SettingError(
                f"neftune_alpha={self.neftune_alpha} with sequence_parallel={self.sequence_parallel}: a worker sees a slice"
                " of a document, and the noise depends on its length",
                "set train.sequence_parallel=1, or train.neftune_alpha=0",
            )
        return self

    @model_validator(mode="after")
    def _freezes_a_full_run(self) -> Self:
        if self.freeze and self.adapter:
            raise SettingError(
                f"freeze={list(self.freeze)} has no effect with an adapter, which trains no weight of the base",
                "remove train.freeze, and name what to train in train.adapter.target_modules",
            )
        return self

    @property
    def method_name(self) -> str:
        return self.method if isinstance(self.method, str) else self.method.kind

    @property
    def targets(self) -> tuple[Target, ...]:
        """What the head answers; () of a model that writes."""
        if isinstance(self.method, Reward):
            return (REWARD,)
        return self.method.targets if isinstance(self.method, Classify) else ()

    @property
    def frozen_model(self) -> str:
        """The model, besides the one that the run starts from, whose numbers the loss reads: a teacher, or another
        reference; "" where there is none."""
        if isinstance(self.method, Distil):
            return self.method.teacher
        return self.method.reference if isinstance(self.method, Preference) else ""

    @property
    def keeps_best(self) -> bool:
        return self.validation.keep_best or self.export_step == "best"

    def identity(self) -> dict[str, Any]:
        """The settings that determine the weights. Not among them: validation, checkpoints, number of workers, sequence
        parallelism, parameter offload, trackers, and guards, whose interventions are the incidents of the record. Validation
        counts if it decides when to stop or what to export. `init_from` and a frozen model's name are left out: models are
        named by their digests (`job.identity`)."""
        around = {"validation", "checkpoint", "scaling", "guards", "sinks", "sequence_parallel", "init_from"}
        value = self.model_dump(mode="json", exclude=dict.fromkeys(around, True) | {"offload": {"parameters"}})
        if self.method_name == "kto":  # runs before it was estimated had 0, which is apo_zero
            value["method"]["reference_point"] = "answers put to other prompts"
        if self.frozen_model:
            value["method"] = {key: item for key, item in value["method"].items() if key not in ("teacher", "reference")}
        if self.validation.early_stopping or self.export_step == "best":
            decides = {"every_steps", "max_rows", "background", "early_stopping"}
            value["validation"] = self.validation.model_dump(mode="json", include=decides)
        return value

    @model_validator(mode="after")
    def _router_is_trained(self) -> Self:
        if self.router == "trained" and self.adapter:
            raise SettingError("router=trained cannot be combined with an adapter", "set train.router=auto")
        if self.router_aux_loss and self.sequence_parallel > 1:
            raise SettingError(
                f"router_aux_loss={self.router_aux_loss} with sequence_parallel={self.sequence_parallel}: each worker sees"
                " only a slice of the tokens to balance",
                "set train.sequence_parallel=1, or train.router_aux_loss=0",
            )
        if self.router_aux_loss and (self.adapter or self.router == "frozen"):
            raise SettingError(
                f"router_aux_loss={self.router_aux_loss} has no effect: the router is frozen",
                "set train.router_aux_loss=0, or train every weight with train.router=trained",
            )
        return self

    @model_validator(mode="after")
    def _blocks_can_be_compiled(self) -> Self:
        if self.compile and (self.zero_stage == 3 or self.router_aux_loss):
            what = "zero_stage=3, which gathers weights" if self.zero_stage == 3 else "router_aux_loss, which reads routers"
            raise SettingError(f"compile=true cannot be combined with {what} inside a block", "set train.compile=false")
        return self

    @model_validator(mode="after")
    def _adapter_fits(self) -> Self:
        if self.adapter is None:
            return self
        if self.adapter.quantize == "nf4" and not self.scaling.gpus_per_worker:
            raise SettingError(
                "adapter.quantize=nf4 needs a GPU (gpus_per_worker is 0)",
                "set train.scaling.gpus_per_worker=1, or train.adapter.quantize=none",
            )
        if self.adapter.quantize == "nf4" and self.zero_stage == 3:
            raise SettingError(
                "adapter.quantize=nf4 stores weights in a form that zero_stage=3 cannot shard",
                "set train.zero_stage=2: each worker holds the whole model, in 4 bits",
            )
        if self.adapter.method == "dora" and self.zero_stage == 3:
            raise SettingError(
                "adapter.method=dora needs whole weights for their norms, and zero_stage=3 shards them",
                "set train.zero_stage=2, or train.adapter.method=rslora",
            )
        return self
