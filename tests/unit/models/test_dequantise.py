"""Conversion of FP8 checkpoints to bf16 is exact; unknown formats are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from forge_ray.errors import ConfigError, PolicyError
from forge_ray.models import dequantise
from forge_ray.models.import_model import import_model
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit

FP8 = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
BLOCKS = FP8 | {"activation_scheme": "dynamic", "weight_block_size": [32, 16]}
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"type": "float", "num_bits": 8}}}}


def write(folder: Path, shards: dict[str, dict[str, Tensor]], quantisation: Any, nested: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / dequantise.INDEX).write_text(json.dumps(index))
    config: dict[str, Any] = {"model_type": "llama", "text_config": {"hidden_size": 4}}
    if quantisation:
        (config["text_config"] if nested else config)["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def imported(folder: Path, tmp_path: Path) -> Path:
    store = Store(str(tmp_path / "store"))
    with Catalog.open(store) as catalog:
        return store.local(f"models/{import_model(catalog, folder, 'model').id}")


@pytest.mark.parametrize("chunk", [100, 4 << 20], ids=["in pieces", "whole"])
def test_every_kind_of_scale_is_applied_exactly(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantise, "CHUNK", chunk)
    torch.manual_seed(0)
    matrix, experts = (torch.randn(*shape).to(torch.float8_e4m3fn) for shape in ((70, 40), (5, 64, 32)))
    block, per_expert = torch.rand(3, 3) + 0.1, torch.rand(5, 1, 1) + 0.1
    expert_blocks, per_row = torch.rand(5, 2, 2) + 0.1, torch.rand(70, 1) + 0.1
    plain, exact = torch.randn(40, dtype=torch.bfloat16), torch.randn(3)
    power = torch.tensor([0.25, 2.0]).to(torch.float8_e8m0fnu)
    folder = write(
        tmp_path / "model",
        {
            "model-00001-of-00002.safetensors": {
                "one.weight": matrix,
                "one.weight_scale_inv": torch.tensor(0.37),
                "one.activation_scale": torch.tensor(3.0),
                "block.weight": matrix.clone(),
                "experts.down_proj": experts,
                "norm.weight": plain,
                "row.weight": matrix.clone(),
                "row.weight_scale": per_row.bfloat16(),
            },
            "model-00002-of-00002.safetensors": {
                "block.weight_scale_inv": block,
                "experts.down_proj_scale_inv": per_expert,
                "experts.down_proj_activation_scale": torch.rand(5, 1, 1),
                "experts.gate_up_proj": experts.clone(),
                "experts.gate_up_proj_scale_inv": expert_blocks,
                "flat.gate_up_proj": experts.clone(),
                "flat.gate_up_proj_scale": per_expert.flatten().clone(),
                "power.weight": experts[0].clone(),
                "power.weight_scale_inv": power.reshape(2, 1),
                "bias": exact,
            },
        },
        BLOCKS,
        nested=True,
    )
    (folder / "consolidated.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    model = imported(folder, tmp_path)
    tensors: dict[str, Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        tensors |= load_file(path)

    wide = matrix.float()
    grid = block.repeat_interleave(32, 0)[:70].repeat_interleave(16, 1)[:, :40]
    expected = {
        "one.weight": wide * 0.37,
        "block.weight": wide * grid,
        "row.weight": wide * per_row.bfloat16().float(),
        "experts.down_proj": experts.float() * per_expert,
        "experts.gate_up_proj": experts.float() * expert_blocks.repeat_interleave(32, 1).repeat_interleave(16, 2),
        "flat.gate_up_proj": experts.float() * per_expert,
        "power.weight": experts[0].float() * torch.tensor([0.25, 2.0]).repeat_interleave(32)[:, None],
    }
    assert tensors.keys() == {*expected, "norm.weight", "bias"}
    for name, value in expected.items():
        assert torch.equal(tensors[name], value.bfloat16()), name
    assert torch.equal(tensors["norm.weight"], plain)
    assert torch.equal(tensors["bias"], exact)
    assert json.loads((model / "config.json").read_text()) == {"model_type": "llama", "text_config": {"hidden_size": 4}}
    index = json.loads((model / dequantise.INDEX).read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_a_file_without_an_index_and_other_names_of_the_format(tmp_path: Path) -> None:
    weight = torch.randn(8, 8).to(torch.float8_e5m2)
    tensors = {"a.weight": weight, "a.weight_scale": torch.tensor([0.5]), "a.input_scale": torch.tensor([1.0])}
    for number, quantisation in enumerate((FP8, COMPRESSED, None)):
        folder = write(tmp_path / str(number), {"model.safetensors": tensors}, quantisation)
        (folder / "note.txt").write_text(str(number))
        converted = load_file(imported(folder, tmp_path) / "model.safetensors")
        assert converted.keys() == {"a.weight"}
        assert torch.equal(converted["a.weight"], (weight.float() * 0.5).bfloat16())


def float8(*shape: int) -> Tensor:
    return torch.ones(*shape).to(torch.float8_e4m3fn)


def with_scale(scale: Tensor) -> dict[str, Tensor]:
    return {"a.weight": float8(48, 4), "a.weight_scale_inv": scale}


REFUSED: dict[str, tuple[dict[str, Tensor], Any, str]] = {
    "nvfp4": ({"a.weight": torch.ones(2)}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantised by 'modelopt'"),
    "gptq": ({"a.qweight": torch.ones(2)}, {"quant_method": "gptq", "bits": 4}, "quantised by 'gptq'"),
    "compressed to 4 bits": (
        {"a.weight": torch.ones(2)},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"type": "int", "num_bits": 4}}}},
        r"\(int, 4 bits\)",
    ),
    "experts in fp4": ({"a.weight": torch.ones(2)}, FP8 | {"expert_dtype": "fp4"}, "quantised by 'fp8'"),
    "no scale": ({"a.weight": float8(4, 4)}, FP8, "a.weight is FP8 and has no scale"),
    "no weight": ({"a.weight": torch.ones(2), "a.weight_scale": torch.ones(1)}, FP8, "is a scale without an FP8 weight"),
    "packed": ({"a.weight": torch.ones(4, dtype=torch.uint8)}, FP8, "packed in an unknown way"),
    "bytes as scales": (with_scale(torch.ones(1, dtype=torch.uint8)), FP8, "has the type U8"),
    "not finite": (with_scale(torch.tensor(float("nan"))), FP8, "is not finite"),
    "a grid that does not fit": (with_scale(torch.ones(5, 1)), BLOCKS, "48 rows or columns with 5 scales"),
    "two numbers an expert": (
        {"experts.up": float8(3, 4, 4), "experts.up_scale_inv": torch.ones(3, 2)},
        FP8,
        "neither one number, nor one per row, nor a grid",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unknown_formats_are_refused(case: str, tmp_path: Path) -> None:
    tensors, quantisation, says = REFUSED[case]
    folder = write(tmp_path / "model", {"model.safetensors": tensors}, quantisation)
    with pytest.raises(ConfigError, match=says) as caught:
        imported(folder, tmp_path)
    assert caught.value.hint
    assert not list((tmp_path / "store" / "models").glob("mv_*"))


def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {"model.safetensors": with_scale(torch.ones(1))}, FP8)
    (folder / dequantise.INDEX).write_text(json.dumps({"weight_map": {"a.weight": "../model.safetensors"}}))
    with pytest.raises(PolicyError, match="which is not in its folder"):
        imported(folder, tmp_path)
