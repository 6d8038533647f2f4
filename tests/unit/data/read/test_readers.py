"""Chunks → rows, for every format: what is good arrives, what is bad is named with its place."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.data.read.ingest import index_file
from forge_ray.data.read.readers import Raw, image_reader, read_raw
from forge_ray.data.read.strict_json import Reject
from forge_ray.errors import DataError

pytestmark = [pytest.mark.unit, pytest.mark.slow]
LIMIT = 1 << 20


def read(path: Path, format: str, chunk_bytes: int = 1 << 20, limit: int = LIMIT) -> list[Raw]:
    indexed = index_file(str(path), path.name, format, chunk_bytes=chunk_bytes, max_line_bytes=limit)
    return [row for chunk in indexed.chunks for row in read_raw(chunk, limit)]


def values(rows: list[Raw]) -> list[Any]:
    return [row.reason or (row.value if row.raw is None else json.loads(row.raw.decode("utf-8-sig"))) for row in rows]


def compressed(data: bytes, ending: str) -> bytes:
    return gzip.compress(data) if ending == ".gz" else bytes(pa.compress(data, "zstd", asbytes=True))


ROWS = [{"text": f"row {number} ü 🙂", "n": number} for number in range(50_000)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


# ---------------------------------------------------------------- compressed


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_lines_are_the_lines(tmp_path: Path, ending: str) -> None:
    plain, packed = tmp_path / "rows.jsonl", tmp_path / f"rows.jsonl{ending}"
    plain.write_bytes(LINES)
    packed.write_bytes(compressed(LINES, ending))
    indexed = index_file(str(packed), packed.name, "jsonl")
    assert len(indexed.chunks) == 1
    assert (indexed.size, indexed.sha256) == (packed.stat().st_size, hashlib.sha256(packed.read_bytes()).hexdigest())
    assert (indexed.text_bytes, indexed.num_lines) == (len(LINES), len(ROWS))
    assert read(packed, "jsonl") == read(plain, "jsonl")
    assert indexed.chunks[0].key != index_file(str(plain), plain.name, "jsonl").chunks[0].key


def test_gzip_files_may_follow_one_another(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"n": 1}\n') + gzip.compress(b'{"n": 2}\n'))
    assert values(read(path, "jsonl")) == [{"n": 1}, {"n": 2}]


def test_the_size_of_a_large_compressed_file_is_estimated(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    chosen = random.Random(0)
    data = b"".join(b'{"text": "%064x"}\n' % chosen.getrandbits(256) for _ in range(150_000))
    path.write_bytes(gzip.compress(data, 1))
    indexed = index_file(str(path), path.name, "jsonl")
    assert indexed.text_bytes == pytest.approx(len(data), rel=0.1)
    assert indexed.num_lines == pytest.approx(150_000, rel=0.1)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_cut_compressed_file_gives_the_lines_before_the_cut(tmp_path: Path, ending: str, share: float) -> None:
    whole = compressed(LINES, ending)
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(whole[: int(len(whole) * share)])
    *good, bad = read(path, "jsonl")
    assert values(good) == ROWS[: len(good)]
    assert len(good) >= (share - 0.3) * len(ROWS)  # zstd decodes whole blocks
    assert bad.reason == f"the {'gzip' if ending == '.gz' else 'zstd'} stream is damaged or cut off here"
    assert (bad.line, bad.offset, bad.raw) == (len(good) + 1, LINES.find(b'{"text": "row %d ' % len(good)), None)


def test_corrupt_gzip_is_detected(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(LINES))
    whole[len(whole) // 2 : len(whole) // 2 + 30] = b"\xff" * 30
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(whole)
    rows = read(path, "jsonl")
    assert rows[-1].reason == "the gzip stream is damaged or cut off here"
    assert values(rows[:20_000]) == ROWS[:20_000]
    path.write_bytes(b"\x1f\x8b")
    assert [row.reason for row in read(path, "jsonl")] == ["the gzip stream is damaged or cut off here"]


# ---------------------------------------------------------------- long lines

MEASURE = """
import resource, sys
from forge_ray.data.read.ingest import index_file
from forge_ray.data.read.readers import read_raw
path, format = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
indexed = index_file(path, "x", format)
rows = [row for chunk in indexed.chunks for row in read_raw(chunk, 1 << 20)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(*[f"{r.line}:{r.reason}:{r.sha256}" for r in rows], sep="\\n")
"""


@pytest.mark.parametrize(
    ("name", "format"), [("a.jsonl", "jsonl"), ("a.jsonl.gz", "jsonl"), ("a.json", "json"), ("a.txt", "text")]
)
def test_line_over_the_limit_is_never_held_in_memory(tmp_path: Path, name: str, format: str) -> None:
    long = b'{"text": "' + b"x" * 60_000_000 + b'"}'
    good = b'{"text": "good"}'
    data = {"jsonl": good + b"\n" + long + b"\n" + good, "json": b"[" + b",".join((good, long, good)) + b"]", "text": long}[
        format
    ]
    path = tmp_path / name
    path.write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), format], capture_output=True, text=True, timeout=120, check=True
    )
    grown, *rows = result.stdout.split()[0], *result.stdout.splitlines()[1:]
    fine = hashlib.sha256(good).hexdigest()
    bad = f"longer than max_line_bytes:{hashlib.sha256(long).hexdigest()}"
    assert rows == ([f"1:{bad}"] if format == "text" else [f"1::{fine}", f"2:{bad}", f"3::{fine}"])
    assert int(grown) < 40_000  # KiB


def test_the_limit_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([b"x" * 100, b"x" * 101, b"y", b"x" * 101]))
    rows = read(path, "jsonl", limit=100)
    assert [(row.line, row.offset, row.reason) for row in rows] == [
        (1, 0, ""),
        (2, 101, "longer than max_line_bytes"),
        (3, 203, ""),
        (4, 205, "longer than max_line_bytes"),
    ]


def test_a_file_that_shrank_stops_the_stage(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES)
    (chunk,) = index_file(str(path), path.name, "jsonl").chunks
    path.write_bytes(LINES[:1000])
    with pytest.raises(DataError, match=r"ends at byte 1000, but had .* when it was indexed"):
        list(read_raw(chunk, LIMIT))


# ---------------------------------------------------------------- .json


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b" \n\n"])
def test_a_json_list_is_its_elements(tmp_path: Path, indent: int | None, before: bytes) -> None:
    rows = [*ROWS[:20_000], {"text": 'a "quoted, [text] \\'}, {"deep": [[{"a": [1, {}]}], "]"]}, {}]
    path = tmp_path / "rows.json"
    path.write_bytes(before + json.dumps(rows, indent=indent, ensure_ascii=False).encode() + b"\n")
    raws = read(path, "json")
    assert values(raws) == rows
    assert [row.line for row in raws] == list(range(1, len(rows) + 1))
    data = path.read_bytes()
    for row in raws:
        assert row.raw is not None
        assert data[row.offset : row.offset + len(row.raw)] == row.raw
        assert row.sha256 == hashlib.sha256(row.raw).hexdigest()
    assert index_file(str(path), path.name, "json").num_lines == len(rows)


def test_json_across_the_read_buffer(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for shift in range(8):
        rows = [{"text": "x" * ((1 << 20) - 20 + shift) + '\\"],['}, {"text": "y"}]
        path.write_text(json.dumps(rows))
        assert values(read(path, "json", limit=2 << 20)) == rows


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"[]", []),
        (b"", []),
        (b' {"a":\n 1} ', [{"a": 1}]),
        (b'{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        (b'[{"a": 1}, {"a": 2}', [{"a": 1}, "the list does not end"]),
        (b'[{"a": 1}, {"a": ', [{"a": 1}, "the list does not end"]),
        (b'[{"a": 1}] {"a": 2}', [{"a": 1}, "there is more behind the end of the list"]),
        (b"[7, null]", [7, None]),
    ],
)
def test_json_of_other_forms(tmp_path: Path, data: bytes, expected: list[Any]) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    assert values(read(path, "json")) == expected


def test_invalid_json_element_is_rejected_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": 1}, {"a": nope}, {"a" 2}, {"a": 3}]')
    assert [row.raw for row in read(path, "json")] == [b'{"a": 1}', b'{"a": nope}', b'{"a" 2}', b'{"a": 3}']


# ---------------------------------------------------------------- CSV


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_csv_rows(tmp_path: Path, delimiter: str, newline: str, ending: str) -> None:
    chosen = random.Random(0)
    parts = ["a", "ü🙂", '"', ",", ";", "\t", "\n", " ", ""]
    rows = [{"prompt": f"p{n}", "answer": "".join(chosen.choices(parts, k=6)), "third": ""} for n in range(2000)]
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["prompt", "answer", "third"], delimiter=delimiter, lineterminator=newline)
    writer.writeheader()
    writer.writerows(rows)
    data = out.getvalue().encode("utf-8-sig")
    path = tmp_path / f"rows.csv{ending}"
    path.write_bytes(gzip.compress(data) if ending else data)
    raws = read(path, "csv")
    assert values(raws) == rows
    places = [row.offset for row in raws] + [len(data)]
    for row, end in zip(raws, places[1:], strict=True):
        assert data[: row.offset].count(b"\n") + 1 == row.line
        assert row.sha256 == hashlib.sha256(data[row.offset : end].removesuffix(b"\n")).hexdigest()


def test_invalid_csv_row_is_rejected_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'prompt,answer\r\n1,a\r\n2,b,c\r\n3\r\n\r\n"4,open\r\n5,"a\nb"\r\n6,caf\xe9\r\n7,"x"y\r\n'
        + b"8,"
        + b"z" * 200
        + b'\r\n9,ok\r\n"10,end'
    )
    rows = read(path, "csv", limit=100)
    assert [(row.line, row.value or row.reason) for row in rows] == [
        (2, {"prompt": "1", "answer": "a"}),
        (3, "3 fields where the header has 2"),
        (4, "1 fields where the header has 2"),
        (6, "malformed CSV: ',' expected after '\"'"),
        (7, {"prompt": "5", "answer": "a\nb"}),
        (9, "not UTF-8"),
        (10, "malformed CSV: ',' expected after '\"'"),
        (11, "longer than max_line_bytes"),
        (12, {"prompt": "9", "answer": "ok"}),
        (13, "malformed CSV: unexpected end of data"),
    ]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"a,b,a\n1,2,3\n", "the header names a column twice"),
        (b"sep=;\na;b;a\n1;2;3\n", "the header names a column twice"),
        (b'"a,b\n1,2\n', "the header: malformed CSV: unexpected end of data"),
    ],
)
def test_csv_without_a_usable_header_is_one_rejected_row(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(data)
    assert [(row.line, row.reason) for row in read(path, "csv")] == [(data.count(b"sep") + 1, reason)]


def test_unclosed_quote_costs_one_row_and_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\n"1,x\n' + b"2,y\n" * 50_000)
    rows = read(path, "csv", limit=10_000)
    assert rows[0].reason == "longer than max_line_bytes"
    assert values(rows[1:]) == [{"a": "2", "b": "y"}] * 50_000


# ---------------------------------------------------------------- Parquet and Arrow


def write_arrow(path: Path, table: pa.Table, rows: int, make: Callable[..., Any] = pa.ipc.new_stream) -> None:
    with pa.OSFile(str(path), "wb") as out, make(out, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=rows):
            writer.write_batch(batch)


TABLE = pa.table({"text": [row["text"] for row in ROWS[:3000]], "n": [row["n"] for row in ROWS[:3000]]})


@pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("chunk_bytes", [1, 10_000, 1 << 30])
def test_arrow_chunks_at_any_size(tmp_path: Path, make: Callable[..., Any], chunk_bytes: int) -> None:
    path = tmp_path / "rows.arrow"
    write_arrow(path, TABLE, 100, make)
    indexed = index_file(str(path), path.name, "arrow", chunk_bytes=chunk_bytes)
    assert indexed.num_lines == 3000
    assert len(indexed.chunks) == {1: 30, 1 << 30: 1}.get(chunk_bytes, len(indexed.chunks))
    rows = read(path, "arrow", chunk_bytes)
    assert values(rows) == TABLE.to_pylist()
    assert [row.line for row in rows] == list(range(1, 3001))
    assert {(row.offset, row.sha256) for row in rows} == {(-1, "")}


@pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_with_dictionaries_is_one_chunk(tmp_path: Path, make: Callable[..., Any]) -> None:
    path = tmp_path / "rows.arrow"
    table = TABLE.append_column("kind", pa.array(["a", "b", "a"] * 1000).dictionary_encode())
    write_arrow(path, table, 100, make)
    indexed = index_file(str(path), path.name, "arrow", chunk_bytes=1)
    assert (len(indexed.chunks), indexed.num_lines) == (1, 3000)
    assert values(read(path, "arrow", 1)) == table.to_pylist()


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_a_cut_arrow_file_gives_the_batches_before_the_cut(tmp_path: Path, chunk_bytes: int) -> None:
    path = tmp_path / "rows.arrow"
    write_arrow(path, TABLE, 1000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    *good, bad = read(path, "arrow", chunk_bytes)
    assert values(good) == TABLE.to_pylist()[:1000]
    assert (bad.line, bad.reason.split(":")[0]) == (1001, "unreadable record batch")
    for data in (b"ARROW1", b"no arrow at all"):
        path.write_bytes(data)
        assert [(row.line, row.reason) for row in read(path, "arrow")] == [(1, "unreadable Arrow file")]


@pytest.mark.parametrize("deep", [False, True])
def test_invalid_value_is_rejected_alone(tmp_path: Path, deep: bool) -> None:
    texts = pa.StringArray.from_buffers(  # both formats promise UTF-8, and nobody checks
        3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")
    )
    far = pa.array([2**60] * 3, pa.timestamp("us"))  # a date that Python cannot hold
    nested = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), pa.StructArray.from_arrays([texts], ["content"]))
    table = pa.table({"text": ["a", "-", "b"], "when": far, "messages": nested})
    if not deep:
        table = pa.table({"text": texts, "when": far})
    pq.write_table(table, tmp_path / "rows.parquet")
    write_arrow(tmp_path / "rows.arrow", table, 10)
    for name, format in (("rows.parquet", "parquet"), ("rows.arrow", "arrow")):
        rows = read(tmp_path / name, format)
        assert [(row.line, row.reason) for row in rows] == [(1, ""), (2, "not UTF-8"), (3, "")]
        assert [row.value["text"] for row in rows if not row.reason] == ["a", "b"]


def test_arrow_offsets_out_of_bounds_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    table = pa.table({"text": ["first", "second"] * 4})
    write_arrow(path, table, 4)
    offsets = np.cumsum([0, 5, 6, 5], dtype=np.int32).tobytes()
    data = path.read_bytes()
    assert data.count(offsets) == 2
    path.write_bytes(data.replace(offsets, offsets[:8] + b"\xff\xff\xff\x0f" + offsets[12:], 1))
    rows = read(path, "arrow")
    assert [(row.line, row.reason) for row in rows] == [
        (1, "unreadable record batch: ArrowInvalid"),
        *((line, "") for line in range(5, 9)),
    ]


def test_large_values_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    table = pa.table({"text": [letter * 3_000_000 for letter in "abcdefgh"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    write_arrow(tmp_path / "rows.arrow", table, 8)
    for name in ("parquet", "arrow"):
        assert [row.value["text"][0] for row in read(tmp_path / f"rows.{name}", name)] == list("abcdefgh")


def test_maps_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    rows = [{"n": number, "m": [(f"key {key}", "x" * 3_000) for key in range(number % 500)]} for number in range(60, 600, 9)]
    table = pa.Table.from_pylist(rows, pa.schema([("n", pa.int64()), ("m", pa.map_(pa.string(), pa.string()))]))
    assert table.nbytes > 32 << 20
    pq.write_table(table, tmp_path / "rows.parquet")
    assert values(read(tmp_path / "rows.parquet", "parquet", limit=4 << 20)) == [row | {"m": dict(row["m"])} for row in rows]


def test_null_columns_are_omitted_from_rows(tmp_path: Path) -> None:
    rows = [{"m": [{"role": "user", "name": None}]}, {"m": [{"role": "user", "name": "x"}]}, {"m": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert values(read(tmp_path / "rows.parquet", "parquet")) == [
        {"m": [{"role": "user"}]},
        {"m": [{"role": "user", "name": "x"}]},
        {},
    ]


# ---------------------------------------------------------------- documents and images


def test_a_document_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    data = "\ufeff# Title\r\n\r\nA text ü".encode()
    path.write_bytes(data)
    indexed = index_file(str(path), path.name, "text")
    assert (indexed.num_lines, len(indexed.chunks)) == (1, 1)
    assert read(path, "text") == [Raw(1, 0, None, {"text": "# Title\r\n\r\nA text ü"}, hashlib.sha256(data).hexdigest())]
    path.write_bytes(b"")
    assert read(path, "text") == []
    packed = tmp_path / "notes.md.gz"
    packed.write_bytes(gzip.compress(b"text"))
    assert values(read(packed, "text")) == [{"text": "text"}]
    packed.write_bytes(gzip.compress(b"text" * 100)[:-12])
    assert values(read(packed, "text")) == ["the gzip stream is damaged or cut off"]


def test_images_are_read_relative_to_the_rows_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"png")
    (chunk,) = index_file(path.as_uri(), path.name, "jsonl").chunks
    assert image_reader(chunk)("images/a.png") == b"png"
    with pytest.raises(FileNotFoundError):
        image_reader(chunk)("images/b.png")
    monkeypatch.setattr("forge_ray.data.read.readers.IMAGE_BYTES", 2)
    with pytest.raises(Reject, match="an image is larger than"):
        image_reader(chunk)("images/a.png")
