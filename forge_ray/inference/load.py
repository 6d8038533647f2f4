"""A model's folder → the transformers engine, or its weights alone: safetensors only, no code of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from forge_ray.config.release import EngineConfig
from forge_ray.errors import EngineError, PolicyError
from forge_ray.inference.adapters import WEIGHTS, read_adapter
from forge_ray.inference.grammar import load_grammars
from forge_ray.inference.merge import summed_model
from forge_ray.inference.projection import linear_layers
from forge_ray.inference.transformers_engine import TransformersEngine
from forge_ray.machine.hardware import resolve_precision
from forge_ray.models.architecture import open_model
from forge_ray.models.class_head import refuse_classifier

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_engine(
    model_dir: Path, adapter_dir: Path | None, config: EngineConfig, use_gpu: bool | None = None, merge: bool = False
) -> TransformersEngine:
    """Load safetensors from local folders and start generating; `use_gpu` None: if the process sees a GPU.

    The adapter of `adapter_dir` answers where a request names none; with `merge` it is summed into the weights, which is
    faster and rounds it to their precision.
    """
    on_gpu = torch.cuda.is_available() if use_gpu is None else use_gpu
    if on_gpu and not torch.cuda.is_available():
        raise EngineError(
            "the engine was given a GPU, but this process sees none", hint="set gpus to 0, or check the driver"
        )
    dtype = DTYPES[resolve_precision(config.precision, on_gpu)]
    device = torch.device("cuda" if on_gpu else "cpu")
    model = load_model(model_dir, adapter_dir if merge else None, dtype, device, merge)
    own = None
    if adapter_dir is not None and not merge:
        try:
            own = read_adapter(adapter_dir, linear_layers(model), None, torch.empty(0, dtype=dtype, device=device))
        except EngineError:  # more than LoRA on linear layers: PEFT's own layers answer, for this adapter alone
            del model
            model = load_model(model_dir, adapter_dir, dtype, device)
    grammars = load_grammars(model_dir, int(model.config.get_text_config().vocab_size))
    return TransformersEngine(model, config, grammars, own)


def load_model(
    model_dir: Path, adapter_dir: Path | None, dtype: torch.dtype, device: torch.device, merge: bool = False
) -> PreTrainedModel:
    """The base model. A PEFT adapter is left unmerged, or summed into the weights in fp32, which are then rounded once."""
    if not list(model_dir.glob("*.safetensors")):
        raise PolicyError(f"{model_dir} has no .safetensors weights", hint="convert the weights to safetensors first")
    refuse_classifier(adapter_dir)
    if adapter_dir is not None and not (adapter_dir / WEIGHTS).is_file():
        raise PolicyError(f"{adapter_dir} has no {WEIGHTS}", hint="export the adapter as safetensors")
    model: Any = summed_model(model_dir, adapter_dir, dtype) if merge else open_model(model_dir, dtype)
    if adapter_dir is not None and not merge:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter_dir, is_trainable=False).get_base_model()
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded
