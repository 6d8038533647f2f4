"""A base and an adapter summed file by file: the weights of PEFT's own sum of the whole model, in the memory of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from forge_ray.config.classify import Target
from forge_ray.errors import ConfigError
from forge_ray.inference import merge
from forge_ray.inference.merge import write_sum
from forge_ray.models.architecture import open_model
from forge_ray.models.class_head import HEAD_FILE, write_targets

pytestmark = pytest.mark.unit
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {"target_modules": "all-linear"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("Llama", {}, LINEAR),
    "tied": ("Llama", {"tie_word_embeddings": True}, LINEAR),
    "rslora": ("Qwen2", {}, LINEAR | {"use_rslora": True}),
    "dora": ("Llama", {}, LINEAR | {"use_dora": True}),
    "embedding": ("Llama", {}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "experts of one file each": (
        "Qwen3Moe",
        EXPERTS,
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "experts of another layout": (
        "Mixtral",
        EXPERTS,
        {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "offset norms": ("Gemma2", {"head_dim": 8}, LINEAR),
}


def make(folder: Path, family: str, settings: dict[str, Any], lora: dict[str, Any], dtype: torch.dtype) -> None:
    """A random base in files of 8 kB, and an adapter with weights that are not zero."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL | settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    model.save_pretrained(folder / "base", max_shard_size="8kB")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **lora))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, 1.0 if "magnitude" in name else 0.0, 0.3)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)


def whole(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """PEFT's sum of the whole model in fp32, rounded once."""
    model = open_model(folder / "base", torch.float32)
    merged: Any = PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload()
    return dict(merged.to(dtype).state_dict())


@pytest.mark.parametrize("name", CASES)
def test_sum_file_by_file_is_that_of_the_whole_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, settings, lora = CASES[name]
    make(tmp_path, family, settings, lora, torch.bfloat16)
    monkeypatch.setattr(merge, "open_model", None)  # the whole model is never opened
    for dtype, asked in ((torch.bfloat16, None), (torch.float32, torch.float32)):
        target = tmp_path / str(dtype)
        write_sum(tmp_path / "base", tmp_path / "adapter", target, asked)
        expected, summed = whole(tmp_path, dtype), open_model(target, "auto").state_dict()
        assert summed.keys() == expected.keys()
        for key, weight in expected.items():
            assert summed[key].dtype == weight.dtype == dtype
            assert torch.equal(summed[key], weight), key
        files = {path.name for path in (tmp_path / "base").glob("*.safetensors")}
        assert len(files) > 3
        assert {path.name for path in target.glob("*.safetensors")} == files
        stored = sum(weight.nbytes for file in files for weight in load_file(target / file).values())
        assert json.loads((target / merge.INDEX).read_text())["metadata"]["total_size"] == stored
    base = dict(open_model(tmp_path / "base", torch.bfloat16).state_dict())
    changed = {key for key, weight in whole(tmp_path, torch.bfloat16).items() if not torch.equal(base[key], weight)}
    assert changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modules_trained_in_full_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """They are in fp32 in the adapter, and the base is narrower."""
    make(tmp_path, "Llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, torch.bfloat16)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    (name,) = [key for key in load_file(file) if "lm_head" in key]
    head = torch.randn(64, 32)
    save_file(load_file(file) | {name: head}, file, metadata={"format": "pt"})
    summed = merge.summed_model(tmp_path / "base", tmp_path / "adapter", dtype).state_dict()
    assert torch.equal(summed["lm_head.weight"], head.to(dtype))
    for key, weight in whole(tmp_path, dtype).items():
        assert torch.equal(summed[key], weight), key


def test_memory_is_that_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read from one file at a time, and its tensors are written before the next one is opened."""
    make(tmp_path, "Llama", {}, LINEAR, torch.float32)
    order: list[str] = []
    monkeypatch.setattr(merge, "save_file", lambda weights, path, metadata: order.append(f"write {path.name}"))
    monkeypatch.setattr(merge, "_summed", lambda path, changes, dtype: order.append(f"read {path.name}") or iter(()))
    write_sum(tmp_path / "base", tmp_path / "adapter", tmp_path / "sum")
    assert [line.split()[0] for line in order] == ["read", "write"] * (len(order) // 2)
    assert len({line.split()[1] for line in order}) == len(order) // 2 > 3


def test_classifier_is_not_summed_as_a_model_that_writes(tmp_path: Path) -> None:
    """Whether the base has the head or the adapter, a sum without it would be another model."""
    make(tmp_path, "Llama", {}, LINEAR, torch.float32)
    for part in ("base", "adapter"):
        write_targets(tmp_path / part, (Target(labels=("a", "b")),))
        with pytest.raises(ConfigError, match="is a classifier"):
            write_sum(tmp_path / "base", tmp_path / "adapter", tmp_path / "sum")
        (tmp_path / part / HEAD_FILE).unlink()
    write_sum(tmp_path / "base", tmp_path / "adapter", tmp_path / "sum")


def test_names_that_transformers_does_not_write_are_summed_whole(tmp_path: Path) -> None:
    """A base without the prefix of its class; another publisher wrote it."""
    make(tmp_path, "Llama", {}, LINEAR, torch.bfloat16)
    expected = whole(tmp_path, torch.bfloat16)
    weights = {}
    for path in (tmp_path / "base").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            weights |= {name.removeprefix("model."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        path.unlink()
    (tmp_path / "base" / merge.INDEX).unlink()
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    write_sum(tmp_path / "base", tmp_path / "adapter", tmp_path / "sum")
    summed = open_model(tmp_path / "sum", "auto").state_dict()
    assert all(torch.equal(summed[key], weight) for key, weight in expected.items())
