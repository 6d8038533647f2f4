"""Records as Arrow tables with typed columns, one schema per kind, and back without loss."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from forge_ray.data.record.schema import TURNS, DataRecord
from forge_ray.records import canonical_json

CALL = pa.struct(
    [
        ("id", pa.string()),
        ("type", pa.string()),
        ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
    ]
)
PART = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", pa.string())])
MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("parts", pa.list_(PART)),  # a content with images; an Arrow column cannot be text here and a list there
        ("reasoning_content", pa.string()),
        ("name", pa.string()),
        ("tool_calls", pa.list_(CALL)),
        ("tool_call_id", pa.string()),
        ("weight", pa.int8()),
    ]
)
# A tool's parameters are JSON Schema, of any form: text, as no struct could hold two different ones.
PROMPT = [("id", pa.string()), ("messages", pa.list_(MESSAGE)), ("tools", pa.string())]
ARROW: dict[str, pa.Schema] = {
    "chat": pa.schema(PROMPT),
    "text": pa.schema([("id", pa.string()), ("text", pa.string())]),
    "preference": pa.schema(
        [
            *PROMPT,
            *(("chosen", pa.list_(MESSAGE)), ("rejected", pa.list_(MESSAGE))),
            *(("margin", pa.float64()), ("unusable_margin", pa.string())),
        ]
    ),
    "feedback": pa.schema([*PROMPT, ("answer", pa.list_(MESSAGE)), ("label", pa.bool_())]),
}


def to_arrow(records: Sequence[DataRecord]) -> pa.Table:
    """A table of records of one kind, which also says the id of each."""
    kinds = {record.kind for record in records}
    if len(kinds) != 1:
        raise ValueError(f"a table has records of one kind, not of {len(kinds)}: {sorted(kinds)}")
    return pa.Table.from_pylist([_row(record) for record in records], schema=ARROW[kinds.pop()])


def from_arrow(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The contents that the table was made of."""
    for row in table.to_pylist():
        content = _without_nulls({key: item for key, item in row.items() if key != "id"})
        if "tools" in content:
            content["tools"] = json.loads(content["tools"])
        for turn in (turn for column in TURNS for turn in content.get(column, [])):
            if "parts" in turn:
                turn["content"] = turn.pop("parts")
        yield content


def _row(record: DataRecord) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.id, **record.content}
    if "tools" in row:
        row["tools"] = canonical_json(row["tools"]).decode()
    for column in TURNS:
        if column in row:
            row[column] = [_split_content(turn) for turn in row[column]]
    return row


def _split_content(turn: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(turn.get("content"), list):
        return turn
    return {**{key: item for key, item in turn.items() if key != "content"}, "parts": turn["content"]}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
