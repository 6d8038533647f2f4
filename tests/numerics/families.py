"""Tiny random models of the families that are trained: one tokenizer, two layers, weights wide enough to differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import Jobs
from transformers import AutoTokenizer

from forge_ray.models.import_model import import_model
from forge_ray.records import ModelVersion
from forge_ray.store.catalog import Catalog

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": 0,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "rope_parameters": {  # a step of the query's scale every 8 positions: who does not restart them computes another model
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 128.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _mistral4(vocabulary: dict[str, int]) -> Any:
    from transformers import Mistral4Config, Mistral4ForCausalLM

    return Mistral4ForCausalLM(Mistral4Config(**_without_head(SMALL) | MLA | vocabulary))


def _mistral4_that_sees(vocabulary: dict[str, int]) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = _without_head(SMALL) | MLA | vocabulary | {"model_type": "mistral4"}
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=VISION, tie_word_embeddings=False, image_token_index=3)
    )


def _without_head(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "head_dim"}


def _of(name: str, config: str = "", **more: Any) -> Callable[[dict[str, int]], Any]:
    def make(vocabulary: dict[str, int]) -> Any:
        import transformers

        settings = getattr(transformers, config or f"{name}Config")(**SMALL | more | vocabulary)
        return getattr(transformers, f"{name}ForCausalLM")(settings)

    return make


FAMILIES: dict[str, Callable[[dict[str, int]], Any]] = {
    "llama": _of("Llama"),
    "mistral": _of("Mistral", sliding_window=16),
    "qwen2": _of("Qwen2"),
    "qwen3": _of("Qwen3"),
    "gemma2": _of("Gemma2", sliding_window=16, query_pre_attn_scalar=12),
    "gemma3": _of(
        "Gemma3",
        "Gemma3TextConfig",
        sliding_window=16,
        query_pre_attn_scalar=12,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mixtral": _of("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": _of("Qwen3Moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32),
    "mistral4": _mistral4,
    "mistral4-sees": _mistral4_that_sees,
}


def make(family: str, folder: Path, tokenizer: Any) -> Any:
    """Writes the model with its tokenizer, and returns it."""
    torch.manual_seed(len(family))
    model = FAMILIES[family]({"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def version(family: str, jobs: Jobs, folder: Path) -> ModelVersion:
    """One of them as a base model in the store of the tests."""
    with Catalog.open(jobs.store) as catalog:
        base = jobs.store.local(f"models/{catalog.model('tiny').id}")
        make(family, folder, AutoTokenizer.from_pretrained(base, local_files_only=True))
        return import_model(catalog, folder, family, licence="apache-2.0")
