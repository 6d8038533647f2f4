"""The tokenizer and chat template of a folder → the metadata of a GGUF file.

llama.cpp cuts text by a rule that the file names (`tokenizer.ggml.pre`), not by a pattern that it holds. So the
pre-tokenizer of a `tokenizer.json` must be one of those that have a name; another would be cut otherwise, without an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

from forge_ray.data.tokens.chat import load_tokenizer_dir
from forge_ray.errors import ConfigError

HF_INSTEAD = "export it with --form merged: transformers and vLLM take the tokenizer as it is"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
# (pattern of `Split`, whether numbers are split into digits first, pattern of `ByteLevel`, ignore_merges) → name in GGUF,
# from `llama-vocab.cpp`
PRE_TOKENIZERS: dict[tuple[str, bool, bool, bool], str] = {
    ("", False, True, False): "gpt-2",
    ("", True, True, False): "smollm",
    (CONTRACTIONS + r"\p{N}" + TAIL, False, False, False): "qwen2",
    (CONTRACTIONS + r"\p{N}{1,3}" + TAIL, False, False, True): "llama-bpe",
}


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, num_rows: int) -> None:
    """Write tokens, merges, special tokens, ends of a turn and chat template. `num_rows`: of the embedding; rows without a
    token are padding. Raises `ConfigError` for a tokenizer that has no name in the format."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError("the model has no tokenizer.json, and GGUF holds what is in one", hint=HF_INSTEAD)
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    pre = pre_tokenizer_of(tokenizer)
    tokens, kinds = tokens_of(tokenizer, num_rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=num_rows)
    special.add_to_gguf(writer, quiet=True)
    ends = load_tokenizer_dir(folder).end_ids
    eos = special.special_token_ids.get("eos")
    others = [end for end in ends if end != eos]
    if len(others) > 2:
        raise ConfigError(
            f"a turn ends at {len(ends)} tokens ({', '.join(tokens[end] for end in ends)}), and GGUF names three at most",
            hint=HF_INSTEAD,
        )
    for end, method in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        method(end)


def pre_tokenizer_of(tokenizer: dict[str, Any]) -> str:
    """The name in GGUF of how a `tokenizer.json` cuts text."""
    model = tokenizer["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        what = f"{model['type']} with byte fallback" if model.get("byte_fallback") else model["type"]
        raise ConfigError(
            f"the tokenizer is {what}; byte-level BPE alone is written to GGUF, for merges say all of it", hint=HF_INSTEAD
        )
    if (normalizer := (tokenizer.get("normalizer") or {}).get("type", "NFC")) != "NFC":
        raise ConfigError(f"the tokenizer's normalizer {normalizer!r} has no name in GGUF", hint=HF_INSTEAD)
    pattern, has_digits, has_own_pattern = "", False, False
    pre = tokenizer.get("pre_tokenizer") or {}
    for step in pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                has_own_pattern = bool(step.get("use_regex", True))
            case {"type": "Digits", "individual_digits": True}:
                has_digits = True
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"} if not step.get("invert"):
                pattern += regex
            case _:
                raise ConfigError(
                    f"the tokenizer's pre-tokenizer {step.get('type')!r} has no name in GGUF with these settings",
                    hint=HF_INSTEAD,
                )
    key = (pattern, has_digits, has_own_pattern, bool(model.get("ignore_merges")))
    if key not in PRE_TOKENIZERS:
        raise ConfigError(f"the tokenizer's pattern {pattern or 'of ByteLevel'!r} has no name in GGUF", hint=HF_INSTEAD)
    return PRE_TOKENIZERS[key]


def tokens_of(tokenizer: dict[str, Any], num_rows: int) -> tuple[list[str], list[gguf.TokenType]]:
    """(token, kind) of every row of the embedding."""
    added = {token["id"]: token for token in tokenizer.get("added_tokens", ())}
    tokens = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    tokens |= {number: token["content"] for number, token in added.items()}
    kinds = {
        number: gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        for number, token in added.items()
    }
    rows = range(num_rows)
    return (
        [tokens.get(row, f"[PAD{row}]") for row in rows],
        [kinds.get(row, gguf.TokenType.NORMAL if row in tokens else gguf.TokenType.UNUSED) for row in rows],
    )
