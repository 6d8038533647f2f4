"""Predicted against measured peak memory of a worker, over a table of configurations.

    python benchmarks/plan.py                     on the CPU: peak resident memory, less what the libraries take
    python benchmarks/plan.py --device cuda       peak of the allocator

Each configuration takes three steps in fresh processes, with random weights. Exit code 1 where one is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPES = {  # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "wide": (768, 2048, 6, 12, 4, 16384),
    "deep": (384, 1024, 16, 6, 6, 8192),
    "speaks": (512, 1408, 4, 8, 2, 65536),
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixture": (
        "Qwen3Moe",
        {
            "hidden_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "intermediate_size": 1024,
            "moe_intermediate_size": 256,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "vocab_size": 8192,
        },
    ),
    "latent": (
        "Mistral4",
        {
            "hidden_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "q_lora_rank": 128,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "moe_intermediate_size": 256,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "vocab_size": 8192,
            "max_position_embeddings": 4096,
        },
    ),
}
TORCH = {"engine": "torch", "zero_stage": 0}
LORA = {"adapter": {"r": 16}}
RECOMPUTED = {"activation_checkpointing": True}
EXPERTS = {"adapter": {"r": 4, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}}
# name: shape, workers, precision, sequence length, settings
CONFIGURATIONS: dict[str, tuple[str, int, str, int, dict[str, Any]]] = {
    "full fp32": ("wide", 1, "fp32", 512, TORCH),
    "full bf16": ("wide", 1, "bf16", 512, TORCH),
    "full bf16, four rows a pass": ("wide", 1, "bf16", 512, TORCH | {"micro_batch_size": 4}),
    "full bf16, checkpointing": ("deep", 1, "bf16", 2048, TORCH | {"activation_checkpointing": True}),
    "lora bf16": ("wide", 1, "bf16", 1024, TORCH | LORA),
    "lora fp32, deep": ("deep", 1, "fp32", 1024, TORCH | LORA),
    "lora bf16, large vocabulary": ("speaks", 1, "bf16", 512, TORCH | LORA),
    "lora fp32, checkpointing": ("deep", 1, "fp32", 2048, TORCH | LORA | {"activation_checkpointing": True}),
    "zero 1, full bf16": ("wide", 2, "bf16", 512, {"zero_stage": 1}),
    "zero 2, full bf16": ("wide", 2, "bf16", 512, {"zero_stage": 2}),
    "zero 3, full bf16": ("wide", 2, "bf16", 512, {"zero_stage": 3}),
    "zero 2, full fp32": ("deep", 2, "fp32", 512, {"zero_stage": 2}),
    "zero 3, full fp32": ("deep", 2, "fp32", 512, {"zero_stage": 3}),
    "zero 2, lora bf16": ("wide", 2, "bf16", 1024, {"zero_stage": 2} | LORA),
    # fp32: in bf16 the CPU's library keeps a kernel for each number of tokens that an expert was ever given
    "mixture, full fp32": ("mixture", 1, "fp32", 1024, TORCH),
    "mixture, lora fp32": ("mixture", 1, "fp32", 2048, TORCH | LORA),
    "latent attention, full fp32": ("latent", 1, "fp32", 512, TORCH),
    "latent attention, lora fp32": ("latent", 1, "fp32", 2048, TORCH | LORA),
    "adapted experts, fp32": ("latent", 1, "fp32", 512, TORCH | EXPERTS),
    "adapted experts, checkpointing": ("latent", 1, "fp32", 2048, TORCH | EXPERTS | RECOMPUTED),
    "zero 3, adapted experts": ("latent", 2, "fp32", 1024, EXPERTS | RECOMPUTED | {"zero_stage": 3}),
}


def worker(name: str, folder: str, device: str) -> None:
    """One rank: three steps, then its peak."""
    import torch

    from forge_ray.config.base import parse
    from forge_ray.config.train import TrainConfig
    from forge_ray.train.context import join
    from forge_ray.train.engine import TorchEngine, TrainEngine
    from forge_ray.train.methods.sft import loss, weight
    from forge_ray.train.model import load_for_training
    from forge_ray.train.zero import ZeroEngine, open_deepspeed

    _, _, precision, length, settings = CONFIGURATIONS[name]
    config = parse(TrainConfig, settings | {"precision": precision})
    context = join(device == "cuda", 1, under_ray=False)
    if config.engine == "deepspeed":
        open_deepspeed()
    import peft  # noqa: F401  (so that it is in what the libraries take)
    from transformers import LlamaForCausalLM, Mistral4ForCausalLM, Qwen3MoeForCausalLM  # noqa: F401

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    model = load_for_training(Path(folder), config, precision, context.device, context.world_size)
    zero = config.engine == "deepspeed"
    engine: TrainEngine = ZeroEngine(model, config, precision) if zero else TorchEngine(model, config)
    assert config.micro_batch_size != "auto"
    ids = torch.randint(0, 1000, (config.micro_batch_size, length), device=context.device)
    positions = torch.arange(length, device=context.device).expand_as(ids)
    batch = {"input_ids": ids, "position_ids": positions, "loss_mask": torch.ones_like(ids)}
    for _ in range(3):
        for last in (False, True):
            engine.backward(loss(engine.forward, batch).loss / weight(batch), is_last=last)
        engine.step(1e-4)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM") - before
    if context.is_first:
        print(json.dumps({"peak": peak}), flush=True)
    os._exit(0)


def resident(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def make_model(shape: str, folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if shape in MIXTURES:
        import transformers

        name, settings = MIXTURES[shape]
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
        model.to(torch.bfloat16).save_pretrained(folder / shape)
        return folder / shape
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / shape)
    return folder / shape


def measure(name: str, folder: Path, device: str) -> int:
    ranks = CONFIGURATIONS[name][1]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    # what is freed goes back at once, so that the peak of the process is the peak of what it holds
    common = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, __file__, "--worker", name, "--folder", str(folder), "--device", device]
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=common | {"RANK": str(rank)}
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate() for process in processes]
    line = next((line for line in outputs[0][0].splitlines() if line.startswith("{")), "")
    if not line:
        raise SystemExit(f"{name} failed:\n{outputs[0][1][-2000:]}")
    return int(json.loads(line)["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="configurations whose name holds this")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.folder, options.device)
    from forge_ray.config.base import parse
    from forge_ray.config.train import TrainConfig
    from forge_ray.train.plan import Model, memory

    worst = 0.0
    print(f"{'configuration, MB':<32} {'predicted':>10} {'measured':>10} {'ratio':>6}   its parts")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {shape: make_model(shape, Path(scratch)) for shape in (*SHAPES, *MIXTURES)}
        for name, (shape, workers, precision, length, settings) in CONFIGURATIONS.items():
            if options.only not in name:
                continue
            on_gpu = {"scaling": {"gpus_per_worker": int(options.device == "cuda")}}
            config = parse(TrainConfig, settings | {"precision": precision} | on_gpu)
            estimate = memory(Model.of(folders[shape]), config, precision, length, workers)
            measured = measure(name, folders[shape], options.device)
            ratio = estimate.total / measured
            worst = max(worst, abs(ratio - 1))
            parts = ", ".join(f"{part} {value / 1e6:.0f}" for part, value in vars(estimate).items())
            print(f"{name:<32} {estimate.total / 1e6:>10.0f} {measured / 1e6:>10.0f} {ratio:>6.2f}   {parts}", flush=True)
    print(f"largest error: {worst:.1%}")
    sys.exit(0 if worst <= 0.15 else 1)


if __name__ == "__main__":
    main()
