"""How fast one training step is on one device: random weights of true shapes; no data, no network, no Ray, no DeepSpeed.

    python benchmarks/train_step.py                                       tiny, on the CPU, in seconds
    python benchmarks/train_step.py --shape llama-3.1-8b --device cuda --precision bf16 --lora 16 --sequence-length 4096 \\
        --document-length 1024 --micro-batch-size 2 --compile --method forge,trl
    the same with --shape qwen2.5-7b; with --shape llama-3.2-1b and no --lora for a full fine-tune on one GPU
    (a full fine-tune of 8 B weights keeps 12 bytes of each beside the weights: more than one GPU has)
    --shape mistral-small-4 --layers fit --experts --activation-checkpointing     as many layers as fit, LoRA on the experts

The step is the recipe's: packed rows laid end to end, attention inside documents, logits at trained positions only, the same
engine. `trl` is TRL's SFTTrainer on the same rows and the same kind of weights (`padding_free`; `--peer-attention` names its
attention). Each method is a process of its own; the last line is the ratio. `memory` sets the peak against the estimate of
`forge plan`; on the CPU the peak of the process counts, less what it held before the model.

Model FLOPs per token, for P weights in matrix products (embedding look-up not counted, output projection counted on the
trained share s of the positions, of routed experts those that a token is sent to), L layers, H heads of size D and documents
of d tokens:

    forward  = 2 P_layers + 2 s P_output + 4 L H D (d / 2)       causal attention sees half of its document on average
    step     = 3 × forward for a full fine-tune; 2 × forward for LoRA, whose frozen weights need no gradient
    MFU      = step × tokens/s ÷ peak                            recomputation is work, not model FLOPs: never counted
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from plan import resident
from random_models import (
    DTYPES,
    SHAPES,
    configuration,
    fitting_layers,
    flops,
    plan_model,
    predicted,
    quantise,
    random_batch,
    random_model,
    train_config,
)
from reports import last_object

from forge_ray.machine.hardware import gpu_named

FIT_SHARE = 0.85  # of a GPU's memory, for `--layers fit`


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", default="all", help="all, a number, or fit: as many as `forge plan` says fit (on a GPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--document-length", type=int, default=64)
    parser.add_argument("--trained-share", type=float, default=0.5, help="share of each document's tokens that are trained")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--num-micro-batches", type=int, default=4, help="per step: gradient accumulation")
    parser.add_argument("--lora", type=int, default=0, metavar="R", help="0: full fine-tune")
    parser.add_argument("--experts", action="store_true", help="LoRA on the routed experts too")
    parser.add_argument("--quantize", choices=("none", "nf4"), default="none", help="the base in 4 bits; needs bitsandbytes")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="blocks through torch.compile, as train.compile does")
    parser.add_argument(
        "--deterministic", action="store_true", help="torch's deterministic kernels; a run does not set them"
    )
    parser.add_argument("--repeat", type=int, default=0, help="train so often from the start, with digests of the weights")
    parser.add_argument("--method", default="forge", help="forge, trl, or both: forge,trl")
    parser.add_argument("--peer-attention", default="sdpa", help="TRL's attn_implementation, e.g. flash_attention_2")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-tflops", type=float, default=0, help="of the device, for MFU; known for data centre GPUs")
    return parser.parse_args()


def forge(options: argparse.Namespace) -> dict[str, Any]:
    """The report of one training; with `--repeat` of the last one, and the digests of all."""
    notes, digests = prepare(options), []
    for _ in range(max(1, options.repeat)):
        gc.collect()
        report, engine = training(options)
        if options.repeat:
            digests.append(digest_of(engine.weights(trained_only=True)))
        del engine
    report["notes"] = notes + report["notes"]
    return report | ({"weights_sha256": digests} if digests else {})


def training(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """From new weights; (its report, the engine with the trained ones)."""
    from older_torch import bridge

    from forge_ray.train import attention, lora
    from forge_ray.train.adapter import with_adapter
    from forge_ray.train.context import join
    from forge_ray.train.engine import TorchEngine
    from forge_ray.train.methods import sft
    from forge_ray.train.model import compile_blocks

    context = join(options.device == "cuda", options.threads, under_ray=False)
    notes = bridge()
    shape = configuration(options.shape, num_layers(options), options.sequence_length)
    batch = random_batch(options, shape.vocab_size, context.device)
    before = start_of_peak(options)
    # as `load_for_training`, whose weights come out of a folder
    model = random_model(shape, options.precision, context.device, attention.register())
    config = train_config(options)
    if options.quantize != "none":
        quantise(model)
    if options.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.adapter:
        model = with_adapter(model, config.adapter)
        lora.fuse(model, config)
        if options.activation_checkpointing:
            model.enable_input_require_grads()
    if options.compile:
        compile_blocks(model)
    engine = TorchEngine(model.train(), config)

    parts = [
        {name: value[start : start + options.micro_batch_size] for name, value in batch.items()}
        for start in range(0, len(batch["input_ids"]), options.micro_batch_size)
    ]
    num_trained = int(batch["loss_mask"].sum())

    def now() -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    spent: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        for step in range(options.warmup + options.steps):
            seconds, total = dict.fromkeys(spent, 0.0), 0.0
            for number, part in enumerate(parts):
                started = now()
                loss = sft.loss(engine.forward, part).loss
                middle = now()
                engine.backward(loss / num_trained, is_last=number == len(parts) - 1)
                seconds["forward"] += middle - started
                seconds["backward"] += now() - middle
                total += float(loss.detach())
            started = now()
            engine.step(1e-5)
            seconds["optimizer"] = now() - started
            losses.append(total / num_trained)
            if step >= options.warmup:
                for name, value in seconds.items():
                    spent[name].append(value)
    notes += sorted({str(one.message).split(". ")[0] for one in caught if "deterministic" in str(one.message)})

    totals = [sum(values) for values in zip(*spent.values(), strict=True)]
    report = result(options, shape, totals, batch, before) | {"losses": [losses[0], losses[-1]], "notes": notes}
    report["split_s"] = {name: statistics.median(values) for name, values in spent.items()}
    return report, engine


def prepare(options: argparse.Namespace) -> list[str]:
    """Before CUDA starts; returns what is worth saying."""
    if options.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)
        return ["torch's deterministic kernels"]
    return []


def num_layers(options: argparse.Namespace) -> int:
    """0: all of the shape."""
    if options.layers == "all":
        return 0
    if options.layers != "fit":
        return int(options.layers)
    if options.device != "cuda":
        raise SystemExit("--layers fit asks a GPU for its memory; give a number on the CPU")
    return fitting_layers(options, FIT_SHARE * torch.cuda.mem_get_info()[1])


def start_of_peak(options: argparse.Namespace) -> int:
    """The peak counts from here, less these bytes."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0
    import peft  # noqa: F401  (so that it is in what the libraries take)

    held = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return held


def digest_of(weights: dict[str, torch.Tensor]) -> str:
    sum_of = hashlib.sha256()
    for name, value in sorted(weights.items()):
        sum_of.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return sum_of.hexdigest()


def result(
    options: argparse.Namespace, shape: Any, totals: list[float], batch: dict[str, torch.Tensor], before: int
) -> dict[str, Any]:
    num_tokens, num_trained = int((batch["segment_ids"] > 0).sum()), int(batch["loss_mask"].sum())
    share, model = num_trained / num_tokens, plan_model(shape)
    counted = flops(model, min(options.document_length, options.sequence_length))
    median, per_token = statistics.median(totals), counted.step(bool(options.lora), share)
    rate = num_tokens / median
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    gpu = gpu_named(device)
    peak = options.peak_tflops or (gpu.flops / 1e12 if gpu else 0.0)
    measured = torch.cuda.max_memory_allocated() if options.device == "cuda" else resident("VmHWM") - before
    estimate = predicted(model, options, share).total
    return {
        "shape": options.shape,
        "layers": shape.num_hidden_layers,
        "parameters": model.num_parameters,
        "method": f"lora r={options.lora}" if options.lora else "full",
        "precision": options.precision,
        "compiled": options.compile,
        "device": device,
        "torch": torch.__version__,
        "tokens_per_step": num_tokens,
        "trained_tokens_per_step": num_trained,
        "step_s": {"median": median, "min": min(totals), "max": max(totals)},
        "tokens_per_s": rate,
        "trained_tokens_per_s": num_trained / median,
        "model_tflops_per_s": per_token * rate / 1e12,
        "mfu": per_token * rate / (peak * 1e12) if peak else None,
        "mfu_formula": f"{per_token:.4g} FLOPs/token × tokens/s ÷ {peak:g} TFLOPS" if peak else "give --peak-tflops",
        "peak_memory_gib": measured / 2**30,
        "memory": {
            "predicted_gib": estimate / 2**30,
            "measured_gib": measured / 2**30,
            "ratio": estimate / max(measured, 1),
        },
    }


def main() -> None:
    options = arguments()
    methods = options.method.split(",")
    if methods == ["trl"]:
        from trl_step import trl

        print(json.dumps(trl(options), indent=2, ensure_ascii=False))
        return
    if methods == ["forge"]:
        print(json.dumps(forge(options), indent=2, ensure_ascii=False))
        return
    rates = {}
    for method in methods:
        command = [sys.executable, *sys.argv, "--method", method]  # the later option counts
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        report = last_object(done.stdout)
        print(f"{method}: {json.dumps(report, indent=2, ensure_ascii=False)}")
        rates[method] = report["tokens_per_s"]
    print(f"forge / trl: {rates['forge'] / rates['trl']:.2f}")


if __name__ == "__main__":
    main()
