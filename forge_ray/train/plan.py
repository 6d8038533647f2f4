"""What a run will take, before anything is taken: steps, tokens, memory per worker, disk.

Memory is counted tensor by tensor, by the formulas below; `benchmarks/plan.py` holds it against what runs measure. Bytes; w
is the bytes of a weight (2 for bf16, 4 for fp32), N the number of workers, P all weights, T the trained ones.

    weights       w P, at ZeRO stage 3 w P / N; linear layers in 4 bits: `NF4` of a byte for each of their weights
    gradients     engine torch: 4 T in which passes are summed; ZeRO: see `_states`
    optimizer     fp32 copy 4 T (under bf16) and AdamW's moments 8 T; ZeRO 1 to 3: 12 T / N; others: see `_moments`
    host          what is offloaded is in main memory instead: gradients, optimizer, its step and w T / N; w P / N
    gathered      at stage 3 w times what one pass takes together: 500 million weights, or the experts of a layer if more
    working       the larger of a pass (activations, logits, half of its own gradients: they grow while activations shrink)
                  and the optimizer's step (gradients scaled, 4 T, and two temporaries of the largest weight)
    activations   per layer and token what autograd keeps (`saved_per_token`); with activation checkpointing w times hidden
                  size a layer, and one layer in full; experts that are adapted: a copy of a layer's, w times its experts,
                  for each layer that is kept, and once more for its gradient
    logits        trained positions, times vocabulary, times w: their gradient takes their place
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from forge_ray.config.adapter import Adapter
from forge_ray.config.classify import class_names
from forge_ray.config.distil import Distil
from forge_ray.config.method import Preference
from forge_ray.config.optimizer import Offload
from forge_ray.config.train import TrainConfig
from forge_ray.models.architecture import LM, Head, empty_model, outside_text
from forge_ray.records import DatasetManifest
from forge_ray.train.activations import heads_of, saved_per_token
from forge_ray.train.adapter import Coverage, active_share, coverage, is_expert, saved_modules, with_adapter
from forge_ray.train.freezing import freeze_weights, frozen_names
from forge_ray.train.moe import routers
from forge_ray.train.schedule import num_steps
from forge_ray.train.stated import Stated

BYTES = {"bf16": 2, "fp32": 4}
BUCKET = 500_000_000  # elements that DeepSpeed reduces or gathers at a time, its default
BLOCK, UNBLOCKED = 256, 4096  # weights that share a scale in 8 bits; those of smaller tensors stay in fp32 (bitsandbytes)
PERSISTENT = 100_000  # elements of a weight that ZeRO-3 leaves on the GPU, its default
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight: itself, a byte for 64 of them, 4 bytes for 256 of those
OUTSIDE = ("embed", "lm_head", "norm")  # weights of two dimensions that are no linear layer inside a block


@dataclass(frozen=True)
class Model:
    """A model as its `config.json` says: every weight's shape, on no device."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    outside: frozenset[str] = frozenset()  # weights that text does not pass
    routers: frozenset[str] = frozenset()
    head: Head = LM

    @classmethod
    def of(cls, folder: Path, head: Head = LM) -> Model:
        """No weight is read; the folder may hold `config.json` alone."""
        model = empty_model(folder, head)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        not_text, routing = outside_text(model), {id(weight) for router in routers(model) for weight in router.parameters()}
        return cls(
            folder,
            shapes,
            model.config.get_text_config().to_dict(),
            frozenset(name for name in shapes if any(name.startswith(f"{part}.") for part in not_text)),
            frozenset(name for name, parameter in model.named_parameters() if id(parameter) in routing),
            head,
        )

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_logits(self) -> int:
        """Of a position at which the head is read."""
        return len(class_names(self.head.targets)) or int(self.config["vocab_size"])

    @property
    def num_active(self) -> int:
        """Weights that one token passes: of the routed experts, as many as it is sent to."""
        share = active_share(self.config)
        return round(sum(math.prod(s) * (share if is_expert(name) else 1.0) for name, s in self.shapes.items()))

    @property
    def block(self) -> int:
        """Weights of the routed experts of one layer, which are gathered and adapted as a whole."""
        return _experts(self.shapes) // int(self.config["num_hidden_layers"])

    def coverage(self, adapter: Adapter) -> Coverage:
        """What the adapter reaches. Raises `ConfigError`."""
        return _coverage(self.folder, adapter, self.head)

    def saved(self, adapter: Adapter) -> dict[str, tuple[int, ...]]:
        """Weights that are trained in full next to the adapter, which keeps a copy of the base's."""
        names = _saved(self.folder, adapter, self.head) if adapter.modules_to_save else []
        names += ["score"] if self.head.targets else []
        return {name: shape for name, shape in self.shapes.items() if name.rpartition(".")[0] in names}

    def trained(self, config: TrainConfig) -> dict[str, tuple[int, ...]]:
        """Weights that a full fine-tune changes."""
        still = self.outside | (self.routers if config.router == "frozen" else set())
        still |= _frozen(self.folder, config, self.head) if config.freeze else set()
        return {name: shape for name, shape in self.shapes.items() if name not in still}

    def num_trained(self, config: TrainConfig) -> int:
        """Weights that the optimizer changes."""
        if config.adapter is None:
            return sum(math.prod(shape) for shape in self.trained(config).values())
        return self.coverage(config.adapter).trained


@functools.lru_cache(maxsize=64)
def _coverage(folder: Path, adapter: Adapter, head: Head) -> Coverage:
    with torch.device("meta"):  # the adapter too: that of a large mixture's experts is gigabytes
        return coverage(with_adapter(empty_model(folder, head), adapter, head), adapter)


@functools.lru_cache(maxsize=64)
def _saved(folder: Path, adapter: Adapter, head: Head) -> list[str]:
    return saved_modules(empty_model(folder, head), adapter)


@functools.lru_cache(maxsize=64)
def _frozen(folder: Path, config: TrainConfig, head: Head) -> frozenset[str]:
    model = empty_model(folder, head)
    freeze_weights(model, config)
    return frozen_names(model)


def _experts(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if is_expert(name))


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker at the moment when it needs most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int
    host: int = 0  # in main memory, beside the GPU: what is offloaded; not part of `total`

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.working


def memory(
    model: Model, config: TrainConfig, precision: str, sequence_length: int, num_workers: int, trained_share: float = 1.0
) -> Memory:
    """`trained_share`: of a row's positions, those at which logits are computed."""
    w, trained = BYTES[precision], model.num_trained(config)
    assert isinstance(config.micro_batch_size, int), "whoever plans has decided what auto means (`micro_batch.largest_pass`)"
    tokens = sequence_length * config.micro_batch_size // config.sequence_parallel
    activations = _activations(model, config, w, tokens)
    logits = int(tokens * trained_share) * model.num_logits * w
    weights, gradients, optimizer, of_a_pass, of_a_step = _states(model, config, w, trained, num_workers)
    host = 0
    if config.offload.optimizer != "none":  # the step, its gradients and the trained weights that it sends back
        host += gradients + optimizer + of_a_step + w * -(-trained // num_workers)
        gradients, optimizer, of_a_step = 0, 0, 0
    if config.offload.parameters != "none":
        on_gpu = min(weights, w * sum(size for size in map(math.prod, model.shapes.values()) if size <= PERSISTENT))
        host, weights = host + weights - on_gpu, on_gpu
    working = max(activations + logits + of_a_pass, of_a_step)
    return Memory(weights, gradients, optimizer, activations, logits, working, host)


def _states(model: Model, config: TrainConfig, w: int, trained: int, workers: int) -> tuple[int, int, int, int, int]:
    """(weights, gradients, optimizer, what a pass adds, what the optimizer's step adds)."""
    weights = _base(model, config, w) + (w * trained if config.adapter else 0)
    full = model.saved(config.adapter) if config.adapter else model.trained(config)
    largest = max((math.prod(shape) for shape in full.values()), default=0)  # of an adapter's own: next to nothing
    if config.engine == "torch":
        states = (4 * trained if w == 2 else 0) + _moments(model, config)
        temporaries = {"adamw": 8, "adamw_8bit": 0, "adafactor": 12}[config.optimizer.name] * largest
        return weights, 4 * trained, states, w * trained // 2, 4 * trained + temporaries
    if config.zero_stage == 0:
        return weights, w * trained, 8 * trained, 0, 8 * largest
    share, bucket = -(-trained // workers), min(trained, BUCKET)
    cast = 4 * bucket if w == 2 else 0  # gradients are summed over the ranks in fp32
    if config.zero_stage < 3:
        return weights, 4 * share, 12 * share, w * bucket + cast, 4 * share
    gathered = w * max(min(model.num_parameters, BUCKET), model.block)
    return -(-weights // workers), 4 * share, 12 * share, gathered + 2 * w * bucket + 4 * bucket, 4 * share


def _base(model: Model, config: TrainConfig, w: int) -> int:
    """Bytes of the base model's weights; bitsandbytes does not quantise the output."""
    if config.adapter is None or config.adapter.quantize == "none":
        return w * model.num_parameters
    layers = ((name, s) for name, s in model.shapes.items() if len(s) == 2 and name not in model.routers)
    narrow = sum(math.prod(s) for name, s in layers if not any(part in name for part in OUTSIDE))
    return int(w * (model.num_parameters - narrow) + NF4 * narrow)


def _moments(model: Model, config: TrainConfig) -> int:
    """Bytes of what the optimizer keeps of gradients, in fp32: two numbers a weight; adafactor a mean for each row and
    column of a matrix, one number for each other weight; adamw_8bit two bytes a weight and two scales a block."""
    if config.optimizer.name == "adamw":
        return 8 * model.num_trained(config)
    if config.optimizer.name == "adamw_8bit":
        trained, full = model.num_trained(config), model.saved(config.adapter) if config.adapter else model.trained(config)
        in_fp32 = sum(size for size in map(math.prod, full.values()) if size < UNBLOCKED)
        return 2 * (trained - in_fp32) + 2 * 4 * ((trained - in_fp32) // BLOCK) + 8 * in_fp32
    sizes = [(math.prod(shape), shape) for shape in model.trained(config).values()]
    return 4 * sum(size // shape[-1] + size // shape[-2] if len(shape) > 1 else size for size, shape in sizes)


def _activations(model: Model, config: TrainConfig, w: int, tokens: int) -> int:
    layers, hidden = int(model.config["num_hidden_layers"]), int(model.config["hidden_size"])
    per_token, adapted = saved_per_token(model.config, w, bool(config.scaling.gpus_per_worker)), 0
    if any(name.endswith("q_norm.weight") for name in model.shapes):
        per_token += (8 + w) * sum(heads_of(model.config))
    if config.adapter:  # the narrow side of each adapter, and the sum of both paths before the next layer takes it
        coverage = model.coverage(config.adapter)
        of_layers = [one for one in coverage.patterns if one.pattern not in config.adapter.modules_to_save]
        experts = [one for one in of_layers if one.pattern in config.adapter.target_parameters]
        per_token += w * config.adapter.r * sum(one.modules for one in of_layers if one not in experts) / layers
        adapted = w * sum(one.parameters for one in experts) // layers
    if config.activation_checkpointing:
        return int(tokens * (layers * w * hidden + per_token)) + 2 * adapted
    return int(tokens * layers * per_token) + (layers + 1) * adapted


@dataclass(frozen=True)
class Plan:
    """What `forge plan` says."""

    num_parameters: int
    num_active: int
    num_trained: int
    num_rows: int
    num_tokens: int
    num_trained_tokens: int
    steps: int
    epochs: float
    memory: Memory
    checkpoint_bytes: int
    export_bytes: int
    disk_bytes: int
    # of what a frozen model says of the rows, once for a dataset: tokens forward, bytes kept, its weights that a token
    # passes, and memory of a worker, 0 where the model of the start is asked
    reference_tokens: int = 0
    reference_bytes: int = 0
    reference_active: int = 0
    reference_memory: int = 0

    @property
    def worker_bytes(self) -> int:
        """What one worker holds when it holds most: the frozen model is released before the run's own is loaded."""
        return max(self.memory.total, self.reference_memory)


def not_counted(model: Model, config: TrainConfig, precision: str) -> list[str]:
    """Memory that a plan has no formula for, in words; of each, what was measured where (`docs/benchmarks.md`)."""
    lines = []
    if precision == "bf16" and not config.scaling.gpus_per_worker:
        more = "up to twice the sum" if model.num_active < model.num_parameters else "up to 40 % of the sum"
        lines.append(f"kernels that the CPU's library keeps in bf16: {more} was measured in addition")
    if config.zero_stage == 3 and config.adapter and config.adapter.target_parameters:
        lines.append("adapted experts under ZeRO-3: 40 % of the sum was measured in addition")
    return lines


def nearest(
    model: Model,
    config: TrainConfig,
    precision: str,
    dataset: DatasetManifest | Stated,
    num_workers: int,
    limit: int,
    frozen: Model | None = None,
) -> TrainConfig | None:
    """The settings nearest to these that fit into `limit` bytes per worker; None where none do. First what costs least:
    a smaller pass, then recomputed activations, then states divided further (which another run id follows from), then moved
    to main memory."""
    tried = config
    ladder: list[dict[str, Any]] = [{}, {"micro_batch_size": 1}, {"activation_checkpointing": True}]
    if num_workers > 1:
        ladder += [{"engine": "deepspeed", "zero_stage": 2}, {"engine": "deepspeed", "zero_stage": 3}]
    for stage, offload in ((2, {"optimizer": "cpu"}), (3, {"optimizer": "cpu", "parameters": "cpu"})):
        ladder.append({"engine": "deepspeed", "zero_stage": stage, "offload": Offload.model_validate(offload)})
    for change in ladder:
        if change.get("zero_stage", 9) > tried.zero_stage or "zero_stage" not in change or "offload" in change:
            stage = max(tried.zero_stage, change.get("zero_stage", 0))
            changed = tried.model_copy(update=change | {"zero_stage": stage})
            tried = changed if _is_allowed(changed) else tried
        if plan(model, tried, precision, dataset, num_workers, frozen).worker_bytes <= limit:
            return tried
    return None


def _is_allowed(config: TrainConfig) -> bool:
    """A copy is not checked when it is made: DoRA, for one, does not go with ZeRO-3."""
    try:
        TrainConfig.model_validate(config.model_dump())
    except ValidationError:
        return False
    return True


def plan(
    model: Model,
    config: TrainConfig,
    precision: str,
    dataset: DatasetManifest | Stated,
    num_workers: int,
    frozen: Model | None = None,
) -> Plan:
    """`frozen`: the model, besides the one of the start, whose numbers the loss reads."""
    stats = dataset.splits["train"]
    steps = num_steps(config, stats.num_rows)
    epochs = steps * config.global_batch / max(stats.num_rows, 1)
    share = stats.num_trained_tokens / max(stats.num_tokens, 1)
    trained = model.num_trained(config)
    checkpoint = 4 * trained + _moments(model, config) + (BYTES[precision] * trained if config.engine == "deepspeed" else 0)
    is_adapter = config.adapter is not None and config.export == "adapter"
    export = (trained if is_adapter else model.num_parameters) * BYTES[precision]
    return Plan(
        num_parameters=model.num_parameters,
        num_active=model.num_active,
        num_trained=trained,
        num_rows=stats.num_rows,
        num_tokens=round(epochs * stats.num_tokens),
        num_trained_tokens=round(epochs * stats.num_trained_tokens),
        steps=steps,
        epochs=epochs,
        memory=memory(model, config, precision, dataset.sequence_length, num_workers, share),
        checkpoint_bytes=checkpoint,
        export_bytes=export,
        disk_bytes=checkpoint * (config.checkpoint.keep + 1) + export,
        **_reference(config, precision, dataset, frozen),
    )


def _reference(
    config: TrainConfig, precision: str, dataset: DatasetManifest | Stated, frozen: Model | None
) -> dict[str, int]:
    """The fields of a plan about what a frozen model says of the rows."""
    method, splits = config.method, [s for name, s in dataset.splits.items() if name in ("train", "validation")]
    if isinstance(method, Distil):  # ids, log probabilities and positions
        kept = sum(stats.num_trained_tokens for stats in splits) * (8 * method.k + 4)
    elif isinstance(method, Preference) and method.has_reference:
        kept = sum(stats.num_records for stats in splits) * (4 if method.kind == "apo_zero" else 8)
    else:
        return {}
    tokens = sum(stats.num_tokens for stats in splits) * (2 if config.method_name == "kto" else 1)  # with moved answers
    return {
        "reference_tokens": tokens,
        "reference_bytes": kept,
        "reference_active": frozen.num_active if frozen else 0,
        "reference_memory": _forward_bytes(frozen, config, precision, dataset.sequence_length) if frozen else 0,
    }


def _forward_bytes(model: Model, config: TrainConfig, precision: str, tokens: int) -> int:
    """Memory of a model that is asked about one packed row at a time: its weights, what one block computes, and logits, at
    every position in the worst case."""
    w = BYTES[precision]
    block = tokens * saved_per_token(model.config, w, bool(config.scaling.gpus_per_worker))
    return int(w * model.num_parameters + block + w * tokens * model.num_logits)
