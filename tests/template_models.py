"""Tokenizers for the chat templates that trl's package carries, each with its family's special tokens."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# What ends an answer in each family, as its generation config has it; the first is the tokenizer's eos
ENDS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "diffusion_gemma": ["<eos>", "<turn|>"],
    "gemma4": ["<eos>", "<turn|>"],
    "gemma": ["<eos>", "<end_of_turn>"],
    "glm4moe": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>", "<|endoftext|>"],
    "idefics3": ["<|end_of_text|>", "<end_of_utterance>"],
    "lfm2": ["<|im_end|>"],
    "llama3": ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"],
    "llava_next": ["</s>"],
    "muse": ["<|eot|>", "<|eom|>"],
    "nemotron": ["<|im_end|>"],
    "phi3": ["<|endoftext|>", "<|end|>"],
    "qwen": ["<|im_end|>", "<|endoftext|>"],
    "smolvlm": ["<end_of_utterance>"],
}
BEGINS = {"gemma": "<bos>", "llama3": "<|begin_of_text|>", "deepseek": "<｜begin▁of▁sentence｜>", "cohere": "<BOS_TOKEN>"}
BEGINS |= {"lfm2": "<|startoftext|>", "llava_next": "<s>", "diffusion_gemma": "<bos>", "gemma4": "<bos>"}
TOKEN = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜]{1,40}｜>|<\|[a-z_\"]{1,20}>|<[a-z_]{1,20}\|>|</?(?:start|end)_of_[a-z_]+>"
)
PLAIN = ("[INST]", "[/INST]", "<end_of_utterance>", "<tool_call>", "</tool_call>", "<think>", "</think>", "[gMASK]", "<sop>")
VISIBLE = ("<tool_call>", "</tool_call>", "<think>", "</think>")  # added tokens that are not special


def templates() -> dict[str, str]:
    """Name → chat template, of trl's package."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin
    folder = Path(spec.origin).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


def of_family(table: dict[str, Any], name: str) -> Any:
    return next((table[family] for family in sorted(table, key=len, reverse=True) if name.startswith(family)), None)


@lru_cache(maxsize=256)
def tokenizer(name: str, template: str) -> Any:
    """A byte-level tokenizer whose special tokens are those of the family and those that the template writes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AddedToken, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    ends, begin = of_family(ENDS, name) or ["</s>"], of_family(BEGINS, name)
    written = {*TOKEN.findall(template), *(token for token in PLAIN if token in template), *ends}
    tokens = [AddedToken(token, special=token not in VISIBLE, normalized=False) for token in sorted(written)]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=ends[0], pad_token="<|pad|>", bos_token=begin)
    wrapped.add_tokens(tokens)
    wrapped.chat_template = template
    return wrapped
