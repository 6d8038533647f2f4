"""GGUF: what is written reads back as the same model; what the format has no name for is refused by its own name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import make_adapter, register
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import forge_ray.export.gguf_check as gguf_check
import forge_ray.export.gguf_file as gguf_file
import forge_ray.models.gguf_settings as gguf_settings
from forge_ray.errors import ConfigError
from forge_ray.export.gguf_check import check_read_back
from forge_ray.export.gguf_file import write_gguf
from forge_ray.export.gguf_tokens import pre_tokenizer_of, tokens_of
from forge_ray.export.leave import export_version
from forge_ray.models.import_model import convert_gguf, import_model
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.train.model import merge_adapter

pytestmark = pytest.mark.unit
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "vocab_size": 410,  # rows beyond the tokens are padding
}
TEXT = "How do I reset my password? 123"


def make(folder: Path, family: str, tokenizer: Path, config: str = "", **settings: Any) -> Any:
    """A random model whose norms are far from one, so that an offset would show."""
    import transformers

    torch.manual_seed(1)
    values = getattr(transformers, config or f"{family}Config")(**SMALL | settings)
    model = getattr(transformers, f"{family}ForCausalLM")(values)
    for weights in model.parameters():
        if weights.dim() == 1:
            torch.nn.init.normal_(weights, 0.7, 0.2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder)
    return model.eval()


def write(folder: Path, precision: str = "fp32") -> Path:
    path = folder.with_suffix(".gguf")
    write_gguf(folder, path, "a model", "MIT", precision, lambda number, total: None)
    return path


def logits(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        values: torch.Tensor = model(torch.tensor([[10, 11, 12, 13, 40, 42, 44]])).logits
    return values


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.large)])
def test_exported_gguf_comes_back_with_the_logits_of_the_merged_model(
    precision: Any, catalog: Catalog, tiny_model_dir: Path, tmp_path: Path
) -> None:
    base = register(catalog, tiny_model_dir, None, "tiny")
    adapter = register(catalog, make_adapter(tiny_model_dir, tmp_path / "adapter", seed=4), base, "help desk/1")
    export_version(catalog, adapter.id, str(tmp_path / "merged"), "merged", precision)
    left = export_version(catalog, adapter.id, str(tmp_path / "gguf"), "gguf", precision)
    assert left.notes == ()
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == [
        "README.md",
        "bom.cdx.json",
        f"help-desk-1-{precision}.gguf",
    ]
    file = tmp_path / "gguf" / f"help-desk-1-{precision}.gguf"
    imported = import_model(catalog, file, "back")
    folder = catalog.store.local(paths.model(imported.id))
    assert imported.base_model == adapter.id  # what is erased from the adapter reaches it
    assert import_model(catalog, file, "twice") == imported
    assert torch.equal(logits(folder), logits(tmp_path / "merged"))
    own, back = (AutoTokenizer.from_pretrained(path) for path in (tiny_model_dir, folder))
    assert own.chat_template == back.chat_template
    assert own(TEXT)["input_ids"] == back(TEXT)["input_ids"]
    assert len(back) == len(own)  # the reader's class adds a token of its own, which has no row


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "head_dim": 16}
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "pad_token_id": 0, "sliding_window": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2 with biases": ("Qwen2", {}),
    "qwen3 with norms of heads": ("Qwen3", {"head_dim": 128}),
    "positions of llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "positions of yarn": ("Qwen2", {"rope_parameters": YARN}),
    "positions of yarn with bounds": ("Llama", {"rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}}),
    "linear positions": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "experts": ("Qwen3Moe", EXPERTS | {"moe_intermediate_size": 32}),
}


@pytest.mark.parametrize(
    "name", [name if name == "llama" else pytest.param(name, marks=pytest.mark.large) for name in FAMILIES]
)
def test_family_reads_back_equal_in_every_precision(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    family, settings = FAMILIES[name]
    make(tmp_path / "model", family, tiny_model_dir, **settings)
    for precision in ("fp32", "bf16", "fp16"):
        assert check_read_back(write(tmp_path / "model", precision), tmp_path / "model", precision) == ()
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.attn_norm.weight"]) == ("F16", "F32")
    assert ("output.weight" in kinds) == (not settings.get("tie_word_embeddings", False))
    convert_gguf(write(tmp_path / "model"), tmp_path / "back", torch.float32)
    assert torch.equal(logits(tmp_path / "back"), logits(tmp_path / "model"))


def test_experts_are_stacked_and_their_router_is_fp32(tiny_model_dir: Path, tmp_path: Path) -> None:
    make(tmp_path / "model", "Qwen3Moe", tiny_model_dir, **EXPERTS, moe_intermediate_size=32)
    reader = gguf.GGUFReader(write(tmp_path / "model", "bf16"))
    shapes = {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()) for tensor in reader.tensors}
    assert shapes["blk.1.ffn_gate_exps.weight"] == ("BF16", [64, 32, 4])
    assert shapes["blk.1.ffn_down_exps.weight"] == ("BF16", [32, 64, 4])
    assert shapes["blk.1.ffn_gate_inp.weight"] == ("F32", [64, 4])
    convert_gguf(tmp_path / "model.gguf", tmp_path / "back")
    assert any(".experts.3.down_proj.weight" in name for name in gguf_file.stored_files(tmp_path / "back"))


@pytest.mark.parametrize("family", ["Gemma2", pytest.param("Gemma3", marks=pytest.mark.large)])
def test_norms_with_an_offset_are_written_as_the_sum(family: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The weights; the reader has a class for the tokenizers of these models that does not read byte-level ones."""
    source, back = tmp_path / "model", tmp_path / "back"
    model = make(source, family, tiny_model_dir, "Gemma3TextConfig" if family == "Gemma3" else "", **GEMMA)
    file = write(source)
    norm = next(one for one in gguf.GGUFReader(file).tensors if one.name == "blk.0.attn_norm.weight")
    expected = model.model.layers[0].input_layernorm.weight.detach() + 1
    assert torch.equal(torch.from_numpy(norm.data.copy()), expected)
    convert_gguf(file, back, torch.float32)
    assert torch.allclose(logits(back), logits(source), atol=1e-4)
    gguf_check._compare_tensors(source, back, model.config, "fp32")
    gguf_check._compare_settings(model.config.to_dict(), AutoConfig.from_pretrained(back).to_dict())
    assert gguf_file.offset_norms(source) == {name for name, one in model.named_parameters() if "norm" in name}
    make(tmp_path / "llama", "Llama", tiny_model_dir)
    assert gguf_file.offset_norms(tmp_path / "llama") == frozenset()


def test_divisors_of_positions_from_elsewhere_are_read_or_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Published settings of llama3 are recognised without our note; others are refused, not passed over."""
    rope = LLAMA3 | {"original_max_position_embeddings": 8192}
    for number, (settings, is_read) in enumerate(((rope, True), (LLAMA3, False))):
        source = tmp_path / str(number)
        make(source, "Llama", tiny_model_dir, rope_parameters=settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf_settings, "SETTINGS_KEY", "someone.else")
            file = write(source)
        if is_read:
            convert_gguf(file, tmp_path / "back", torch.float32)
            assert torch.equal(logits(tmp_path / "back"), logits(source))
        else:
            with pytest.raises(
                ConfigError, match=r"rope_freqs\.weight, a scale of positions whose settings it does not say"
            ):
                convert_gguf(file, tmp_path / "other", torch.float32)


def test_scaled_positions_that_are_not_read_are_refused_by_the_import(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    make(source, "Llama", tiny_model_dir, rope_parameters=YARN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_rope_scaling_type", lambda self, kind: self.add_string(SCALING, "longrope"))
        file = write(source)
    with pytest.raises(
        ConfigError, match=r"scales positions by llama\.rope\.scaling\.type='longrope', which is not read"
    ) as raised:
        convert_gguf(file, tmp_path / "back", torch.float32)
    assert "safetensors" in raised.value.hint


@pytest.mark.large
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_says_what_transformers_says(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """24 greedy tokens of llama.cpp itself, where its bindings are installed (`pip install xllamacpp`)."""
    xllamacpp = pytest.importorskip("xllamacpp")
    family, settings = FAMILIES[name]
    model = make(tmp_path / "model", family, tiny_model_dir, **settings)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(write(tmp_path / "model"))
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads, parameters.warmup = 256, 1, 1, False
    server = xllamacpp.Server(parameters)
    reply = server.handle_completions({"prompt": TEXT, "n_predict": 24, "temperature": 0, "ignore_eos": True})
    assert reply["usage"]["prompt_tokens"] == ids.shape[1]
    assert reply["choices"][0]["text"] == tokenizer.decode(answer)


SCALING = "llama.rope.scaling.type"
UNNAMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a setting": (
        "Mistral",
        {"sliding_window": 16},
        "config.json has sliding_window=16, and of the GGUF file it reads null",
    ),
    "scaled positions": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope_parameters of rope_type 'dynamic' have no name in GGUF",
    ),
    "a setting of positions": (
        "Llama",
        {"rope_parameters": YARN | {"attention_factor": 1.5}},
        "rope_parameters of rope_type 'yarn' with attention_factor have no name in GGUF",
    ),
    "an architecture": ("Mixtral", {"num_local_experts": 4}, "GGUF has no architecture for model_type 'mixtral'"),
    "weights of experts that are not normalised": (
        "Qwen3Moe",
        EXPERTS | {"moe_intermediate_size": 32, "norm_topk_prob": False},
        "config.json has norm_topk_prob=false, and of the GGUF file it reads true",
    ),
    "a scale of attention": ("Gemma2", GEMMA | {"head_dim": 16}, "query_pre_attn_scalar=256, .* by the width of a head, 16"),
    "a tokenizer of the family": ("Gemma2", GEMMA, r"the token '.*' \(\d+\) reads back from the GGUF file as None"),
    "an architecture without a reader": ("Olmo2", {}, "model_type 'olmo2' cannot be read back to check it"),
    "no bias in the format": ("Llama", {"attention_bias": True}, "config.json has attention_bias=true"),
}
QUICK = ("a setting", "scaled positions", "an architecture")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.large) for name in UNNAMED]
)
def test_what_the_format_has_no_name_for_is_refused_by_its_own(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    family, settings, message = UNNAMED[name]
    make(tmp_path / "model", family, tiny_model_dir, **settings)
    with pytest.raises(ConfigError, match=message) as raised:
        check_read_back(write(tmp_path / "model"), tmp_path / "model", "fp32")
    assert "--form merged" in raised.value.hint


def test_rows_in_the_wrong_order_are_found(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is not of our own making: without the order of rows that llama.cpp wants, it refuses the file."""
    make(tmp_path / "model", "Llama", tiny_model_dir)
    monkeypatch.setattr(gguf_file, "ROTATED_PAIRS", ())
    with pytest.raises(ConfigError, match=r"'model.layers.0.self_attn.k_proj.weight' reads back .* other numbers"):
        check_read_back(write(tmp_path / "model"), tmp_path / "model", "fp32")


def test_number_that_fp16_cannot_hold_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = make(tmp_path / "model", "Llama", tiny_model_dir)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 70_000.0
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"lm_head\.weight holds 70000, and fp16 ends at 65504"):
        write(tmp_path / "model", "fp16")


def test_sum_that_fp16_cannot_hold_is_refused(catalog: Catalog, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The base and the adapter each fit; the merged weights do not."""
    base = register(catalog, tiny_model_dir, None, "tiny")
    folder = make_adapter(tiny_model_dir, tmp_path / "adapter", seed=4)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: weight * 2e3 for name, weight in weights.items()}, folder / "adapter_model.safetensors")
    adapter = register(catalog, folder, base, "loud")
    with pytest.raises(ConfigError, match=r"holds .*, and fp16 ends at 65504") as raised:
        export_version(catalog, adapter.id, str(tmp_path / "out"), "gguf", "fp16")
    assert "--precision bf16" in raised.value.hint
    assert not (tmp_path / "out").exists()
    half, model = tmp_path / "half", AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float16)
    shutil.copytree(tiny_model_dir, half, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(half)
    with pytest.raises(ConfigError, match=r"once the adapter is added to it, and the base's float16 ends at 65504"):
        merge_adapter(half, folder, tmp_path / "merged")
    assert not list(tmp_path.glob("merged/*.safetensors"))


def byte_level(use_regex: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def split(pattern: str) -> dict[str, Any]:
    steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, byte_level(False)]
    return {"type": "Sequence", "pretokenizers": steps}


QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGITS = {"type": "Digits", "individual_digits": True}
BPE = {"type": "BPE", "ignore_merges": False}
PRE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "GPT-2": (BPE, byte_level(), "gpt-2"),
    "SmolLM": (BPE, {"type": "Sequence", "pretokenizers": [DIGITS, byte_level()]}, "smollm"),
    "Qwen2": (BPE, split(QWEN2), "qwen2"),
    "Llama 3": (BPE | {"ignore_merges": True}, split(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "llama-bpe"),
}


@pytest.mark.parametrize("name", PRE)
def test_pre_tokenizer_has_the_name_that_llama_cpp_knows(name: str) -> None:
    model, pre, expected = PRE[name]
    assert pre_tokenizer_of({"model": model, "pre_tokenizer": pre}) == expected


NO_NAME: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None, str]] = {
    "SentencePiece": (BPE | {"byte_fallback": True}, byte_level(), None, "the tokenizer is BPE with byte fallback"),
    "Unigram": ({"type": "Unigram"}, byte_level(), None, "the tokenizer is Unigram"),
    "a normalizer": (BPE, byte_level(), {"type": "Lowercase"}, "normalizer 'Lowercase' has no name"),
    "a pattern": (BPE, split(r"\p{L}+"), None, r"pattern '.*' has no name"),
    "Llama 3's pattern without its rule": (BPE, split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), None, "has no name"),
    "another kind": (BPE, {"type": "Whitespace"}, None, "pre-tokenizer 'Whitespace' has no name"),
    "a space in front": (BPE, byte_level() | {"add_prefix_space": True}, None, "pre-tokenizer 'ByteLevel' has no name"),
    "none": (BPE, {}, None, "pre-tokenizer None has no name"),
}


@pytest.mark.parametrize("name", NO_NAME)
def test_tokenizer_without_a_name_is_refused(name: str) -> None:
    model, pre, normalizer, message = NO_NAME[name]
    with pytest.raises(ConfigError, match=message) as raised:
        pre_tokenizer_of({"model": model, "pre_tokenizer": pre, "normalizer": normalizer})
    assert "--form merged" in raised.value.hint


def test_every_row_has_a_token_and_its_kind() -> None:
    added = [{"id": 1, "content": "<|end|>", "special": True}, {"id": 3, "content": "<think>", "special": False}]
    tokens, kinds = tokens_of({"model": {"vocab": {"a": 0, "b": 2}}, "added_tokens": added}, 5)
    assert tokens == ["a", "<|end|>", "b", "<think>", "[PAD4]"]
    assert [kind.name for kind in kinds] == ["NORMAL", "CONTROL", "NORMAL", "USER_DEFINED", "UNUSED"]


def test_tokenizer_that_is_no_tokenizer_json_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    make(tmp_path / "model", "Llama", tiny_model_dir)
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        write(tmp_path / "model")


def test_gguf_from_elsewhere_is_read_in_the_precision_of_its_tensors(tiny_model_dir: Path, tmp_path: Path) -> None:
    make(tmp_path / "model", "Llama", tiny_model_dir)
    for precision, expected in (("fp32", "float32"), ("fp16", "bfloat16")):
        (folder := tmp_path / precision).mkdir()
        convert_gguf(write(tmp_path / "model", precision), folder)
        assert json.loads((folder / "config.json").read_text())["dtype"] == expected
