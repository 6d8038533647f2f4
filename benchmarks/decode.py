"""Prefill and decode of an engine with random weights of a true shape, and what share of the memory's bandwidth it reaches.

    python benchmarks/decode.py                                              tiny, on the CPU
    python benchmarks/decode.py --shape llama-3.1-8b --device cuda --precision bf16
    python benchmarks/decode.py … --engine vllm                              vLLM alone, its weights drawn by itself

Of `--requests` at once with `--prompt` tokens each: prefill is the tokens of the prompts over the time to one new token; a
decoding step is what each further token takes. Every round has prompts of its own, so no cached prefix answers. A step
cannot be faster than the memory is read once:

    limit s = (weights without the input embedding + key-value cache of all requests) ÷ bandwidth of the card's data sheet
    share   = limit s ÷ measured s of a decoding step
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Generate = Callable[[list[list[int]], int], int]  # (prompts, new tokens each) → new tokens


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", help="of random_models.py")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--requests", default="1,16,64")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="the median counts")
    return parser.parse_args()


def transformers_engine(options: argparse.Namespace, shape: Any, most: int) -> tuple[Generate, Callable[[], None]]:
    import torch
    from random_models import random_model

    from forge_ray.config.release import EngineConfig
    from forge_ray.inference.engine import GenerationRequest
    from forge_ray.inference.transformers_engine import TransformersEngine

    page = 32
    length = options.prompt + options.new_tokens
    config = EngineConfig(
        precision=options.precision,
        page_size=page,
        num_blocks=(-(-length // page) + 1) * most + 8,
        max_batch_tokens=max(512, min(8192, options.prompt * most)),
        max_running=most,
        max_adapters=0,
    )
    model = random_model(shape, options.precision, torch.device(options.device), "sdpa", cache=True)
    engine = TransformersEngine(model.eval().requires_grad_(False), config, "random weights have no tokenizer")

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        requests = [GenerationRequest(tuple(prompt), new_tokens) for prompt in prompts]
        return sum(len(generation.token_ids) for generation in engine.generate(requests))

    return generate, engine.close


def vllm_engine(options: argparse.Namespace, shape: Any, most: int) -> tuple[Generate, Callable[[], None]]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if options.device == "cpu":
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM, SamplingParams

    folder = tempfile.mkdtemp(prefix="bench-vllm-")
    shape.architectures = [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[shape.model_type]]
    shape.save_pretrained(folder)
    llm: Any = LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16" if options.precision == "bf16" else "float32",
        max_model_len=options.prompt + options.new_tokens,
        max_num_seqs=most,
        enable_prefix_caching=False,
        enforce_eager=options.device == "cpu",
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        how = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate, lambda: None


def cache_bytes(shape: Any, width: int) -> int:
    """Of one token in the key-value cache, `width` bytes a number."""
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return int(2 * shape.num_hidden_layers * shape.num_key_value_heads * head * width)


def main() -> None:
    options = arguments()
    from random_models import configuration, plan_model

    from forge_ray.machine.hardware import gpu_named

    counts = [int(count) for count in options.requests.split(",")]
    shape = configuration(options.shape, length=options.prompt + options.new_tokens)
    model, width = plan_model(shape), {"bf16": 2, "fp32": 4}[options.precision]
    embedding = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    random = np.random.default_rng(0)
    start = {"transformers": transformers_engine, "vllm": vllm_engine}[options.engine]
    generate, close = start(options, shape, max(counts))
    device = "CPU"
    if options.device == "cuda":
        import torch

        device = torch.cuda.get_device_name()
    gpu = gpu_named(device)
    report: dict[str, Any] = {"shape": options.shape, "engine": options.engine, "device": device, "requests": {}}
    try:
        for count in counts:
            generate(
                random.integers(10, shape.vocab_size, (count, options.prompt)).tolist(), 2
            )  # what is compiled at first use
            seconds: dict[int, list[float]] = {1: [], options.new_tokens: []}
            for _ in range(options.rounds):
                for new_tokens, spent in seconds.items():
                    prompts = random.integers(10, shape.vocab_size, (count, options.prompt)).tolist()
                    begun = time.perf_counter()
                    generated = generate(prompts, new_tokens)
                    spent.append(time.perf_counter() - begun)
                    if generated != count * new_tokens:
                        raise SystemExit(f"{count} requests of {new_tokens} tokens gave {generated}")
            first, whole = (statistics.median(spent) for spent in seconds.values())
            step = (whole - first) / (options.new_tokens - 1)
            context = options.prompt + options.new_tokens / 2
            read = width * (model.num_parameters - embedding) + count * context * cache_bytes(shape, width)
            report["requests"][str(count)] = {
                "prefill_tokens_per_s": count * options.prompt / first,
                "decode_tokens_per_s": count / step if step > 0 else None,  # toy sizes are lost in the noise
                "decode_step_ms": step * 1e3,
                "limit_ms": read / gpu.bandwidth * 1e3 if gpu else None,
                "share_of_bandwidth": read / gpu.bandwidth / step if gpu and step > 0 else None,
            }
    finally:
        close()
    print(json.dumps(report, indent=2), flush=True)


if __name__ == "__main__":
    main()
