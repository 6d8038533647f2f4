"""The engine that a configuration names. Each engine is imported only where it is the one."""

from __future__ import annotations

import shutil
from pathlib import Path

from forge_ray.config.release import EngineConfig
from forge_ray.inference.engine import Engine
from forge_ray.inference.own_process import EngineProcess, ProcessEngine
from forge_ray.machine.hardware import resolve_precision
from forge_ray.store.files import MANIFEST
from forge_ray.store.scratch import scratch


def open_engine(
    model_dir: Path, adapter_dir: Path | None, config: EngineConfig, use_gpu: bool | None = None, merge: bool = False
) -> Engine:
    """Load safetensors from local folders and start generating; `adapter_dir`: a PEFT folder on top of the weights.

    With `merge` the adapter is summed into the weights. `EngineError` where the engine cannot start, `PolicyError` for
    weights that are not safetensors.
    """
    match config.kind:
        case "transformers":
            from forge_ray.inference.load import load_engine

            return load_engine(model_dir, adapter_dir, config, use_gpu, merge)
        case "vllm":
            from forge_ray.inference.vllm_engine import load_vllm_engine

            if adapter_dir is None or not merge:
                return load_vllm_engine(model_dir, adapter_dir, config, use_gpu)
            with scratch("merged") as folder:  # read once, when the engine starts
                write_merged(model_dir, adapter_dir, resolve_precision(config.precision, bool(use_gpu)), folder)
                return load_vllm_engine(folder, None, config, use_gpu)


def begin_beside(config: EngineConfig) -> EngineProcess | None:
    """A process for `open_beside`, begun before it is known which model it will have: its imports take seconds. None for an
    engine that starts its own."""
    return EngineProcess.start() if config.kind == "transformers" else None


def open_beside(
    begun: EngineProcess | None,
    model_dir: Path,
    adapter_dir: Path | None,
    config: EngineConfig,
    use_gpu: bool | None,
    merge: bool,
) -> Engine:
    """As `open_engine`, for a process that has other things to do: the model runs in a process of its own, in `begun` where
    there is one."""
    if config.kind == "vllm":  # does so already
        return open_engine(model_dir, adapter_dir, config, use_gpu, merge)
    return ProcessEngine(begun or EngineProcess.start(), model_dir, adapter_dir, config, use_gpu, merge)


def write_merged(model_dir: Path, adapter_dir: Path | None, precision: str, folder: Path) -> None:
    """The weights in this precision (bf16 or fp32), an adapter summed into them in fp32 and rounded once, with everything
    else of the base's folder."""
    from forge_ray.inference.load import DTYPES
    from forge_ray.inference.merge import write_sum

    write_sum(model_dir, adapter_dir, folder, DTYPES[precision])
    for path in model_dir.iterdir():
        is_copied = path.is_file() and not (folder / path.name).exists() and path.name != MANIFEST
        if is_copied and ".safetensors" not in path.name:
            shutil.copy2(path, folder / path.name)
