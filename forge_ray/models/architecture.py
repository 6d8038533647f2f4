"""Which class opens a folder, and which part of a model reads text (torch and transformers on first use).

`AutoModelForCausalLM` knows neither Mistral 4's text model nor the models that also see, such as Mistral 3's
`Mistral3ForConditionalGeneration`, whose text model lies below `model.language_model`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forge_ray.errors import ConfigError


def model_class(config: Any) -> Any:
    """The class with a language model's head for a transformers configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    for known in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in known:
            return known[type(config)]
    raise ConfigError(
        f"model_type {config.model_type!r} has no language model's head in transformers",
        hint="use a model that generates text: Llama, Mistral, Qwen, Gemma, Mixtral and their like",
    )


def open_model(folder: Path, dtype: Any, attention: str = "", **settings: Any) -> Any:
    """The model of a folder: safetensors alone, nothing of a hub, no code but transformers'. `attention`, else torch's own
    function where the model allows it (Gemma 2 caps its scores and does not)."""
    only: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    kind = model_class(_config(folder))
    attention = attention or ("sdpa" if kind._supports_sdpa else "eager")
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation=attention, **only, **settings)


def empty_model(folder: Path) -> Any:
    """The model that `config.json` describes, with every weight's shape and no weight; no other file is read."""
    import torch

    config = _config(folder)
    with torch.device("meta"):
        return model_class(config)(config)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{folder / 'config.json'} is not the configuration of a known model: {str(error).strip().splitlines()[0]}",
            hint="give the folder of a model whose architecture this release of transformers has",
        ) from error


def outside_text(model: Any) -> tuple[str, ...]:
    """Names of the modules that text does not pass, such as a vision tower and its projector; none in a text model."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    found: list[str] = []
    at, path = model, ""
    while at is not decoder:
        inner = None
        for name, child in at.named_children():
            if any(module is decoder for module in child.modules()):
                inner = (name, child)
            elif child is not head:
                found.append(path + name)
        if inner is None:
            raise ConfigError(f"{type(model).__name__} has no text model that could be found", hint="use a text model")
        at, path = inner[1], f"{path}{inner[0]}."
    return tuple(found)
