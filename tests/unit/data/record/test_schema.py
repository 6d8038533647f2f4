"""Which rows are records, why the others are not, and what makes two rows the same record."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.data.record.schema import MAX_DEPTH, Reject, parse_line, parse_record
from unit.data.record.test_shapes import FORCED, MAPPED, REJECTED

pytestmark = pytest.mark.unit
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
CHAT = {"messages": [USER, ANSWER]}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "parameters": parameters}}


REJECTED_LINES: list[tuple[bytes, str]] = [
    (b"{", "not JSON"),
    (b"", "not JSON"),
    (b"\x00", "a line of NUL bytes: the file is padded, or its end was never written"),
    (b"\x00\x00{", "not JSON"),
    (b'{"text": "a\x00b"}', "not JSON"),
    (b'{"text": "a"} {"text": "b"}', "not JSON"),
    (b'{"text": "a", "score": NaN}', "not JSON"),
    (b'{"text": "a", "score": -Infinity}', "not JSON"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not JSON"),  # more digits than Python turns into a number
    (b'{"text": "a", "text": "b"}', "a key is written twice"),
    (b'{"messages": [{"role": "user", "role": "user", "content": "2+2?"}]}', "a key is written twice"),
    (b'{"text": "a", "meta": {"id": 1, "id": 1}}', "a key is written twice"),
    (rb'{"text": "a\u0000b"}', "a NUL character"),
    (b'{"text": "caf\xe9"}', "not UTF-8"),
    (b"\xff\xfe{\x00}\x00", "not UTF-8"),
    (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),  # a surrogate in bytes
    (rb'{"text": "\ud800"}', "lone surrogate"),
    (rb'{"messages": [{"role": "user", "content": "\udc00"}, {"role": "assistant", "content": "4"}]}', "lone surrogate"),
    (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    (json.dumps(CHAT | {"tools": [tool(nested(MAX_DEPTH))]}).encode(), "nested too deeply"),
    (json.dumps(CHAT | {"tools": [{"limit": 0}]}).replace("0}", "1e999}").encode(), "a number is not finite"),
]

REJECTED_RECORDS: list[tuple[Any, str]] = [
    (None, "not an object: null"),
    ([CHAT], "not an object: a list"),
    ("text", "not an object: a string"),
    ({}, "no columns of a known shape: none"),
    ({"prompt": "2+2?"}, "no columns of a known shape: 'prompt'"),
    (dict.fromkeys("fbdcea", 1), "no columns of a known shape: 'a', 'b', 'c', 'd', 'e', …"),
    (CHAT | {"text": "both"}, "columns of two shapes: chat and text"),
    ({"text": 7}, "`text` is not a string: a number"),
    ({"text": " \n\t"}, "`text` is empty"),
    ({"messages": []}, "`messages` is not a non-empty list"),
    ({"messages": "2+2?"}, "`messages` is not a non-empty list: a string"),
    ({"messages": {"role": "user"}}, "`messages` is not a non-empty list: an object"),
    (CHAT | {"tools": {"add": 1}}, "`tools` is not a list: an object"),
    ({"messages": [USER]}, "no assistant turn to train on"),
    ({"messages": [USER, ANSWER | {"weight": 0}]}, "no assistant turn to train on"),
    ({"messages": [USER, "4"]}, "a message is not an object: a string"),
    ({"messages": [USER, None]}, "a message is not an object: null"),
    ({"messages": [USER, ANSWER | {"trian": False}]}, "a message has an unknown key 'trian'"),
    ({"messages": [USER, ANSWER | {"refusal": "No."}]}, "a message has an unknown key 'refusal'"),
    ({"messages": [USER, ANSWER | {"train": "no"}]}, "a message's `train` is not 0 or 1: 'no'"),
    (
        {"messages": [USER, ANSWER | {"train": True, "weight": 0}]},
        "a message's `weight` and `train` contradict each other",
    ),
    ({"messages": [USER, {"content": "4"}]}, "a message has no role"),
    ({"messages": [USER | {"role": "narrator"}, ANSWER]}, "a message has no known role: 'narrator'"),
    ({"messages": [USER | {"role": ["user"]}, ANSWER]}, "a message has no known role: a list"),
    ({"messages": [USER, {"role": "assistant"}]}, "a message has no content"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "a message has no content"),
    ({"messages": [USER | {"content": {"text": "2+2?"}}, ANSWER]}, "a message's content is not a string: an object"),
    ({"messages": [USER, ANSWER | {"content": " "}]}, "an assistant turn is empty"),
    ({"messages": [USER | {"tool_calls": [CALL]}, ANSWER]}, "`tool_calls` is not a list of an assistant turn"),
    ({"messages": [USER, ANSWER | {"tool_calls": "add"}]}, "`tool_calls` is not a list of an assistant turn"),
    *[
        ({"messages": [USER, ANSWER | {"weight": weight}]}, f"a message's `weight` is not 0 or 1: {value}")
        for weight, value in (
            (2, "2"),
            (-1, "-1"),
            (0.5, "0.5"),
            (True, "True"),
            (False, "False"),
            ("1", "'1'"),
            ([1], "a list"),
            (float("inf"), "inf"),
        )
    ],
    (CHAT | {"tools": [{"limit": float("nan")}]}, "a number is not finite"),
    (CHAT | {"tools": [{"data": b"bytes"}]}, "a value is of a type that JSON lacks"),
]


@pytest.mark.parametrize(("line", "reason"), REJECTED_LINES, ids=range(len(REJECTED_LINES)))
def test_a_line_is_rejected_with_its_reason(line: bytes, reason: str) -> None:
    with pytest.raises(Reject) as error:
        parse_line(line)
    assert str(error.value) == reason


@pytest.mark.parametrize(("value", "reason"), REJECTED_RECORDS, ids=range(len(REJECTED_RECORDS)))
def test_a_record_is_rejected_with_its_reason(value: Any, reason: str) -> None:
    with pytest.raises(Reject) as error:
        parse_record(value)
    assert str(error.value) == reason


@pytest.mark.parametrize(
    "value",
    [
        CHAT,
        {"text": "a"},
        {"text": "a\\u0000b 🙂"},
        {"messages": [{"role": "system", "content": ""}, USER, ANSWER | {"weight": 0}, USER, ANSWER]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, ANSWER]},
        CHAT | {"tools": [tool({"limit": 10**4000})]},
        CHAT | {"tools": [tool(nested(MAX_DEPTH - 5))]},
    ],
    ids=range(7),
)
def test_accepted_content_is_kept_as_it_is(value: dict[str, Any]) -> None:
    assert parse_line(json.dumps(value).encode()).content == value


def test_byte_order_mark_and_carriage_return_are_not_content() -> None:
    line = json.dumps(CHAT).encode()
    assert parse_line(b"\xef\xbb\xbf" + line + b"\r").id == parse_line(line).id


def test_identity_is_the_content_only() -> None:
    identity = parse_record(CHAT).id
    same: list[dict[str, Any]] = [
        {"messages": [{"content": "2+2?", "role": "user"}, {"content": "4", "role": "assistant"}]},
        CHAT | {"id": 7, "source": "tickets", "text": None, "tools": None, "score": 1e300},
        CHAT | {"tools": []},
        {"messages": [USER | {"name": None}, ANSWER | {"weight": 1, "tool_calls": None}]},
        {"messages": [USER | {"tool_calls": []}, ANSWER | {"weight": 1.0, "tool_calls": []}]},
    ]
    assert [parse_record(value).id for value in same] == [identity] * len(same)
    other: list[dict[str, Any]] = [
        {"messages": [USER, ANSWER | {"content": "4 "}]},
        {"messages": [USER | {"weight": 0}, ANSWER]},
        {"messages": [USER | {"name": "ada"}, ANSWER]},
        {"messages": [USER, ANSWER, USER, ANSWER]},
        CHAT | {"tools": [CALL]},
        {"text": "2+2?4"},
    ]
    assert len({identity, *(parse_record(value).id for value in other)}) == len(other) + 1
    assert parse_record({"messages": [USER, ANSWER | {"weight": 0.0}, USER, ANSWER]}).json.count('"weight":0}') == 1


def test_identity_is_pinned() -> None:
    """Ids live in datasets that people keep: a change here orphans them."""
    assert parse_record(CHAT).id == "rec_8cc7bc6d1ed4ebf363400a92"


def test_parquet_and_jsonl_give_the_same_record(tmp_path: Path) -> None:
    """A Parquet struct has every key in every row, null where the row has none."""
    rows: list[dict[str, Any]] = [
        CHAT | {"tools": [{"type": "function", "function": {"name": "add"}}], "origin": "a"},
        {"messages": [USER | {"name": "ada"}, ANSWER | {"weight": 0}, USER, ANSWER], "score": 0.5},
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, ANSWER]},
        {"text": "plain"},
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema(rows)), path)
    from_parquet = [parse_record(row) for row in pq.read_table(path).to_pylist()]
    expected = [parse_line(json.dumps(row).encode()) for row in rows]
    assert from_parquet == expected
    assert [record.id for record in from_parquet] == [record.id for record in expected]


def _schema(rows: list[dict[str, Any]]) -> pa.Schema:
    """The union over all rows: `pa.Table.from_pylist` would take the columns of the first one."""
    return pa.unify_schemas([pa.Table.from_pylist([row]).schema for row in rows], promote_options="permissive")


def test_every_reason_is_explained() -> None:
    page = (Path(__file__).parents[4] / "docs" / "reference" / "quarantine-reasons.md").read_text(encoding="utf-8")
    reasons = {row[-1] for row in [*REJECTED_LINES, *REJECTED_RECORDS, *REJECTED, *FORCED, *MAPPED]}
    assert not [reason for reason in sorted(reasons) if general(reason) not in page]


def general(reason: str) -> str:
    """The reason as the page has it: without the names of this row."""
    for pattern, instead in (
        (r"^columns of two shapes: \w+ and \w+", "columns of two shapes: X and Y"),
        (r"^(no columns of a known shape): .*", r"\1: …"),
        (r"no column `[\w.]+`, which shape \w+", "no column `C`, which shape S"),
        (r"no column `[\w.]+`, which the", "no column `C`, which the"),
        (r"^`[\w.]+` (is not a string|is empty|is not a non-empty list|is not an assistant's answer)", r"`C` \1"),
        (r": (an? (string|number|list|object)|null|'[^']*'|-?[\d.]+|True|False|inf)$", ": V"),
        (r"'[^']*'$", "'…'"),
        (r"^a message's `(weight|train)` (is not|and `\w+`)", r"a message's `weight` \2"),
    ):
        reason = re.sub(pattern, instead, reason)
    return reason
