"""A Hugging Face folder → one GGUF file, as llama.cpp's own converter (`convert_hf_to_gguf.py`) writes it.

The names of tensors are those of the `gguf` package (`get_tensor_name_map`). Matrices are written in the precision that is
asked for, tensors of one dimension in fp32, for llama.cpp computes with them in fp32. Tensors are read, converted and
written one at a time, so the memory is that of the largest one. What has no name in the format is refused by its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open

from forge_ray.errors import ConfigError
from forge_ray.export.gguf_tokens import add_tokenizer

HF_INSTEAD = "export it with --form merged: transformers and vLLM open that"
# model_type of transformers → architecture in GGUF, where they differ by more than underscores
ARCHITECTURES = {"mistral": "llama"}
# Here the rows of q and k are stored in the order of Meta's own checkpoints: pairs of a rotation side by side
ROTATED_PAIRS = ("llama",)
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


def write_gguf(source: Path, path: Path, name: str, licence: str, precision: str, done: Callable[[int, int], None]) -> None:
    """Write the model of the folder `source` to `path`. `done` is told the tensors written, and of how many. Raises
    `ConfigError` for an architecture, a tensor or a tokenizer that the format has no name for."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    architecture = architecture_of(config)
    names = tensor_names(source, config, architecture)
    dtype, kind, file_type = TYPES[precision]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture], use_temp_file=False)
    try:
        writer.add_name(name)
        if licence:
            writer.add_license(licence)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _describe(writer, config)
        add_tokenizer(writer, source, int(config.vocab_size))
        for stored, shape in _shapes(source, names):
            is_matrix = len(shape) > 1
            numbers = torch.Size(shape).numel()
            width = dtype.itemsize if is_matrix else 4
            written_as = kind if is_matrix else gguf.GGMLQuantizationType.F32
            # a type of numpy that is not uint8: the shape is then one of elements
            writer.add_tensor_info(names[stored], shape, _numpy_type(width), numbers * width, written_as)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, (stored, tensor) in enumerate(tensors(source, names), 1):
            values = converted(stored, tensor, config, architecture, precision)
            writer.write_tensor_data(values.reshape(-1).view(torch.uint8).numpy())
            done(number, len(names))
    finally:
        writer.close()


def architecture_of(config: Any) -> gguf.MODEL_ARCH:
    """The architecture in GGUF of a transformers configuration."""
    name = ARCHITECTURES.get(config.model_type, config.model_type.replace("_", ""))
    for architecture, own in gguf.MODEL_ARCH_NAMES.items():
        if own == name:
            return architecture
    raise ConfigError(f"GGUF has no architecture for model_type {config.model_type!r}", hint=HF_INSTEAD)


def tensor_names(source: Path, config: Any, architecture: gguf.MODEL_ARCH) -> dict[str, str]:
    """Tensor of the folder → its name in GGUF, in the order of the files."""
    name_map = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names: dict[str, str] = {}
    for stored in stored_names(source):
        if stored.endswith(SKIPPED) or (config.tie_word_embeddings and stored == "lm_head.weight"):
            continue
        name = name_map.get_name(stored, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigError(
                f"the tensor {stored!r} has no name in GGUF's architecture {gguf.MODEL_ARCH_NAMES[architecture]!r}",
                hint=HF_INSTEAD,
            )
        names[stored] = name
    return names


def _files(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def stored_names(source: Path) -> list[str]:
    names = []
    for path in _files(source):
        with safe_open(path, "pt") as file:
            names += list(file.keys())
    return names


def _shapes(source: Path, names: dict[str, str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path in _files(source):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (a handle of safetensors has no iterator)
                if name in names:
                    yield name, tuple(file.get_slice(name).get_shape())


def tensors(source: Path, names: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the folder, one at a time, in the order of the files."""
    for path in _files(source):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in names:
                    yield name, file.get_tensor(name)


def converted(name: str, tensor: torch.Tensor, config: Any, architecture: gguf.MODEL_ARCH, precision: str) -> torch.Tensor:
    """The tensor as it is written: its rows in the format's order, in the format's type."""
    if gguf.MODEL_ARCH_NAMES[architecture] in ROTATED_PAIRS and ".self_attn." in name:
        part = name.rsplit(".", 2)[1]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
        if heads:
            tensor = pairs_together(tensor, heads)
    return rounded(name, tensor, precision).contiguous()


def pairs_together(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads · 2 · pairs, …] from halves, as transformers has them, to pairs side by side: `LlamaModel.permute` of
    llama.cpp's converter."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def rounded(name: str, tensor: torch.Tensor, precision: str) -> torch.Tensor:
    """In the type that the file holds it in. Raises `ConfigError` for a number that fp16 cannot hold."""
    values = tensor.to(TYPES[precision][0] if tensor.dim() > 1 else torch.float32)
    if precision == "fp16" and bool(values.isinf().any()) and not bool(tensor.isinf().any()):
        raise ConfigError(
            f"{name} holds {float(tensor.abs().max()):g}, and fp16 ends at 65504", hint="--precision bf16 holds it, or fp32"
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
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
