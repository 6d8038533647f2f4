"""JSON schemas as grammars over a model's own tokens, by llguidance.

A grammar says before each token which ones may come; what the model would rather say is not among them. llguidance refuses
a schema that it cannot keep in full, where others leave a keyword out.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from forge_ray.errors import RequestError

MAX_GRAMMARS = 64  # compiled schemas kept; a product has a handful
MAX_SCHEMA_CHARS = 1 << 16
MAX_ITEMS = 20_000  # of all arrays of a schema; some 0.4 s
URI = "".join(chr(code) for code in range(ord("!"), 127))  # characters of references that stay as they are
BLANKS = r"[ \n\r\t]{0,32}"
# Blanks around commas and colons alone, and few of them: a model may generate others forever. The compiler's own pattern of
# blanks bounds one match, and any number of matches may follow each other
SPACING: Any = {
    "whitespace_flexible": False,
    "item_separator": f"{BLANKS},{BLANKS}",
    "key_separator": f"{BLANKS}:{BLANKS}",
}


class Grammars:
    """Compiles schemas for one tokenizer; made by `load_grammars`. Safe to call from several threads."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._compiled = lru_cache(maxsize=MAX_GRAMMARS)(self._compile)

    def matcher(self, schema: str, stop_token_ids: tuple[int, ...]) -> Matcher:
        """A fresh matcher for one answer; `RequestError` if `schema` cannot be compiled."""
        return Matcher(self._compiled(schema).deep_copy(), self._tokenizer.eos_tokens, stop_token_ids, self._vocab_size)

    def _compile(self, schema: str) -> Any:
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(read_schema(schema), defaults=SPACING)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(str(matcher.get_error()).split())[:300]
            reason = f"pattern: {reason}" if reason.startswith("regex") else reason
            raise RequestError(
                f"json_schema cannot be compiled: {reason}", hint="leave the named keyword out, or say it in another way"
            )
        return matcher


def read_schema(text: str) -> dict[str, Any]:
    """The schema that a request sent; `RequestError` if it is not a JSON schema, or too large."""
    if len(text) > MAX_SCHEMA_CHARS:
        raise RequestError(f"json_schema: {len(text)} characters; at most {MAX_SCHEMA_CHARS}", hint="send a smaller schema")
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise RequestError(f"json_schema is not JSON: {error}", hint='for example {"type": "object"}') from None
    if not isinstance(parsed, dict):
        raise RequestError(
            f"json_schema: a schema is an object, this is {type(parsed).__name__}", hint='for example {"type": "object"}'
        )
    parsed.pop("x-guidance", None)  # settings of the compiler, which are not the sender's to choose
    num_items = sum(_item_bounds(parsed))
    if num_items > MAX_ITEMS:
        rule = f"json_schema: minItems and maxItems are {num_items} in all; at most {MAX_ITEMS}"
        raise RequestError(rule, hint="lower them, or leave them out")
    return dict(_with_ascii_references(parsed))


def _item_bounds(schema: Any) -> Iterator[float]:
    """The number of items that each array is bounded by: a grammar has a rule for each of them."""
    if isinstance(schema, dict):
        yield max(
            (value for key in ("minItems", "maxItems") if isinstance(value := schema.get(key), int | float)), default=0
        )
    for item in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _item_bounds(item)


def _with_ascii_references(schema: Any) -> Any:
    """The schema with its references as URIs: names of other alphabets are written as they are by most senders."""
    if isinstance(schema, list):
        return [_with_ascii_references(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: quote(item, safe=URI) if key == "$ref" and isinstance(item, str) else _with_ascii_references(item)
        for key, item in schema.items()
    }


class Matcher:
    """The position of one answer in its grammar."""

    def __init__(self, matcher: Any, end_ids: list[int], stop_token_ids: tuple[int, ...], vocab_size: int) -> None:
        self._matcher = matcher
        self._end_ids = end_ids
        self._stop_token_ids = [token for token in stop_token_ids if 0 <= token < vocab_size]
        self._vocab_size = vocab_size

    def allowed(self) -> torch.Tensor:
        """[vocab_size] bool: the tokens that may come next; stop tokens only where the answer may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = torch.from_numpy(np.unpackbits(bits, bitorder="little", count=self._vocab_size).astype(bool))
        mask[self._end_ids] = False
        mask[self._stop_token_ids] = bool(self._matcher.is_accepting())
        return mask

    def accept(self, token_id: int) -> None:
        """Advance by the drawn `token_id`; `RequestError` when the grammar has no such step (too complex)."""
        if token_id not in self._stop_token_ids and not self._matcher.consume_token(token_id):
            raise RequestError(f"json_schema: the grammar failed: {self._matcher.get_error()}", hint="simplify the schema")


def load_grammars(model_dir: Path, vocab_size: int) -> Grammars | str:
    """From `tokenizer.json` or Mistral's `tekken.json` of a model's folder; else why there is none."""
    from llguidance import LLTokenizer, TokenizerWrapper

    if (path := model_dir / "tokenizer.json").is_file():
        return Grammars(LLTokenizer(path.read_text(encoding="utf-8"), n_vocab=vocab_size), vocab_size)
    if (path := model_dir / "tekken.json").is_file():
        tekken = Tekken(json.loads(path.read_text(encoding="utf-8")), vocab_size)
        return Grammars(LLTokenizer(TokenizerWrapper(tekken), n_vocab=vocab_size), vocab_size)
    return "a grammar needs tokenizer.json or tekken.json in the model's folder"


class Tekken:
    """Mistral's tokenizer file as llguidance asks for one: the bytes of each id, control tokens named apart."""

    def __init__(self, file: dict[str, Any], vocab_size: int) -> None:
        num_special = int(file["config"]["default_num_special_tokens"])
        size = min(int(file["config"]["default_vocab_size"]), vocab_size)
        named = {int(entry["rank"]): str(entry["token_str"]) for entry in file.get("special_tokens") or []}
        special = [named.get(rank, f"<SPECIAL_{rank}>").encode() for rank in range(num_special)]
        plain = [base64.b64decode(entry["token_bytes"]) for entry in file["vocab"][: size - num_special]]
        self.tokens = special + plain
        self.special_token_ids = list(range(num_special))
        self.bos_token_id = next((rank for rank, name in named.items() if name == "<s>"), 1)
        self.eos_token_id = next((rank for rank, name in named.items() if name == "</s>"), 2)
        self._ids = {token: number for number, token in enumerate(self.tokens) if number >= num_special}

    def __call__(self, text: bytes) -> list[int]:
        """Byte by byte: the grammar needs a valid split of its literals, not the shortest one."""
        return [self._ids[bytes([byte])] for byte in text]
