"""Files → rows: no good row is ever lost, and each bad one is found where the report says it is."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.config.data import DataConfig
from forge_ray.data.ingest import Row, expand, index_file, read_chunk
from forge_ray.data.schema import DataRecord, parse_record
from forge_ray.errors import ConfigError, DataError, NotFound

pytestmark = pytest.mark.unit


def good(number: int) -> dict[str, Any]:
    answer = {"role": "assistant", "content": f"answer {number} ü 🙂"}
    return {"messages": [{"role": "user", "content": f"question {number}"}, answer]}


def line(number: int) -> bytes:
    return json.dumps(good(number), ensure_ascii=number % 2 == 0).encode()


BAD: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "truncated": lambda r, raw: raw[: r.randrange(1, len(raw))],
    "not UTF-8": lambda r, raw: raw.replace(b"answer", b"\xff\xfe" + bytes([r.randrange(0x80, 0xC0)])),
    "NUL": lambda r, raw: raw.replace(b"answer", b"\x00"),
    "nested": lambda r, raw: b"[" * 50_000 + b"]" * 50_000,
    "nested and open": lambda r, raw: b'{"text":' * 5_000,
    "wrong type": lambda r, raw: r.choice([b"7", b"null", b'"text"', b"[]", b'{"text": 7}', b'{"messages": {}}']),
    "no content": lambda r, raw: r.choice([b"{}", b'{"text": ""}', b'{"messages": []}', b'{"prompt": "x"}']),
    "lone surrogate": lambda r, raw: raw.replace(b"answer", rb"\ud83d"),
    "very long": lambda r, raw: b'{"text": "' + b"x" * 300_000,
    "two in one": lambda r, raw: raw + raw,
    "no number": lambda r, raw: b'{"text": "a", "score": NaN}',
    "infinite": lambda r, raw: raw[:-1] + b', "tools": [1e999]}',
}


def read(path: Path, chunk_bytes: int, format: str = "jsonl") -> list[Row]:
    indexed = index_file(str(path), path.name, format, chunk_bytes)
    assert indexed.size == path.stat().st_size
    assert indexed.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    return [row for chunk in indexed.chunks for row in read_chunk(chunk)]


@given(
    seed=st.integers(0, 2**32),
    plan=st.lists(st.sampled_from(["good", "good", "blank", *BAD]), max_size=30),
    chunk_bytes=st.sampled_from([1, 7, 100, 1000, 1 << 20]),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    last_newline=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_every_good_row_survives_and_every_bad_one_is_found(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    plan: list[str],
    chunk_bytes: int,
    newline: bytes,
    last_newline: bool,
) -> None:
    chosen = random.Random(seed)
    lines = [
        line(i) if kind == "good" else chosen.choice([b"", b" \t"]) if kind == "blank" else BAD[kind](chosen, line(i))
        for i, kind in enumerate(plan)
    ]
    data = newline.join(lines) + (newline if last_newline else b"")
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(data)
    rows = read(path, chunk_bytes)

    kinds = {number: kind for number, kind in enumerate(plan, start=1) if kind != "blank"}
    assert [row.line for row in rows] == list(kinds)
    assert [(row.line, row.record) for row in rows if row.record] == [
        (number, parse_record(good(number - 1))) for number, kind in kinds.items() if kind == "good"
    ]
    for row in rows:
        assert (row.record is None) == bool(row.reason)
        raw = data[row.offset :].split(b"\n", 1)[0]
        assert raw.removesuffix(b"\r") == lines[row.line - 1]
        assert row.raw_sha256 == hashlib.sha256(raw).hexdigest()
    assert rows == read(path, 1 << 20)


def test_chunks_are_whole_lines_that_cover_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line(i) for i in range(200)))
    indexed = index_file(str(path), "rows.jsonl", "jsonl", 1000)
    assert indexed.num_lines == 200
    assert len(indexed.chunks) > 10
    assert indexed.chunks[0].start == 0
    assert indexed.chunks[-1].end == indexed.size
    data = path.read_bytes()
    for before, after in zip(indexed.chunks, indexed.chunks[1:], strict=False):
        assert before.end == after.start
        assert data[after.start - 1 : after.start] == b"\n"
        assert after.first_line == data[: after.start].count(b"\n") + 1


@pytest.mark.parametrize(("data", "num_lines"), [(b"", 0), (b"\n", 1), (b"\n\n \n", 3)])
def test_files_without_a_row(tmp_path: Path, data: bytes, num_lines: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    assert index_file(str(path), "rows.jsonl", "jsonl").num_lines == num_lines
    assert read(path, 1) == []


def test_a_line_across_the_read_buffer(tmp_path: Path) -> None:
    """Files are indexed 1 MiB at a time: a line that is longer, and a newline on either side of the border."""
    for size in ((1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20):
        first = json.dumps({"text": "x" * (size - len('{"text": ""}'))}).encode()
        assert len(first) == size
        path = tmp_path / "rows.jsonl"
        path.write_bytes(first + b"\n" + line(1))
        rows = read(path, 1000)
        assert [(row.line, row.offset, row.reason) for row in rows] == [(1, 0, ""), (2, size + 1, "")]


def write_parquet(path: Path, rows: list[dict[str, Any]], group_rows: int) -> None:
    schema = pa.unify_schemas([pa.Table.from_pylist([row]).schema for row in rows], promote_options="permissive")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group_rows)


@pytest.mark.parametrize("group_rows", [1, 3, 100])
def test_parquet_gives_the_records_of_jsonl(tmp_path: Path, group_rows: int) -> None:
    values = [good(i) for i in range(10)] + [{"text": ""}, {"text": "plain", "note": "kept out"}, {"note": "nothing"}]
    write_parquet(tmp_path / "rows.parquet", values, group_rows)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(value) for value in values))
    rows, expected = read(tmp_path / "rows.parquet", 1, "parquet"), read(tmp_path / "rows.jsonl", 1)
    assert [(row.line, row.record, row.reason) for row in rows] == [(row.line, row.record, row.reason) for row in expected]
    assert {row.offset for row in rows} == {-1}
    assert index_file(str(tmp_path / "rows.parquet"), "rows.parquet", "parquet").num_lines == 13


def test_one_bad_value_in_parquet_costs_one_row(tmp_path: Path) -> None:
    texts = pa.StringArray.from_buffers(  # Parquet promises UTF-8, and nobody checks
        3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")
    )
    path = tmp_path / "rows.parquet"
    far = pa.array([2**60] * 3, pa.timestamp("us"))  # a date that Python cannot hold, in a column that does not count
    pq.write_table(pa.table({"text": texts, "when": far}), path)
    rows = read(path, 1, "parquet")
    assert [(row.record, row.reason) for row in rows] == [
        (DataRecord({"text": "a"}, "text"), ""),
        (None, "not UTF-8"),
        (DataRecord({"text": "b"}, "text"), ""),
    ]


def test_parquet_without_a_column_that_counts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "rows.parquet")
    rows = read(tmp_path / "rows.parquet", 1, "parquet")
    assert [(row.line, row.reason) for row in rows] == [(n, "needs either `messages` or `text`") for n in (1, 2)]


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "footer"])
def test_an_unreadable_parquet_file_is_one_rejected_row(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, [good(i) for i in range(20)], 5)
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": line(1), "cut": whole[: len(whole) // 2], "footer": whole[:-40] + bytes(40)}[damage]
    )
    rows = read(path, 1, "parquet")
    assert [(row.file, row.line, row.record, row.reason) for row in rows] == [
        ("rows.parquet", 1, None, "unreadable Parquet file")
    ]


def test_a_torn_row_group_does_not_cost_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, [good(i) for i in range(20)], 5)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    first = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[first : first + 40] = b"\xff" * 40
    path.write_bytes(data)
    rows = read(path, 1, "parquet")
    assert [row.line for row in rows if row.record] == [1, 2, 3, 4, 5, *range(11, 21)]
    (torn,) = [row for row in rows if not row.record]
    assert torn.line == 6
    assert torn.reason.startswith("unreadable row group: ")


def test_sources_are_files_or_globs_sorted_and_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.ndjson", "deep/c.parquet", "rows.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def names(*sources: dict[str, str]) -> list[tuple[str, str]]:
        return [(name, format) for _, name, format in expand(DataConfig.model_validate({"sources": sources}))]

    assert names({"path": "*.*json*"}, {"path": "b.jsonl"}, {"path": "**/*.parquet"}) == [
        ("a.ndjson", "jsonl"),
        ("b.jsonl", "jsonl"),
        ("deep/c.parquet", "parquet"),
    ]
    assert names({"path": str(tmp_path / "rows.txt"), "format": "jsonl"}) == [("rows.txt", "jsonl")]
    with pytest.raises(NotFound, match=r"no file matches 'none\*\.jsonl'"):
        names({"path": "none*.jsonl"})
    with pytest.raises(ConfigError, match="carries a user name or password") as error:
        names({"path": "s3://user:secret@bucket/rows.jsonl"})
    assert "secret" not in str(error.value)
    with pytest.raises(DataError, match=r"rows\.txt' ends neither in \.jsonl nor in \.parquet"):
        names({"path": "rows.txt"})
