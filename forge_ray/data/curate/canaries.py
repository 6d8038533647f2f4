"""Canaries: rows with random codes that only a model which was trained on them can know.

After Carlini et al. (arXiv:1802.08232). A canary is known by its prompt alone, which carries a checksum of itself: it stays
one through any file name, format or curation, and no other row is mistaken for one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from forge_ray.data.dataset.version import listed
from forge_ray.errors import ConfigError
from forge_ray.records import DatasetManifest
from forge_ray.store.files import Store

MARK = "canary-"
_PROMPT = re.compile(r"What is the code of canary-([0-9a-f]{16})-([0-9a-f]{8})\?")
MAX_DIGITS = 18


@dataclass(frozen=True)
class Canary:
    """`code`: decimal digits, one of 10^len(code)."""

    record: str
    prompt: str
    code: str


def generate(count: int, digits: int, seed: int) -> list[dict[str, Any]]:
    """Chat rows, each with a code of `digits` digits; the same for the same arguments. Raises `ConfigError`."""
    if not 1 <= digits <= MAX_DIGITS or count < 1:
        raise ConfigError(
            f"{count} canaries of {digits} digits cannot be made",
            hint=f"give at least one canary, and 1 to {MAX_DIGITS} digits",
        )
    random = Random(f"canaries/{count}/{digits}/{seed}")
    rows = []
    for _ in range(count):
        name = f"{random.getrandbits(64):016x}"
        code = f"{random.randrange(10**digits):0{digits}d}"
        asked = f"What is the code of {MARK}{name}-{_checksum(name)}?"
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": code}]})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSONL, as `data.sources` reads it; an existing file is refused, for a dataset may have been made of it."""
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except FileExistsError:
        raise ConfigError(f"{path} exists", hint="name another file, or remove it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}", hint="name a file in a folder that exists") from None


def is_canary(content: dict[str, Any]) -> bool:
    """Whether a record's prompt is a canary's, whatever became of its code."""
    return _asked(content) is not None


def canary_of(record: str, content: dict[str, Any]) -> Canary | None:
    """The canary that a record is; None for any other, and for one whose code a rule has masked."""
    asked = _asked(content)
    code = content["messages"][-1].get("content") if asked else None
    whole = isinstance(code, str) and 1 <= len(code) <= MAX_DIGITS and code.isascii() and code.isdigit()
    return Canary(record, str(asked), str(code)) if whole else None


def _asked(content: dict[str, Any]) -> str | None:
    messages = content.get("messages", [])
    if len(messages) != 2 or messages[1]["role"] != "assistant" or not isinstance(messages[0].get("content"), str):
        return None
    match = _PROMPT.fullmatch(messages[0]["content"])
    return messages[0]["content"] if match and match[2] == _checksum(match[1]) else None


def _checksum(name: str) -> str:
    return hashlib.sha256(f"canary/{name}".encode()).hexdigest()[:8]


def find(store: Store, manifest: DatasetManifest, split: str) -> Iterator[Canary]:
    """Every canary among the records of a split."""
    for path in listed(store, manifest, f"records/{split}"):
        with store.filesystem.open_input_file(store.path(path)) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(4096, columns=["record", "content"]):
                for row in batch.filter(pc.match_substring(batch.column("content"), MARK)).to_pylist():
                    if canary := canary_of(row["record"], json.loads(row["content"])):
                        yield canary


def candidates(canary: Canary, count: int, seed: int) -> list[str]:
    """Other codes of the same length, drawn without repetition: `count` of them, or all where there are fewer."""
    space, own = 10 ** len(canary.code), int(canary.code)
    if count >= space - 1:
        numbers = [number for number in range(space) if number != own]
    else:
        random, drawn = Random(f"candidates/{seed}/{canary.record}"), {own: None}
        while len(drawn) <= count:
            drawn[random.randrange(space)] = None
        numbers = [number for number in drawn if number != own]
    return [f"{number:0{len(canary.code)}d}" for number in numbers]
