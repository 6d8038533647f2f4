"""Models of true shapes with random weights, rows for them, and what a token of a training step costs.

A speed does not depend on what the weights say, so no weights are read: a model is made where it runs, from a configuration
as its maker publishes it. Experts of a mixture are chosen by the random router, about equally often.
"""

from __future__ import annotations

import argparse
import bisect
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.data.build.pack import Document, pack
from forge_ray.data.dataset.stream import COLUMNS, model_inputs
from forge_ray.models.architecture import model_class
from forge_ray.train.adapter import active_share, is_expert
from forge_ray.train.plan import OUTSIDE, Memory, Model, memory

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def dense(hidden: int, wide: int, layers: int, heads: int, keys: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    numbers = (hidden, wide, layers, heads, keys, vocabulary, tied)
    return dict(zip((*names, "vocab_size", "tie_word_embeddings"), numbers, strict=True))


# model_type of transformers, and what differs from the defaults of its configuration
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("llama", dense(64, 128, 2, 2, 1, 512, False)),
    "tiny-mixture": (
        "mistral4",
        dense(64, 128, 2, 2, 2, 512, False)
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32},
    ),
    "smollm2-135m": ("llama", dense(576, 1536, 30, 9, 3, 49152, True)),
    "llama-3.2-1b": ("llama", dense(2048, 8192, 16, 32, 8, 128256, True)),
    "llama-3.2-3b": ("llama", dense(3072, 8192, 28, 24, 8, 128256, True)),
    "llama-3.1-8b": ("llama", dense(4096, 14336, 32, 32, 8, 128256, False)),
    "qwen2.5-7b": ("qwen2", dense(3584, 18944, 28, 28, 4, 152064, False)),  # with biases on queries, keys and values
    "mistral-small-4": ("mistral4", {}),  # transformers' defaults are this model: 36 layers, 128 experts of which 4
}


def configuration(shape: str, layers: int = 0, length: int = 4096) -> Any:
    """Of transformers; `layers` 0: as many as the shape has. Raises ValueError where this transformers lacks the model."""
    from transformers import AutoConfig

    kind, settings = SHAPES[shape]
    cut = {"num_hidden_layers": layers} if layers else {}
    longest = {"max_position_embeddings": length} if kind in ("llama", "qwen2") else {}
    return AutoConfig.for_model(kind, **settings | cut | longest)


def plan_model(config: Any) -> Model:
    """What `forge plan` sees of a configuration. The folder stays: counting an adapter opens it once more."""
    folder = Path(tempfile.mkdtemp(prefix="bench-shape-"))
    config.save_pretrained(folder)
    return Model.of(folder)


def random_model(config: Any, precision: str, device: torch.device, attention: str, cache: bool = False) -> Any:
    """The model on `device`, its weights drawn there; the same for the same configuration."""
    config.use_cache = cache
    torch.manual_seed(0)
    with torch.device(device):
        return model_class(config)._from_config(config, attn_implementation=attention, dtype=DTYPES[precision])


def quantise(model: Any) -> int:
    """Every linear layer but the output in 4 bits, as `train.adapter.quantize=nf4` opens a folder; returns how many."""
    import bitsandbytes as bnb
    from torch import nn

    layers = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    layers = [(name, module) for name, module in layers if module is not model.get_output_embeddings()]
    for name, module in layers:
        has_bias, device = module.bias is not None, module.weight.device
        narrow = bnb.nn.Linear4bit(
            module.in_features, module.out_features, has_bias, torch.bfloat16, quant_type="nf4", device="meta"
        )
        narrow.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=narrow)
        narrow.bias = module.bias
        model.set_submodule(name, narrow.to(device))
    model.is_loaded_in_4bit = True  # by which PEFT knows it
    return len(layers)


def random_batch(options: argparse.Namespace, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    """One step's rows, filled with documents of one length."""
    length = min(options.document_length, options.sequence_length)
    rows = options.micro_batch_size * options.num_micro_batches
    count = rows * (options.sequence_length // length)
    random = np.random.default_rng(0)
    trained = max(1, round(length * options.trained_share))
    mask = [0] * (length - trained) + [1] * trained
    packed_rows = pack(
        [Document("", random.integers(0, vocabulary, length), mask) for _ in range(count)], options.sequence_length, 0
    )
    arrays = {name: np.stack([getattr(row, name) for row in packed_rows]) for name in COLUMNS}
    return {name: torch.from_numpy(value).to(device) for name, value in model_inputs(arrays).items()}


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of one token; the formula is in `train_step.py`."""

    layers: float
    output: float
    attention: float

    def step(self, is_adapter: bool, trained_share: float) -> float:
        forward = self.layers + trained_share * self.output + self.attention
        return forward * (2 if is_adapter else 3)


def flops(model: Model, document_length: int) -> Flops:
    """By the shapes of the weights: 2 a weight that a token passes, and attention to half of its document."""
    config, share = model.config, active_share(model.config)
    matrices = {
        name: math.prod(shape) * (share if is_expert(name) else 1.0)
        for name, shape in model.shapes.items()
        if len(shape) > 1 and not any(part in name for part in OUTSIDE)
    }
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    width = heads * (head + int(config.get("v_head_dim") or head))  # of scores, and of what is read
    attention = 2 * int(config["num_hidden_layers"]) * width * document_length / 2
    return Flops(2 * sum(matrices.values()), 2 * int(config["hidden_size"]) * int(config["vocab_size"]), attention)


def train_config(options: argparse.Namespace) -> TrainConfig:
    """The settings of a run that takes these steps."""
    settings: dict[str, Any] = {
        "engine": "torch",
        "zero_stage": 0,
        "precision": options.precision,
        "micro_batch_size": options.micro_batch_size,
        "activation_checkpointing": options.activation_checkpointing,
        "scaling": {"gpus_per_worker": int(options.device == "cuda" or options.quantize != "none")},
    }
    if options.lora:
        targets = {"target_parameters": list(EXPERTS)} if options.experts else {}
        settings["adapter"] = {"r": options.lora, "quantize": options.quantize} | targets
    return parse(TrainConfig, settings)


def predicted(model: Model, options: argparse.Namespace, trained_share: float) -> Memory:
    """`forge plan`'s estimate for these steps."""
    return memory(model, train_config(options), options.precision, options.sequence_length, 1, trained_share)


def fitting_layers(options: argparse.Namespace, limit: float) -> int:
    """The most layers of the shape whose training fits into `limit` bytes by `forge plan`'s estimate. Raises SystemExit
    where not even one does."""
    most = int(configuration(options.shape).num_hidden_layers)

    def needs(layers: int) -> int:
        return predicted(plan_model(configuration(options.shape, layers)), options, options.trained_share).total

    fitting = bisect.bisect_right(range(1, most + 1), limit, key=needs)
    if not fitting:
        raise SystemExit(f"{options.shape}: one layer needs {needs(1) / 2**30:.1f} GiB of {limit / 2**30:.1f}")
    return fitting
