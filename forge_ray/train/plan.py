"""What a run will take, before anything is taken: steps, tokens, memory per worker, disk (level 3, no torch).

Memory is counted tensor by tensor, by the formulas below; `benchmarks/plan.py` holds it against what runs measure. Bytes; w
is the bytes of a weight (2 for bf16, 4 for fp32), N the number of workers, P all weights, T the trained ones.

    weights       w P, at ZeRO stage 3 w P / N
    gradients     engine torch: 4 T in which passes are summed; ZeRO: see `_states`
    optimizer     fp32 copy 4 T (under bf16) and AdamW's moments 8 T; ZeRO 1 to 3: 12 T / N
    host          what is offloaded is in main memory instead: gradients, optimizer, its step and w T / N; w P / N
    working       the larger of a pass (activations, logits, half of its own gradients: they grow while activations shrink)
                  and the optimizer's step (gradients scaled, 4 T, and two temporaries of the largest weight)
    activations   per layer and token what autograd keeps (`_saved_per_token`); with activation checkpointing w times hidden
                  size a layer, and one layer in full
    logits        positions at which they are computed, times vocabulary, times 8 (fp32: and their log-softmax), bf16 + 2
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.config.train import Offload, TrainConfig
from forge_ray.records import DatasetManifest
from forge_ray.train.schedule import num_steps

BYTES = {"bf16": 2, "fp32": 4}
BUCKET = 500_000_000  # elements that DeepSpeed reduces or gathers at a time, its default
PERSISTENT = 100_000  # elements of a weight that ZeRO-3 leaves on the GPU, its default
OUTSIDE = ("embed", "lm_head", "norm")  # weights of two dimensions that are no linear layer inside a block


@dataclass(frozen=True)
class Model:
    """A model as its files say: every weight's shape, and the numbers of `config.json`."""

    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Model:
        """From the safetensors headers; no weight is read."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as stream:
                header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(shapes, config.get("text_config") or config)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def linear(self) -> list[tuple[str, int, int]]:
        """(name, outputs, inputs) of the linear layers inside the blocks."""
        return [
            (name, shape[0], shape[1])
            for name, shape in self.shapes.items()
            if len(shape) == 2 and not any(part in name for part in OUTSIDE)
        ]

    def num_trained(self, config: TrainConfig) -> int:
        """Weights that the optimizer changes."""
        if config.adapter is None:
            return self.num_parameters
        wanted = config.adapter.target_modules
        chosen = [
            outputs + inputs
            for name, outputs, inputs in self.linear
            if wanted == "all-linear" or name.removesuffix(".weight").rsplit(".", 1)[-1] in wanted
        ]
        return config.adapter.r * sum(chosen)


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
    tokens = sequence_length * config.micro_batch_size // config.sequence_parallel
    activations = _activations(model, config, w, tokens)
    # a position is computed for all rows of a pass when one of them trains it
    kept = int(tokens * min(1.0, trained_share * config.micro_batch_size))
    logits = kept * int(model.config["vocab_size"]) * (8 + (w if precision == "bf16" else 0))
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
    weights = w * (model.num_parameters + (trained if config.adapter else 0))
    largest = max(math.prod(shape) for shape in model.shapes.values()) if config.adapter is None else 0
    if config.engine == "torch":
        return (
            weights,
            4 * trained,
            (4 * trained if w == 2 else 0) + 8 * trained,
            w * trained // 2,
            4 * trained + 8 * largest,
        )
    if config.zero_stage == 0:
        return weights, w * trained, 8 * trained, 0, 8 * largest
    share, bucket = -(-trained // workers), min(trained, BUCKET)
    cast = 4 * bucket if w == 2 else 0  # gradients are summed over the ranks in fp32
    if config.zero_stage < 3:
        return weights, 4 * share, 12 * share, w * bucket + cast, 4 * share
    gathered = w * min(model.num_parameters, BUCKET)
    return -(-weights // workers), 4 * share, 12 * share, gathered + 2 * w * bucket + 4 * bucket, 4 * share


def _activations(model: Model, config: TrainConfig, w: int, tokens: int) -> int:
    layers, hidden = int(model.config["num_hidden_layers"]), int(model.config["hidden_size"])
    per_token = _saved_per_token(model.config, w)
    if config.adapter:  # the narrow side of each adapter, and the sum of both paths before the next layer takes it
        per_token += w * config.adapter.r * len(model.linear) / layers
    if config.activation_checkpointing:
        return int(tokens * (layers * w * hidden + per_token))
    return int(tokens * layers * per_token)


def _saved_per_token(config: dict[str, Any], w: int) -> float:
    """What autograd keeps of one token in one block: inputs of linear layers, of norms (in fp32), of the activation."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head = int(config.get("head_dim") or hidden // heads)
    queries, keys = heads * head, int(config.get("num_key_value_heads") or heads) * head
    norms = 2 * (2 * 4 * hidden + w * hidden)
    attention = w * (queries + 2 * keys + 2 * queries)
    feed_forward = w * 4 * _width(config)
    return norms + attention + feed_forward


def _width(config: dict[str, Any]) -> float:
    """Intermediate neurons that a token passes: all of a dense block, those of its experts in a mixture."""
    experts = config.get("num_experts_per_tok")
    if not experts or not config.get("moe_intermediate_size"):
        return float(config["intermediate_size"])
    shared = int(config.get("n_shared_experts") or 0)
    return float(config["moe_intermediate_size"]) * (int(experts) + shared)


@dataclass(frozen=True)
class Plan:
    """What `forge plan` says."""

    num_parameters: int
    num_trained: int
    num_rows: int
    num_tokens: int
    num_trained_tokens: int
    steps: int
    epochs: float
    memory: Memory
    checkpoint_bytes: int
    disk_bytes: int


def nearest(
    model: Model, config: TrainConfig, precision: str, dataset: DatasetManifest, num_workers: int, room: int
) -> TrainConfig | None:
    """The settings nearest to these that fit into `room` bytes a worker; None where none do. The first steps cost least: a
    smaller pass, then recomputed activations, then states divided further (which another run id follows from), then moved
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
            tried = tried.model_copy(update=change | {"zero_stage": stage})
        if plan(model, tried, precision, dataset, num_workers).memory.total <= room:
            return tried
    return None


def plan(model: Model, config: TrainConfig, precision: str, dataset: DatasetManifest, num_workers: int) -> Plan:
    stats = dataset.splits["train"]
    steps = num_steps(config, stats.num_rows)
    epochs = steps * config.global_batch / max(stats.num_rows, 1)
    share = stats.num_trained_tokens / max(stats.num_tokens, 1)
    trained = model.num_trained(config)
    checkpoint = trained * (12 + (BYTES[precision] if config.engine == "deepspeed" else 0))
    return Plan(
        num_parameters=model.num_parameters,
        num_trained=trained,
        num_rows=stats.num_rows,
        num_tokens=round(epochs * stats.num_tokens),
        num_trained_tokens=round(epochs * stats.num_trained_tokens),
        steps=steps,
        epochs=epochs,
        memory=memory(model, config, precision, dataset.sequence_length, num_workers, share),
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * (config.checkpoint.keep + 1) + trained * BYTES[precision],
    )
