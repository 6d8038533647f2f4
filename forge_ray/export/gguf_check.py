"""Read a GGUF file back as an import does, and compare it with the folder that it was written from.

The reader is transformers' own, written by others after llama.cpp's converter: an order of rows, an offset or a setting that
this package writes otherwise, or not at all, shows as a difference. It refuses the file by the name of what differs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from forge_ray.errors import ConfigError, first_line
from forge_ray.export.gguf_file import HF_INSTEAD, architecture_of, layout_of, read_back, tensors
from forge_ray.export.gguf_tokens import tokens_of
from forge_ray.models.import_model import convert_gguf
from forge_ray.store.scratch import scratch

# What a configuration says that computes nothing, or is in the file under the tokenizer
BOOKKEEPING = {
    *("architectures", "model_type", "dtype", "transformers_version", "initializer_range", "use_cache", "attention_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "max_window_layers", "router_aux_loss_coef"),
    *("return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type"),
    *("is_encoder_decoder", "chunk_size_feed_forward", "tokenizer_class", "output_router_logits", "router_jitter_noise"),
}
NUMBERS = 1e-6  # relative: GGUF keeps settings in fp32
PROBES = ("Hello, world!\n\n  It's 2026: 12,345.", "Größe, café, 東京 🙂", "\tdef f(x):\n        return x+1")


def check_read_back(path: Path, source: Path, precision: str) -> tuple[str, ...]:
    """Raise `ConfigError` for the first tensor, setting or token of `path` that is not that of the folder `source`.
    Returns notes: what is right in the file and reads differently here."""
    from transformers import AutoConfig

    only: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(source, **only)
    with scratch("merged") as folder:
        try:
            convert_gguf(path, folder, torch.float32)
        except Exception as error:  # the readers of GGUF raise many kinds of errors
            raise ConfigError(
                f"a GGUF file of model_type {config.model_type!r} cannot be read back to check it: {first_line(error)}",
                hint=HF_INSTEAD,
            ) from error
        _compare_settings(config.to_dict(), AutoConfig.from_pretrained(folder, **only).to_dict())
        _compare_tensors(source, folder, config, precision)
        return _compare_tokenizers(source, folder)


def _compare_settings(written: dict[str, Any], back: dict[str, Any]) -> None:
    for name, value in sorted(written.items()):
        if name in BOOKKEEPING or name.startswith("_") or value is None or (value is False and not back.get(name)):
            continue
        if not _is_close(value, back.get(name)):
            raise ConfigError(
                f"config.json has {name}={json.dumps(value)[:100]}, and of the GGUF file it reads"
                f" {json.dumps(back.get(name))[:100]}: the format, or its reader, does not have this setting",
                hint=HF_INSTEAD,
            )


def _is_close(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_is_close(one.get(name), other.get(name)) for name in one.keys() | other.keys())
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=NUMBERS)
    return bool(one == other)


def _compare_tensors(source: Path, folder: Path, config: Any, precision: str) -> None:
    from transformers import AutoConfig

    layout = layout_of(source, config, architecture_of(config))
    back_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    back = layout_of(folder, back_config, architecture_of(back_config))
    if missing := sorted(layout.names.items() ^ back.names.items()):
        raise ConfigError(
            f"the tensor {missing[0][1][0]!r} is not in the GGUF file when it is read back as it was", hint=HF_INSTEAD
        )
    for (name, tensor), (_, read) in zip(tensors(source, layout), tensors(folder, back), strict=True):
        if not torch.equal(read_back(name, tensor, layout, precision), read):
            raise ConfigError(
                f"the tensor {layout.names[name][0]!r} reads back from the GGUF file with other numbers: the format stores"
                " it in a way that is not written here",
                hint=HF_INSTEAD,
            )


def _compare_tokenizers(source: Path, folder: Path) -> tuple[str, ...]:
    from transformers import AutoTokenizer

    own, back = (AutoTokenizer.from_pretrained(path, local_files_only=True) for path in (source, folder))
    names, _ = tokens_of(json.loads((source / "tokenizer.json").read_text(encoding="utf-8")), len(back))
    tokens, read = {token: number for number, token in enumerate(names)}, back.get_vocab()
    if wrong := sorted(token for token, number in tokens.items() if read.get(token) != number):
        raise ConfigError(
            f"the token {wrong[0]!r} ({tokens[wrong[0]]}) reads back from the GGUF file as {read.get(wrong[0])}",
            hint=HF_INSTEAD,
        )
    if own.chat_template != back.chat_template:
        raise ConfigError("the chat template reads back from the GGUF file as another", hint=HF_INSTEAD)
    if all(own(text)["input_ids"] == back(text)["input_ids"] for text in PROBES):
        return ()
    return (
        "`forge models import` of this file cuts text into other tokens than the model was trained with, for its reader does"
        " not have this pre-tokenizer: import the folder of --form merged instead",
    )
