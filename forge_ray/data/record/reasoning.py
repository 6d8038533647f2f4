"""What an assistant thought before it answered: many spellings, one message key, `reasoning_content`.

Read are the fields `reasoning_content`, `reasoning`, `thinking`, `reasoning_details` and `thinking_blocks`, content parts of
type `thinking` or `reasoning`, and `<think>…</think>` at the start of the content. White space around it is not part of it.
"""

from __future__ import annotations

import re
from typing import Any

from forge_ray.data.read.strict_json import Reject
from forge_ray.data.record.columns import type_name

KEY = "reasoning_content"
FIELDS = (KEY, "reasoning", "thinking")
PARTS = ("thinking", "reasoning")
BLOCK_KEYS = ("thinking", "reasoning", "text", "summary")
COPIES = ("reasoning_details", "thinking_blocks")  # what providers send beside one of the others, in pieces
EMPTY: tuple[Any, ...] = (None, "", [], {})
BLOCK = re.compile(r"\s*<think>(.*?)</think>\n*", re.S)


def named_once(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under `reasoning_content` alone, its content without it; without the key where it is
    empty. Two that differ are refused, and one of a turn that no assistant wrote. Call it when parts are joined."""
    texts: dict[str, str] = {}
    rest = dict(message)
    values = {name: rest.pop(name, None) for name in (*FIELDS, *COPIES)}
    for name in FIELDS if any(values[name] not in EMPTY for name in FIELDS) else COPIES:
        if text := text_of(values[name], name).strip():
            texts[f"`{name}`"] = text
    content = rest.get("content")
    if rest.get("role") == "assistant" and isinstance(content, str):
        inside, content = _split(content)
        if inside:
            texts["`<think>`"] = inside
        rest["content"] = content.lstrip("\n") if texts else content
    if len(set(texts.values())) > 1:
        raise Reject(f"a message has reasoning twice, and not the same: {' and '.join(texts)}")
    if not texts:
        return rest
    if rest.get("role") != "assistant":
        raise Reject(f"{next(iter(texts))} is not of an assistant turn")
    return {**rest, KEY: next(iter(texts.values()))}


def _split(content: str) -> tuple[str, str]:
    """The reasoning that the content begins with, and the rest."""
    blocks = []
    while block := BLOCK.match(content):
        blocks.append(block[1].strip())
        content = content[block.end() :]
    return "\n\n".join(filter(None, blocks)), content


def text_of(value: Any, name: str) -> str:
    """The text of a field or part: a string, or the blocks that Mistral, Anthropic and OpenRouter write."""
    if value is None or isinstance(value, str):
        return value or ""
    blocks = value if isinstance(value, list) else [value]
    texts = [_block(block, name) if isinstance(block, dict) else block for block in blocks]
    if any(not isinstance(text, str) for text in texts):
        raise Reject(f"a message's `{name}` is not a text: {type_name(value)}")
    return ("\n\n" if name in COPIES else "").join(filter(None, texts))


def _block(block: dict[str, Any], name: str) -> str:
    for key in BLOCK_KEYS:
        if block.get(key) not in EMPTY:
            return text_of(block[key], name)
    if any(value not in EMPTY for key, value in block.items() if key not in ("type", "closed", "signature")):
        raise Reject(f"a message's `{name}` is not a text: {str(block.get('type'))[:40]!r}")
    return ""
