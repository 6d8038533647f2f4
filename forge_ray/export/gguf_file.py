"""A Hugging Face folder → one GGUF file, as llama.cpp's own converter (`convert_hf_to_gguf.py`) writes it.

The names of tensors are those of the `gguf` package (`get_tensor_name_map`). Matrices are written in the precision that is
asked for, tensors of one dimension and routers in fp32, for llama.cpp computes with them in fp32. The experts of a layer
are stacked, and norms that multiply by 1 + weight are written as that sum. Tensors are read, converted and written one at a
time, so the memory is that of the largest one. What has no name in the format is refused by its own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open

from forge_ray.errors import ConfigError
from forge_ray.export.gguf_tokens import add_tokenizer
from forge_ray.models.architecture import empty_model
from forge_ray.models.gguf_settings import FREQUENCIES, add_rope, divisors

HF_INSTEAD = "export it with --form merged: transformers and vLLM open that"
# model_type of transformers → architecture in GGUF, where they differ by more than underscores
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
# Here the rows of q and k are stored in the order of Meta's own checkpoints: pairs of a rotation side by side
ROTATED_PAIRS = ("llama",)
EXPERT = re.compile(r"(\.experts)\.(\d+)(\.)")  # the files have one tensor for each, the format one for all
ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
SKIPPED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")  # computed, not learned
TYPES = {
    "fp32": (torch.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "fp16": (torch.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
# Field of a transformers configuration → the methods of `GGUFWriter` that write it
FIELDS: dict[str, tuple[str, ...]] = {
    "max_position_embeddings": ("add_context_length",),
    "hidden_size": ("add_embedding_length",),
    "num_hidden_layers": ("add_block_count",),
    "intermediate_size": ("add_feed_forward_length",),
    "num_attention_heads": ("add_head_count",),
    "num_key_value_heads": ("add_head_count_kv",),
    "rms_norm_eps": ("add_layer_norm_rms_eps",),
    "vocab_size": ("add_vocab_size",),
}
# The same for fields that a configuration may lack, or have as None
OPTIONAL = {
    "sliding_window": "add_sliding_window",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
    "num_experts": "add_expert_count",
    "num_experts_per_tok": "add_expert_used_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
}


@dataclass(frozen=True)
class Layout:
    """How the tensors of a folder are written: `names` maps a tensor in GGUF to those of the folder, several where they are
    stacked; `offset` are norms that multiply by 1 + weight."""

    names: dict[str, tuple[str, ...]]
    offset: frozenset[str]


def write_gguf(source: Path, path: Path, name: str, licence: str, precision: str, done: Callable[[int, int], None]) -> None:
    """Write the model of the folder `source` to `path`. `done` is told the tensors written, and of how many. Raises
    `ConfigError` for an architecture, a tensor or a tokenizer that the format has no name for."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    architecture = architecture_of(config)
    layout = layout_of(source, config, architecture)
    dtype, kind, file_type = TYPES[precision]
    factors = divisors(config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture], use_temp_file=False)
    try:
        writer.add_name(name)
        if licence:
            writer.add_license(licence)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _describe(writer, config)
        add_tokenizer(writer, source, int(config.vocab_size))
        if factors is not None:
            writer.add_tensor_info(FREQUENCIES, factors.shape, _numpy_type(4), factors.nbytes, TYPES["fp32"][1])
        for stored, shape in shapes(source, layout):
            is_fp32 = _is_fp32(stored, len(shape))
            numbers = torch.Size(shape).numel()
            width = 4 if is_fp32 else dtype.itemsize
            written_as = gguf.GGMLQuantizationType.F32 if is_fp32 else kind
            # a type of numpy that is not uint8: the shape is then one of elements
            writer.add_tensor_info(stored, shape, _numpy_type(width), numbers * width, written_as)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.contiguous().view(torch.uint8).numpy())
        for number, (stored, tensor) in enumerate(tensors(source, layout), 1):
            values = converted(stored, tensor, layout, config, architecture, precision)
            writer.write_tensor_data(values.reshape(-1).view(torch.uint8).numpy())
            done(number, len(layout.names))
    finally:
        writer.close()


def architecture_of(config: Any) -> gguf.MODEL_ARCH:
    """The architecture in GGUF of a transformers configuration."""
    name = ARCHITECTURES.get(config.model_type, config.model_type.replace("_", ""))
    for architecture, own in gguf.MODEL_ARCH_NAMES.items():
        if own == name:
            return architecture
    raise ConfigError(f"GGUF has no architecture for model_type {config.model_type!r}", hint=HF_INSTEAD)


def layout_of(source: Path, config: Any, architecture: gguf.MODEL_ARCH) -> Layout:
    """The tensors of the folder by their names in GGUF, sorted by those of the folder."""
    name_map = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    stacks: dict[str, dict[int, str]] = {}
    for stored in sorted(stored_files(source)):
        if stored.endswith(SKIPPED) or (config.tie_word_embeddings and stored == "lm_head.weight"):
            continue
        expert = EXPERT.search(stored)
        one_for_all = EXPERT.sub(r"\1\3", stored)
        name = name_map.get_name(one_for_all, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigError(
                f"the tensor {stored!r} has no name in GGUF's architecture {gguf.MODEL_ARCH_NAMES[architecture]!r}",
                hint=HF_INSTEAD,
            )
        stacks.setdefault(name, {})[int(expert.group(2)) if expert else 0] = stored
    names = {name: tuple(stack[number] for number in sorted(stack)) for name, stack in stacks.items()}
    return Layout(names, offset_norms(source) & {stored for stack in names.values() for stored in stack})


@torch.no_grad()
def offset_norms(source: Path) -> frozenset[str]:
    """Names of the weights of norms that multiply by 1 + weight: of a weight of zeros something comes through."""
    names = set()
    for name, module in empty_model(source).named_modules():
        own = dict(module.named_parameters())
        if own.keys() != {"weight"} or own["weight"].dim() != 1 or list(module.children()):
            continue
        probe = module.to_empty(device="cpu")
        probe.weight.zero_()
        if bool(probe(torch.linspace(1, 2, own["weight"].shape[0])[None]).any()):
            names.add(f"{name}.weight")
    return frozenset(names)


def stored_files(source: Path) -> dict[str, Path]:
    """Tensor of the folder → its file."""
    files: dict[str, Path] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def shapes(source: Path, layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name in GGUF, shape as it is written) of every tensor."""
    files = stored_files(source)
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, "pt")) for path in sorted(set(files.values()))}
        for name, stored in layout.names.items():
            shape = tuple(opened[files[stored[0]]].get_slice(stored[0]).get_shape())
            yield name, (len(stored), *shape) if EXPERT.search(stored[0]) else shape


def tensors(source: Path, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in GGUF, tensor of the folder, experts stacked), one at a time; the files are mapped, not read."""
    files = stored_files(source)
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, "pt")) for path in sorted(set(files.values()))}
        for name, stored in layout.names.items():
            parts = [opened[files[one]].get_tensor(one) for one in stored]
            yield name, torch.stack(parts) if EXPERT.search(stored[0]) else parts[0]


def converted(
    name: str, tensor: torch.Tensor, layout: Layout, config: Any, architecture: gguf.MODEL_ARCH, precision: str
) -> torch.Tensor:
    """The tensor as it is written: its rows in the format's order, in the format's type."""
    stored = layout.names[name][0]
    if gguf.MODEL_ARCH_NAMES[architecture] in ROTATED_PAIRS and ".self_attn." in stored:
        part = stored.rsplit(".", 2)[1]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
        if heads:
            tensor = pairs_together(tensor, heads)
    if stored in layout.offset:
        tensor = tensor.float() + 1
    return rounded(name, stored, tensor, precision).contiguous()


def read_back(name: str, tensor: torch.Tensor, layout: Layout, precision: str) -> torch.Tensor:
    """The tensor of the folder as the file gives it back, in fp32: of a norm with an offset, what the sum leaves of it."""
    if layout.names[name][0] in layout.offset:
        return (tensor.float() + 1) - 1
    return rounded(name, layout.names[name][0], tensor, precision).float()


def _is_fp32(name: str, num_dimensions: int) -> bool:
    return num_dimensions < 2 or name.endswith(ROUTERS)


def pairs_together(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads · 2 · pairs, …] from halves, as transformers has them, to pairs side by side: `LlamaModel.permute` of
    llama.cpp's converter."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def rounded(name: str, stored: str, tensor: torch.Tensor, precision: str) -> torch.Tensor:
    """In the type that the file holds it in. Raises `ConfigError` for a number that fp16 cannot hold."""
    values = tensor.to(torch.float32 if _is_fp32(name, tensor.dim()) else TYPES[precision][0])
    if precision == "fp16" and bool(values.isinf().any()) and not bool(tensor.isinf().any()):
        raise ConfigError(
            f"{stored} holds {float(tensor.abs().max()):g}, and fp16 ends at 65504",
            hint="--precision bf16 holds it, or fp32",
        )
    return values


def _numpy_type(width: int) -> Any:
    import numpy as np

    return np.dtype(np.float32 if width == 4 else np.float16)


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    """The shape of the model. What a configuration says beyond this is found by the check that reads the file back."""
    for field, methods in FIELDS.items():
        value = getattr(config, field, None)
        if value is None:
            raise ConfigError(f"config.json has no {field}, which GGUF needs", hint=HF_INSTEAD)
        for method in methods:
            getattr(writer, method)(value)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    for field, method in OPTIONAL.items():
        if (value := getattr(config, field, None)) is not None:
            getattr(writer, method)(value)
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale is not None and scale != head:
        raise ConfigError(
            f"config.json has query_pre_attn_scalar={scale}, and of a GGUF file attention is scaled by the width of a head,"
            f" {head}",
            hint=HF_INSTEAD,
        )
    add_rope(writer, config, HF_INSTEAD)
