"""How fast one training step is on one device: random weights of true shapes; no data, no network, no Ray, no DeepSpeed.

    python benchmarks/train_step.py                                       tiny, on the CPU, in seconds
    python benchmarks/train_step.py --shape llama-3.1-8b --device cuda --precision bf16 --lora 16 --sequence-length 4096 \\
        --document-length 1024 --micro-batch-size 2 --compile --method forge,trl
    the same with --shape qwen2.5-7b; with --shape llama-3.2-1b and no --lora for a full fine-tune on one GPU
    (a full fine-tune of 8 B weights keeps 12 bytes of each beside the weights: more than one GPU has)

The step is the recipe's: packed rows laid end to end, attention inside documents, logits at trained positions only, the same
engine. `trl` is TRL's SFTTrainer on the same rows and the same kind of weights (`padding_free`; `--peer-attention` names its
attention). Each method is a process of its own; the last line is the ratio.

Model FLOPs per token, for P weights in matrix products (embedding look-up not counted, output projection counted on the
trained share s of the positions), L layers, H heads of size D and documents of d tokens:

    forward  = 2 P_layers + 2 s P_output + 4 L H D (d / 2)       causal attention sees half of its document on average
    step     = 3 × forward for a full fine-tune; 2 × forward for LoRA, whose frozen weights need no gradient
    MFU      = step × tokens/s ÷ peak                            recomputation is work, not model FLOPs: never counted
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch

from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.data.build.pack import Document, pack
from forge_ray.data.dataset.stream import COLUMNS, model_inputs
from forge_ray.train import attention
from forge_ray.train.context import join
from forge_ray.train.engine import TorchEngine
from forge_ray.train.methods import sft
from forge_ray.train.model import DTYPES, compile_blocks, with_adapter

# hidden, intermediate, layers, heads, key/value heads, vocabulary, embeddings tied to the output
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512, False),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256, True),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256, False),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),  # with biases on queries, keys and values
}
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0}  # dense bf16, SXM data sheets


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--document-length", type=int, default=64)
    parser.add_argument("--trained-share", type=float, default=0.5, help="share of each document's tokens that are trained")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--num-micro-batches", type=int, default=4, help="per step: gradient accumulation")
    parser.add_argument("--lora", type=int, default=0, metavar="R", help="0: full fine-tune")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="blocks through torch.compile, as train.compile does")
    parser.add_argument("--method", default="forge", help="forge, trl, or both: forge,trl")
    parser.add_argument("--peer-attention", default="sdpa", help="TRL's attn_implementation, e.g. flash_attention_2")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-tflops", type=float, default=0, help="of the device, for MFU; known for H100, H200 and A100")
    return parser.parse_args()


def random_model(options: argparse.Namespace, device: torch.device, attn_implementation: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[options.shape]
    kinds: tuple[Any, Any] = (LlamaConfig, LlamaForCausalLM)
    if options.shape.startswith("qwen"):
        kinds = (Qwen2Config, Qwen2ForCausalLM)
    config = kinds[0](
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=options.sequence_length,
        use_cache=False,
        attn_implementation=attn_implementation,
        dtype=DTYPES[options.precision],
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = kinds[1]._from_config(config)
    return model.train()


def random_batch(options: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    """One step's rows, filled with documents of one length."""
    length, vocabulary = min(options.document_length, options.sequence_length), SHAPES[options.shape][5]
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


def flops_per_token(model: Any, options: argparse.Namespace, trained_share: float) -> float:
    """By the formula above."""
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    kv_width, width = head * config.num_key_value_heads, head * config.num_attention_heads
    layer = config.hidden_size * (2 * width + 2 * kv_width) + 3 * config.hidden_size * config.intermediate_size
    output = trained_share * config.hidden_size * config.vocab_size
    attention = 4 * config.num_hidden_layers * width * min(options.document_length, options.sequence_length) / 2
    forward = 2 * (config.num_hidden_layers * layer + output) + attention
    return forward * (2 if options.lora else 3)


def forge(options: argparse.Namespace) -> dict[str, Any]:
    context = join(options.device == "cuda", options.threads, under_ray=False)
    model = random_model(options, context.device, attention.register())
    settings: dict[str, Any] = {"engine": "torch", "zero_stage": 0, "precision": options.precision}
    if options.lora:
        settings["adapter"] = {"r": options.lora}
    config = parse(TrainConfig, settings)
    if options.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base = model
    if config.adapter:
        model = with_adapter(model, config.adapter)
        if options.activation_checkpointing:
            model.enable_input_require_grads()
    if options.compile:
        compile_blocks(model)
    engine = TorchEngine(model.to(context.device), config)

    batch = random_batch(options, context.device)
    parts = [
        {name: value[start : start + options.micro_batch_size] for name, value in batch.items()}
        for start in range(0, len(batch["input_ids"]), options.micro_batch_size)
    ]
    num_tokens = int((batch["segment_ids"] > 0).sum())
    num_trained = int(batch["loss_mask"].sum())

    def now() -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    spent: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(options.warmup + options.steps):
        seconds = dict.fromkeys(spent, 0.0)
        for number, part in enumerate(parts):
            started = now()
            loss = sft.loss(engine.forward, part).loss
            middle = now()
            engine.backward(loss / num_trained, is_last=number == len(parts) - 1)
            seconds["forward"] += middle - started
            seconds["backward"] += now() - middle
        started = now()
        engine.step(1e-5)
        seconds["optimizer"] = now() - started
        if step >= options.warmup:
            for name, value in seconds.items():
                spent[name].append(value)

    totals = [sum(values) for values in zip(*spent.values(), strict=True)]
    split = {name: statistics.median(values) for name, values in spent.items()}
    return result(options, base, totals, num_tokens, num_trained) | {"split_s": split}


def trl(options: argparse.Namespace) -> dict[str, Any]:
    """TRL's trainer on the same rows: its own loss, accumulation and optimizer."""
    import tempfile

    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    model = random_model(options, device, options.peer_attention)
    batch = random_batch(options, torch.device("cpu"))
    examples = []
    for ids, mask, segments in zip(*(batch[name].tolist() for name in COLUMNS), strict=True):
        used = sum(segment > 0 for segment in segments)
        labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
        sizes = [segments.count(number) for number in range(1, max(segments) + 1)]
        examples.append({"input_ids": ids[:used], "labels": labels[:used], "seq_lengths": sizes})
    moments: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if options.device == "cuda":
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

    steps = options.warmup + options.steps
    with tempfile.TemporaryDirectory(prefix="bench-trl-") as folder:
        args = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=options.micro_batch_size,
            gradient_accumulation_steps=options.num_micro_batches,
            max_steps=steps,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            gradient_checkpointing=options.activation_checkpointing,
            padding_free=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            logging_steps=steps,
            report_to=[],
            save_strategy="no",
            use_cpu=options.device == "cpu",
            bf16=options.precision == "bf16",
            torch_compile=options.compile,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        lora = LoraConfig(r=options.lora, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list(examples * steps),
            processing_class=tokenizer(),
            peft_config=lora if options.lora else None,
            callbacks=[Clock()],
        )
        trainer.train()
    totals = [after - before for before, after in itertools.pairwise(moments)][-options.steps :]
    num_tokens, num_trained = int((batch["segment_ids"] > 0).sum()), int(batch["loss_mask"].sum())
    return result(options, model, totals, num_tokens, num_trained)


def tokenizer() -> Any:
    """TRL wants one; nothing is tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<pad>")


def result(
    options: argparse.Namespace, model: Any, totals: list[float], num_tokens: int, num_trained: int
) -> dict[str, Any]:
    median = statistics.median(totals)
    rate, per_token = num_tokens / median, flops_per_token(model, options, num_trained / num_tokens)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    peak = options.peak_tflops or next((value for name, value in PEAK_TFLOPS.items() if name in device), 0.0)
    return {
        "shape": options.shape,
        "parameters": sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name),
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
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None,
    }


def main() -> None:
    options = arguments()
    methods = options.method.split(",")
    if len(methods) == 1:
        print(json.dumps({"forge": forge, "trl": trl}[methods[0]](options), indent=2, ensure_ascii=False))
        return
    rates = {}
    for method in methods:
        command = [sys.executable, *sys.argv, "--method", method]  # the later option counts
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        report = done.stdout[done.stdout.rindex("\n{\n") if "\n{\n" in done.stdout else 0 :]
        print(f"{method}: {report.strip()}")
        rates[method] = json.loads(report)["tokens_per_s"]
    print(f"forge / trl: {rates['forge'] / rates['trl']:.2f}")


if __name__ == "__main__":
    main()
