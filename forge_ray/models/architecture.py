"""The model class of a folder, and the text part of a model (torch and transformers on first use).

`AutoModelForCausalLM` knows neither Mistral 4's text model nor vision-language models, such as Mistral 3's
`Mistral3ForConditionalGeneration`, whose text model is `model.language_model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_ray.config.classify import Target, class_names
from forge_ray.errors import ConfigError, first_line
from forge_ray.models.class_head import refuse_classifier


@dataclass(frozen=True)
class Head:
    """What a model ends in: logits over the vocabulary, or, where there are targets, over their labels side by side."""

    targets: tuple[Target, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What `from_pretrained` takes for it."""
        if not self.targets:
            return {}
        names = dict(enumerate(class_names(self.targets)))
        by_name = {name: index for index, name in names.items()}
        kinds = {"single": "single_label_classification", "multi": "multi_label_classification"}
        kind = kinds.get(self.targets[0].loss) if len(self.targets) == 1 else None
        return {"num_labels": len(names), "id2label": names, "label2id": by_name, "problem_type": kind}


LM = Head()


def model_class(config: Any, head: Head = LM) -> Any:
    """The class with this head for a transformers configuration."""
    import transformers

    mappings: tuple[Any, ...]
    if not head.targets:
        mappings = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
        what, advice = "language model's head", "use a model that generates text"
    else:
        mappings = (transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,)
        what, advice = "head that classifies", "use a model whose architecture has one"
    for mapping in mappings:
        if type(config) in mapping:
            return mapping[type(config)]
    raise ConfigError(
        f"model_type {config.model_type!r} has no {what} in transformers",
        hint=f"{advice}: Llama, Mistral, Qwen, Gemma, Mixtral and their like",
    )


def open_model(folder: Path, dtype: Any, attention: str = "", head: Head = LM, **settings: Any) -> Any:
    """The model of a folder: safetensors alone, nothing of a hub, no code but transformers'. `attention`, else torch's own
    function where the model allows it (Gemma 2 caps its scores and does not). A head that the folder has no weights for is
    drawn from torch's random numbers. Raises `ConfigError` where the head of the folder is over labels and `head` is not."""
    if not head.targets:
        refuse_classifier(folder)
    only: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    kind = model_class(_config(folder), head)
    attention = attention or ("sdpa" if kind._supports_sdpa else "eager")
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation=attention, **only, **head.settings, **settings)


def empty_model(folder: Path, head: Head = LM) -> Any:
    """The model of a `config.json` on the meta device: shapes without weights. No other file is read."""
    import torch

    config = _config(folder)
    for name, value in head.settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return model_class(config, head)(config)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{folder / 'config.json'} is not the configuration of a supported model: {first_line(error)}",
            hint="give the folder of a model whose architecture this release of transformers has",
        ) from error


def outside_text(model: Any) -> tuple[str, ...]:
    """Names of the modules that text does not pass through, such as a vision tower and its projector; none in a text
    model."""
    decoder, head = model.get_decoder(), model.get_output_embeddings() or getattr(model, "score", None)
    names: list[str] = []
    at, path = model, ""
    while at is not decoder:
        inner = None
        for name, child in at.named_children():
            if any(module is decoder for module in child.modules()):
                inner = (name, child)
            elif child is not head:
                names.append(path + name)
        if inner is None:
            raise ConfigError(f"{type(model).__name__} has no recognisable text model", hint="use a text model")
        at, path = inner[1], f"{path}{inner[0]}."
    return tuple(names)
