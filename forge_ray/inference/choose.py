"""The engine that a configuration names (level 2). Each engine is imported only where it is the one."""

from __future__ import annotations

from pathlib import Path

from forge_ray.config.release import EngineConfig
from forge_ray.inference.engine import Engine


def open_engine(model_dir: Path, adapter_dir: Path | None, config: EngineConfig, use_gpu: bool | None = None) -> Engine:
    """Load safetensors from local folders and start generating; `adapter_dir`: a PEFT folder on top of the weights.

    `EngineError` where the engine cannot start, `PolicyError` for weights that are not safetensors.
    """
    match config.kind:
        case "transformers":
            from forge_ray.inference.transformers_engine import load_engine

            return load_engine(model_dir, adapter_dir, config, use_gpu)
        case "vllm":
            from forge_ray.inference.vllm_engine import load_vllm_engine

            return load_vllm_engine(model_dir, adapter_dir, config, use_gpu)
