"""What a record is: chat, plain text, preference or feedback; its identity and the texts in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from forge_ray.config.data import Mapping, Shape
from forge_ray.data.read.strict_json import MAX_DEPTH, Reject, checked, decode
from forge_ray.data.record.columns import lookup, type_name
from forge_ray.data.record.images import Images, ReadImage
from forge_ray.data.record.shapes import convert
from forge_ray.data.record.turns import ROLES, content_of, same_arguments
from forge_ray.records import canonical_json

__all__ = [
    "KINDS",
    "MAX_DEPTH",
    "RECORD_HEX",
    "ROLES",
    "DataRecord",
    "Reject",
    "parse_line",
    "parse_record",
    "require_mistral_ids",
    "texts",
    "with_texts",
]

KINDS = ("chat", "text", "preference", "feedback")
LABELS = {"role", "id", "type", "tool_call_id", "name", "tools", "image", "weight"}  # never free text
RECORD_HEX = 24
TURNS = ("messages", "chosen", "rejected", "answer")  # columns of messages


@dataclass(frozen=True)
class DataRecord:
    """Normalised content of one row, and `meta`: columns that the run file names (licence, consent, subject), which are
    neither trained nor part of the record's identity. `images` has the bytes of those that the content names."""

    content: dict[str, Any]
    kind: str = "chat"
    meta: dict[str, str] = field(default_factory=dict)
    images: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def canonical(self) -> bytes:
        """Canonical JSON of the content, arguments of calls in their one form: checked and hashed, so made once.
        Contents are replaced, never changed."""
        return canonical_json(_identity(self.content))

    @property
    def id(self) -> str:
        """`rec_<24 hex>`: a hash of the content, the same wherever the row is found."""
        return "rec_" + hashlib.sha256(self.canonical).hexdigest()[:RECORD_HEX]

    @cached_property
    def json(self) -> str:
        """The content as it is stored. Where a template may print keys in their order (tools, arguments), in that of the
        source; else canonical."""
        if any("tool_calls" in turn for turn in self._turns()) or "tools" in self.content:
            return json.dumps(self.content, separators=(",", ":"), ensure_ascii=False)
        return self.canonical.decode()

    def _turns(self) -> list[dict[str, Any]]:
        return [turn for column in TURNS for turn in self.content.get(column, [])]

    @property
    def messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = self.content.get("messages", [])
        return messages


def parse_line(
    raw: bytes,
    shape: Shape = "auto",
    mapping: Mapping | None = None,
    keep: tuple[str, ...] = (),
    read_image: ReadImage | None = None,
) -> DataRecord:
    """One JSONL line to a record; raises `Reject`."""
    return parse_record(decode(raw), shape, mapping, keep, read_image)


def parse_record(
    value: Any,
    shape: Shape = "auto",
    mapping: Mapping | None = None,
    keep: tuple[str, ...] = (),
    read_image: ReadImage | None = None,
) -> DataRecord:
    """A decoded row to a record; columns that its shape does not name are metadata, kept only where `keep` says so.
    `read_image` reads a path relative to the rows' own file."""
    if not isinstance(value, dict):
        raise Reject(f"not an object: {type_name(value)}")
    images: dict[str, bytes] = {}
    try:
        kind, row = convert(value, shape, mapping)
        content = row if kind == "text" else content_of(kind, row, Images(read_image, images))
    except RecursionError:  # comparing or printing what the row holds besides its turns
        raise Reject("nested too deeply") from None
    record = DataRecord(content, kind, _meta(value, keep) if keep else {}, images)
    record.__dict__["canonical"] = checked(
        _identity(content)
    )  # the property's own place: what was checked is what is hashed
    return record


def _identity(content: dict[str, Any]) -> dict[str, Any]:
    """The content with each call's arguments in the one form of all that mean the same; the content itself without calls."""
    columns = [column for column in TURNS if any("tool_calls" in turn for turn in content.get(column, ()))]
    return content | {column: [_same_calls(turn) for turn in content[column]] for column in columns} if columns else content


def _same_calls(turn: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in turn:
        return turn
    functions = [call["function"] for call in turn["tool_calls"]]
    functions = [f | {"arguments": same_arguments(f["arguments"])} if "arguments" in f else f for f in functions]
    pairs = zip(turn["tool_calls"], functions, strict=True)
    return turn | {"tool_calls": [call | {"function": function} for call, function in pairs]}


def _meta(value: dict[str, Any], keep: tuple[str, ...]) -> dict[str, str]:
    meta: dict[str, str] = {}
    for name in keep:
        column = lookup(value, name)
        if column is None or isinstance(column, (dict, list, tuple, bytes)):
            continue
        meta[name] = ("true" if column else "false") if isinstance(column, bool) else _plain(column)
    return meta


def _plain(value: Any) -> str:
    try:
        text = str(value)
        text.encode()
    except UnicodeEncodeError:
        raise Reject("lone surrogate") from None
    except ValueError:  # more digits than Python writes
        raise Reject("a number is not finite") from None
    if "\x00" in text:
        raise Reject("a NUL character")
    return text


# ---------------------------------------------------------------- texts


def texts(record: DataRecord) -> list[str]:
    """Every string that a person wrote in the record, in order: message contents, answers, tool arguments, plain text."""
    strings: list[str] = []
    _walk(record.content, lambda text: strings.append(text) or text)  # type: ignore[func-returns-value]
    return strings


def with_texts(record: DataRecord, change: Callable[[str], str]) -> DataRecord:
    """The same record with each of its `texts` replaced by `change(text)`."""
    return replace(record, content=_walk(record.content, change))


def _walk(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_walk(item, change) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: item if key in LABELS else _arguments(item, change) if key == "arguments" else _walk(item, change)
        for key, item in value.items()
    }


def _arguments(text: Any, change: Callable[[str], str]) -> Any:
    """Tool arguments are JSON in a string: only the strings in it are text, and what is not changed keeps its form."""
    if not isinstance(text, str):
        return _leaves(text, change)
    before = json.loads(text)
    after = _leaves(before, change)
    return text if after == before else json.dumps(after, ensure_ascii=False)


def _leaves(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_leaves(item, change) for item in value]
    return {key: _leaves(item, change) for key, item in value.items()} if isinstance(value, dict) else value


# ---------------------------------------------------------------- tokenizers


def require_mistral_ids(record: DataRecord) -> None:
    """Mistral's tokenizers take calls only with ids of nine letters and digits; other templates do not care."""
    turns = [turn for column in TURNS for turn in record.content.get(column, [])]
    for turn in turns:
        names = [call.get("id", "") for call in turn.get("tool_calls", [])]
        if turn["role"] == "tool":
            names.append(turn.get("tool_call_id", ""))
        if any(len(name) != 9 or not (name.isascii() and name.isalnum()) for name in names):
            raise Reject("a tool call's id is not nine letters or digits")
