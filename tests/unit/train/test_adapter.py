"""What an adapter reaches is what its patterns name; a run that would train less is refused before it starts."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from forge_ray.config.adapter import Adapter
from forge_ray.config.base import parse
from forge_ray.config.classify import Target
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError
from forge_ray.models.architecture import Head
from forge_ray.train.adapter import coverage, quantised, with_adapter
from forge_ray.train.freezing import freeze_weights, frozen_names
from forge_ray.train.plan import Model

pytestmark = pytest.mark.unit
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """On the meta device: shapes alone."""
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        Mistral4Config,
        Mistral4ForCausalLM,
    )

    text: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    sees = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    with torch.device("meta"):
        return {
            "text": Mistral4ForCausalLM(Mistral4Config(**text)),
            "mixed": Mistral4ForCausalLM(Mistral4Config(**text, first_k_dense_replace=1)),
            "sees": Mistral3ForConditionalGeneration(
                Mistral3Config(
                    text_config=text | {"model_type": "mistral4"},
                    vision_config=sees | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
                    tie_word_embeddings=False,
                )
            ),
        }


def reach(model: Any, **settings: Any) -> Any:
    adapter = Adapter(**settings)
    return coverage(with_adapter(copy.deepcopy(model), adapter), adapter)


def test_target_module_missing_from_text_model_is_refused(models: dict[str, Any]) -> None:
    """PEFT alone would adapt o_proj and be silent; in the model that sees, its vision tower's q_proj too."""
    for name in ("text", "sees"):
        with pytest.raises(ConfigError, match="'q_proj' matches nothing of this model's text") as error:
            reach(models[name], target_modules=("q_proj", "v_proj", "o_proj"))
        assert "q_a_proj" in error.value.hint
        assert set(reach(models[name], target_modules=("o_proj",)).patterns[0].kinds) == {"self_attn.o_proj.weight"}


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"target_modules": ("o_proj", "no_such")}, "'no_such' matches nothing", "o_proj"),
        (
            {"target_parameters": ("mlp.experts.up_proj",)},
            "'mlp.experts.up_proj' matches nothing",
            "mlp.experts.gate_up_proj",
        ),
        ({"target_modules": ("1.self_attn.o_proj",)}, "in 1 of 3 layers", "name the kind of layer"),
        ({"target_parameters": ("layers.2.mlp.experts.down_proj",)}, "in 1 of 3 layers", "mlp.experts.down_proj"),
    ],
)
def test_pattern_matching_too_few_layers_is_refused(
    models: dict[str, Any], settings: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        reach(models["text"], **settings)
    assert hint in error.value.hint


@pytest.mark.parametrize(("pattern", "other"), [("lm_head", "embedding"), ("embed_tokens", "output")])
def test_adapter_on_one_side_of_a_tied_weight_is_refused(pattern: str, other: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        tied, untied = (LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=one)) for one in (True, False))
    with pytest.raises(ConfigError, match=f"{pattern} shares its weight with the model's {other}") as error:
        reach(tied, target_modules=("q_proj", pattern))
    assert f"leave {pattern} out of target_modules, or train the model in full" in error.value.hint
    if pattern == "embed_tokens":
        with pytest.raises(ConfigError, match=r"target_parameters: model\.embed_tokens\.weight shares its weight"):
            reach(tied, target_modules=(), target_parameters=("embed_tokens.weight",))
    with pytest.raises(ConfigError, match=rf"modules_to_save: \S*{pattern} shares its weight with the model's {other}"):
        reach(tied, modules_to_save=(pattern,))
    assert [one.modules for one in reach(untied, target_modules=("q_proj", pattern)).patterns] == [2, 1]
    assert "lm_head.weight" not in reach(tied).patterns[0].kinds  # all-linear leaves it out


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"modules_to_save": ("head",)}, "modules_to_save: 'head' matches nothing", "embed_tokens"),
        (
            {"target_modules": ("o_proj",), "modules_to_save": ("self_attn.o_proj",)},
            "modules_to_save and target_modules both name",
            "leave o_proj out of one of the two",
        ),
        (
            {"target_parameters": ("kv_b_proj.weight",), "modules_to_save": ("kv_b_proj",)},
            "modules_to_save and target_parameters both name",
            "leave kv_b_proj out",
        ),
    ],
)
def test_module_to_save_that_cannot_be_honoured_is_refused(
    models: dict[str, Any], settings: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        reach(models["text"], **settings)
    assert hint in error.value.hint


def test_modules_to_save_are_counted_as_trained_in_full(models: dict[str, Any]) -> None:
    model = models["text"]
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    plain = reach(model, r=4, target_modules=("o_proj",))
    report = reach(model, r=4, target_modules=("o_proj",), modules_to_save=("lm_head", "input_layernorm"))
    full = sizes["lm_head.weight"] + sum(size for key, size in sizes.items() if "input_layernorm" in key)
    assert (report.parameters, report.trained) == (plain.parameters, plain.trained + full)
    assert report.reached == plain.reached + full
    assert [(one.pattern, one.modules) for one in report.patterns] == [("o_proj", 3), ("lm_head", 1), ("input_layernorm", 3)]
    assert "lm_head.weight" not in report.unreached
    in_full = reach(model, modules_to_save=("self_attn.o_proj",))  # all-linear leaves it out
    assert "self_attn.o_proj.weight" not in in_full.patterns[0].kinds


@pytest.mark.parametrize("name", ["text", "sees"])
def test_coverage_counts_and_shares(name: str, models: dict[str, Any]) -> None:
    model = models[name]
    report = reach(model, r=4, target_modules=("o_proj", "kv_b_proj"), target_parameters=EXPERTS)
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    assert experts == 3 * 8 * 3 * 16 * 32
    assert report.parameters == sum(sizes.values())
    assert report.active == report.parameters - experts * 6 / 8
    attention = sum(size for key, size in sizes.items() if "language_model" in key or name == "text" if "o_proj" in key)
    latent = sum(size for key, size in sizes.items() if "kv_b_proj" in key)
    assert report.reached == experts + attention + latent
    assert report.reached_active == experts / 4 + attention + latent
    adapted = with_adapter(
        copy.deepcopy(model), Adapter(r=4, target_modules=("o_proj", "kv_b_proj"), target_parameters=EXPERTS)
    )
    trained = {key: p.numel() for key, p in adapted.named_parameters() if p.requires_grad}
    assert report.trained == sum(trained.values())
    of_experts = sum(size for key, size in trained.items() if ".experts." in key)
    assert report.trained_active == report.trained - of_experts * 6 / 8
    as_json = report.to_json()
    assert as_json["trained_of_active"] == report.trained_active / report.active
    assert [one["modules"] for one in as_json["patterns"]] == [3, 3, 3, 3]


def test_all_linear_reports_unadapted_experts(models: dict[str, Any]) -> None:
    report = reach(models["sees"])
    assert not any("vision" in kind or "projector" in kind for kind in report.patterns[0].kinds)
    (not_adapted,) = (line for line in report.lines() if line.startswith("not adapted"))
    assert "[mlp.experts.gate_up_proj, mlp.experts.down_proj]" in not_adapted
    assert not any("not adapted" in line for line in reach(models["sees"], target_parameters=EXPERTS).lines())


def test_pattern_matches_only_layers_with_that_module(models: dict[str, Any]) -> None:
    """One dense layer before the mixtures: its name is enough, and the report says in how many layers it was found."""
    report = reach(models["mixed"], target_modules=("mlp.gate_proj",), target_parameters=EXPERTS)
    assert [one.kinds for one in report.patterns] == [
        {"mlp.gate_proj.weight": (1, 1)},
        {"mlp.experts.gate_up_proj": (2, 2)},
        {"mlp.experts.down_proj": (2, 2)},
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": {"target_parameters": list(EXPERTS), "dropout": 0.1}}, "dropout=0.1 cannot be applied"),
        ({"adapter": {"target_parameters": list(EXPERTS), "method": "dora"}}, "method=dora cannot be applied"),
        ({"adapter": {"target_modules": []}}, "both empty"),
        ({"adapter": {"quantize": "nf4"}}, "needs a GPU"),
        ({"adapter": {"quantize": "nf4"}, "zero_stage": 3, "scaling": {"gpus_per_worker": 1}}, "cannot shard"),
        ({"adapter": {"method": "dora"}, "zero_stage": 3}, "whole weights"),
        (
            {"adapter": {"quantize": "nf4", "modules_to_save": ["lm_head"]}, "scaling": {"gpus_per_worker": 1}},
            "weights in 4 bits cannot be trained in full",
        ),
        ({"optimizer": {"name": "adafactor"}}, "engine=deepspeed lays weights end to end"),
        (
            {"optimizer": {"name": "adafactor"}, "engine": "torch", "zero_stage": 0, "adapter": {}},
            "matrices B begin at zero",
        ),
        ({"optimizer": {"name": "adafactor", "eps": 1e-6}}, "eps=1e-06 has no effect with name=adafactor"),
        ({"optimizer": {"name": "adamw8bit"}}, "optimizer.name='adamw8bit'"),
        ({"optimizer": {"name": "adamw_8bit"}, "scaling": {"gpus_per_worker": 1}}, "engine=deepspeed cuts weights anew"),
        ({"optimizer": {"name": "adamw_8bit"}, "engine": "torch", "zero_stage": 0}, "adamw_8bit runs on GPUs"),
        ({"adapter": {}, "router": "trained"}, "cannot be combined with an adapter"),
        ({"adapter": {}, "router_aux_loss": 0.1}, "the router is frozen"),
        ({"router": "frozen", "router_aux_loss": 0.1}, "the router is frozen"),
        ({"adapter": {}, "freeze": ["layers.0"]}, "freeze=.'layers.0'. has no effect with an adapter"),
        ({"neftune_alpha": 5, "method": {"kind": "dpo"}}, "neftune_alpha=5.0 with method.kind=dpo"),
        ({"neftune_alpha": 5, "sequence_parallel": 2, "scaling": {"num_workers": 2}}, "with sequence_parallel=2"),
    ],
)
def test_incompatible_adapter_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse(TrainConfig, settings)
    assert error.value.hint


@pytest.mark.parametrize("settings", [{"router": "trained"}, {"router_aux_loss": 0.1}], ids=str)
def test_frozen_router_that_is_to_be_trained_is_refused(models: dict[str, Any], settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"freezes a router of this model, and train\.router.* trains it") as error:
        freeze_weights(copy.deepcopy(models["text"]), parse(TrainConfig, {"freeze": ["mlp.gate"], **settings}))
    assert "leave the routers out of train.freeze" in error.value.hint
    model = copy.deepcopy(models["text"])
    freeze_weights(model, parse(TrainConfig, {"freeze": ["mlp.gate"]}))
    assert {name.partition(".mlp.")[2] for name in frozen_names(model)} == {"gate.weight"}


def test_4bit_quantization_requires_gpu_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantised(Adapter(), torch.device("cpu")) == {}
    with pytest.raises(ConfigError, match="this worker has cpu"):
        quantised(Adapter(quantize="nf4"), torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="needs bitsandbytes") as error:
        quantised(Adapter(quantize="nf4"), torch.device("cuda", 0))
    assert "forge-ray[qlora]" in error.value.hint


def test_a_head_over_labels_is_part_of_the_adapter(tiny_model_dir: Path) -> None:
    """Trained in full: C rows of the hidden size, which the plan counts too."""
    head = Head((Target(labels=("a", "b", "c")),))
    whole, plain = Model.of(tiny_model_dir, head), Model.of(tiny_model_dir)
    adapter = Adapter(r=4)
    ours, theirs = whole.coverage(adapter), plain.coverage(adapter)
    assert ours.trained == theirs.trained + 3 * 64
    assert whole.num_parameters == sum(math.prod(shape) for name, shape in whole.shapes.items() if "original" not in name)
    assert "score.weight" not in ours.unreached
    assert whole.num_logits == 3
