"""A model of some layers of another: its weights, its settings, its record, and what it cannot be made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from forge_ray.errors import ConfigError, PolicyError
from forge_ray.governance.erasure.leftovers import IMPORTS
from forge_ray.governance.space.survey import HALF
from forge_ray.models.import_model import import_model
from forge_ray.models.new_tokens import add_tokens
from forge_ray.models.shrink import shrink, write_layers
from forge_ray.records import Event, ModelVersion
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def saved(folder: Path, model: Any, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def llama(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    return saved(folder, LlamaForCausalLM(LlamaConfig(**SMALL)), **options)


def small(base: Path, tmp_path: Path, *layers: int) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    write_layers(base, folder, layers)
    return folder


def test_layers_are_numbered_anew_and_all_else_stays(tmp_path: Path) -> None:
    """In several files, of which some end up empty; the logits are those of the model without the other layers."""
    base = llama(tmp_path / "base", max_shard_size="6KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    (base / "tokenizer.json").write_text("{}")
    (base / "consolidated.safetensors").write_bytes(b"x")
    folder = small(base, tmp_path, 0, 3, 5)
    whole = AutoModelForCausalLM.from_pretrained(base).eval()
    own, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[layer] for layer in (0, 3, 5)])
    ids = torch.arange(10)[None]
    assert torch.equal(own.eval()(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)
    assert own.config.num_hidden_layers == 3
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(files)
    assert index["weight_map"].keys() == {name for tensors in files.values() for name in tensors}
    assert (folder / "tokenizer.json").is_file()
    assert "consolidated.safetensors" not in files


def test_settings_of_each_layer_are_cut(tmp_path: Path) -> None:
    """Layers that see a window stay so, under whatever number."""
    config = Gemma3TextConfig(**SMALL, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 3)
    base = saved(tmp_path / "base", Gemma3ForCausalLM(config))
    folder = small(base, tmp_path, 1, 2, 3)
    kinds = json.loads((folder / "config.json").read_text())["layer_types"]
    assert kinds == ["full_attention", "sliding_attention", "full_attention"]
    assert AutoModelForCausalLM.from_pretrained(folder).config.layer_types == kinds


def test_kinds_that_follow_from_other_settings_are_written_down(tmp_path: Path) -> None:
    config = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=3)
    base = saved(tmp_path / "base", Qwen2ForCausalLM(config))
    settings = json.loads((base / "config.json").read_text())
    settings.pop("layer_types", None)  # as older checkpoints are
    (base / "config.json").write_text(json.dumps(settings))
    folder = small(base, tmp_path, 0, 5)
    own = AutoModelForCausalLM.from_pretrained(folder)
    assert own.config.layer_types == ["full_attention", "sliding_attention"]


def test_experts_of_a_layer_are_no_list_of_layers(tmp_path: Path) -> None:
    config = MixtralConfig(**SMALL | {"num_hidden_layers": 4}, num_local_experts=4, num_experts_per_tok=2)
    folder = small(saved(tmp_path / "base", MixtralForCausalLM(config)), tmp_path, 0, 2)
    own, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert own.config.num_hidden_layers == 2


def test_layer_that_would_be_of_another_kind_is_refused(tmp_path: Path) -> None:
    """The number decides: the first of these layers has no experts."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1}
    settings = SMALL | latent | experts | {"first_k_dense_replace": 2, "num_key_value_heads": 2}
    base = saved(tmp_path / "base", DeepseekV3ForCausalLM(DeepseekV3Config(**settings)))
    with pytest.raises(ConfigError, match=r"layer 2 would be layer 1, where the model computes something else"):
        small(base, tmp_path, 0, 2, 4)
    (tmp_path / "two").mkdir()
    write_layers(base, tmp_path / "two", (0, 1, 4))


@pytest.mark.parametrize(
    ("layers", "rule"),
    [
        ((0, 6), r"layer 6 is not one of the model's, 0 to 5"),
        ((), r"\(none\): each is taken once"),
        ((2, 1), r"each is taken once, in the order of the model"),
        ((1, 1), r"each is taken once"),
        (range(6), r"these are all 6 layers"),
    ],
)
def test_numbers_that_cannot_be(tmp_path: Path, layers: tuple[int, ...], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        small(llama(tmp_path / "base"), tmp_path, *layers)
    assert caught.value.hint


def test_more_layers_than_the_configuration_says_are_refused(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ConfigError, match=r"num_hidden_layers=5 and 0 lists of so many layers: .* model\.layers\.0 to 5"):
        small(base, tmp_path, 0, 2)


def test_version_records_its_parent_and_layers(catalog: Catalog, tiny_model_dir: Path) -> None:
    parent = import_model(catalog, tiny_model_dir, "tiny", licence="apache-2.0")
    version = shrink(catalog, parent.id, [1], "tiny-half")
    assert (version.status, version.weights, version.base_model, version.licence) == (
        "imported",
        "full",
        parent.id,
        "apache-2.0",
    )
    assert version.source == f"layers 1 of tiny {parent.id}"
    assert version.parents() == (parent.id,)
    assert catalog.store.is_published(paths.model(version.id))
    assert shrink(catalog, parent.id, [1], "tiny-half").id == version.id
    assert not [path for path in catalog.store.list("models") if "/." in path]
    adapter = ModelVersion(
        name="a", status="accepted", weights="adapter", files=(), files_digest="x", base_model=parent.id, licence=""
    ).sealed()
    catalog.put(adapter)
    with pytest.raises(ConfigError, match=f"{adapter.id} is an adapter on {parent.id}"):
        shrink(catalog, adapter.id, [0], "x")
    catalog.append(Event(kind="model", subject=parent.id, data={"state": "archived"}))
    with pytest.raises(PolicyError, match=f"{parent.id} is archived"):
        shrink(catalog, parent.id, [0], "x")
    catalog.append(Event(kind="model", subject=parent.id, data={"state": "withdrawn", "erasure": "er_1"}))
    with pytest.raises(PolicyError, match="learned from rows that er_1 erased"):
        shrink(catalog, parent.id, [0], "x")


def test_what_is_made_of_a_version_is_no_import_while_it_is_written(
    catalog: Catalog, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An erasure waits for it, and a killed one is listed and removed as a half-built folder."""
    parent, opened = import_model(catalog, tiny_model_dir, "tiny"), Store.staged_dir
    names: list[str] = []
    monkeypatch.setattr(Store, "staged_dir", lambda self, name: names.append(name) or opened(self, name))
    shrink(catalog, parent.id, [1], "half")
    add_tokens(catalog, parent, ("<city>",), "more")
    assert len(names) == 2
    for name in names:
        folder = name.removeprefix("models/")
        assert folder.startswith(HALF)
        assert not folder.startswith(IMPORTS)
