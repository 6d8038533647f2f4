"""Files → rows: no good row is ever lost, and each bad one is found where the report says it is."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.config.data import DataConfig
from forge_ray.data.read.ingest import expand, index_file
from forge_ray.data.read.readers import read_raw
from forge_ray.data.record.schema import DataRecord, Reject, parse_line, parse_record
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


@dataclass(frozen=True)
class Row:
    line: int
    offset: int
    raw_sha256: str
    record: DataRecord | None
    reason: str = ""


def read(path: Path, chunk_bytes: int, format: str = "jsonl", limit: int = 1 << 24) -> list[Row]:
    """Index, read and parse, as the pipeline does."""
    indexed = index_file(str(path), path.name, format, chunk_bytes=chunk_bytes)
    assert indexed.size == path.stat().st_size
    assert indexed.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    rows = []
    for chunk in indexed.chunks:
        for raw in read_raw(chunk, limit):
            record, reason = None, raw.reason
            if not reason:
                try:
                    record = parse_record(raw.value) if raw.raw is None else parse_line(raw.raw)
                except Reject as error:
                    reason = str(error)
            rows.append(Row(raw.line, raw.offset, raw.sha256, record, reason))
    return rows


@given(
    seed=st.integers(0, 2**32),
    plan=st.lists(st.sampled_from(["good", "good", "blank", *BAD]), max_size=30),
    chunk_bytes=st.sampled_from([1, 7, 100, 1000, 1 << 20]),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    last_newline=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_good_rows_are_read_and_bad_rows_rejected(
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


@pytest.mark.parametrize("chunk_bytes", [1, 100_000, 1 << 30])
def test_ten_thousand_lines(tmp_path: Path, chunk_bytes: int) -> None:
    """Every good row is kept, and each bad one reported with its line, offset and digest."""
    chosen = random.Random(7)
    kinds = [chosen.choice(["good"] * 20 + sorted(set(BAD) - {"nested", "very long"})) for _ in range(10_000)]
    kinds[123] = kinds[9_000] = "over the limit"
    lines = [
        line(n) if kind == "good" else b"x" * 50_000 if kind == "over the limit" else BAD[kind](chosen, line(n))
        for n, kind in enumerate(kinds)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows = read(path, chunk_bytes, limit=45_000)
    offsets = [0]
    for each in lines:
        offsets.append(offsets[-1] + len(each) + 1)
    places = [(n + 1, offsets[n], hashlib.sha256(each).hexdigest()) for n, each in enumerate(lines)]
    assert [(row.line, row.offset, row.raw_sha256) for row in rows] == places
    for kind, row in zip(kinds, rows, strict=True):
        assert row.record == (parse_record(good(row.line - 1)) if kind == "good" else None)
        assert bool(row.reason) == (kind != "good")
        assert (row.reason == "longer than max_line_bytes") == (kind == "over the limit")


def test_chunks_are_whole_lines_that_cover_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line(i) for i in range(200)))
    indexed = index_file(str(path), "rows.jsonl", "jsonl", chunk_bytes=1000)
    assert indexed.num_lines == 200
    assert len(indexed.chunks) > 10
    assert len({chunk.key for chunk in indexed.chunks}) == len(indexed.chunks)
    assert indexed.chunks == index_file(str(path), "rows.jsonl", "jsonl", chunk_bytes=1000).chunks
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


@pytest.mark.parametrize("damage", ["text", "cut", "footer"])
def test_an_unreadable_parquet_file_is_one_rejected_row(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, [good(i) for i in range(20)], 5)
    whole = path.read_bytes()
    path.write_bytes({"text": line(1), "cut": whole[: len(whole) // 2], "footer": whole[:-40] + bytes(40)}[damage])
    rows = read(path, 1, "parquet")
    assert [(row.line, row.record, row.reason) for row in rows] == [(1, None, "unreadable Parquet file")]


def test_corrupt_row_group_does_not_affect_the_others(tmp_path: Path) -> None:
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


def test_chunk_keys_depend_on_the_bytes_only(tmp_path: Path) -> None:
    """A piece of work is found again although its file was moved; another source or format is another piece."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for path in (one, two):
        path.write_bytes(b"\n".join(line(n) for n in range(100)))
    keys = [
        [chunk.key for chunk in index_file(str(path), path.name, "jsonl", chunk_bytes=1000).chunks] for path in (one, two)
    ]
    assert keys[0] == keys[1]
    assert index_file(str(one), one.name, "text").chunks[0].key not in keys[0]


def test_a_file_that_differs_from_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line(1))
    expected = hashlib.sha256(line(1)).hexdigest()
    assert index_file(str(path), "rows.jsonl", "jsonl", 0, expected).sha256 == expected
    path.write_bytes(line(2))
    with pytest.raises(DataError, match=rf"rows\.jsonl has sha256 [0-9a-f]+, but its checksums file says {expected}"):
        index_file(str(path), "rows.jsonl", "jsonl", 0, expected)


# ---------------------------------------------------------------- sources


def names(*sources: dict[str, str]) -> list[tuple[str, str, int]]:
    return [(f.name, f.format, f.source) for f in expand(DataConfig.model_validate({"sources": sources}))]


def fill(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(name.encode())


def test_sources_are_files_or_globs_sorted_and_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fill(tmp_path, "b.jsonl", "a.ndjson", "deep/c.parquet", "rows.data", "home/x.csv", "odd [1].jsonl")
    assert names({"path": "?.*json*"}, {"path": "b.jsonl"}, {"path": "**/*.parquet"}) == [
        ("a.ndjson", "jsonl", 0),
        ("b.jsonl", "jsonl", 0),
        ("deep/c.parquet", "parquet", 2),
    ]
    assert names({"path": str(tmp_path / "rows.data"), "format": "jsonl"}) == [("rows.data", "jsonl", 0)]
    assert names({"path": "~/*.csv"}) == [("home/x.csv", "csv", 0)]
    assert names({"path": "odd [1].jsonl"}) == [("odd [1].jsonl", "jsonl", 0)]
    with pytest.raises(NotFound, match=r"no file matches 'none\*\.jsonl'"):
        names({"path": "none*.jsonl"})
    with pytest.raises(DataError, match=r"rows\.data' is that of no known format"):
        names({"path": "rows.data"})
    assert names({"path": "deep"}) == [("deep/c.parquet", "parquet", 0)]


@pytest.mark.parametrize(
    "uri", ["s3://user:secret@bucket/rows.jsonl", "abfss://box/a.jsonl?client_secret=secret", "gs://secret@b/*"]
)
def test_a_source_with_a_password_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="carries a user name or password") as error:
        names({"path": uri})
    assert "secret@" not in str(error.value)
    assert "=secret" not in str(error.value)


TEXTS = "txt md rst py java c cpp h go rs js ts sql sh yaml yml toml xml cs rb php scala kt r m tex R txt.gz"


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.jsonl.gz", "jsonl"),
        ("a.ndjson.zst", "jsonl"),
        ("A.JSON", "json"),
        ("a.csv.gz", "csv"),
        ("a.tsv", "csv"),
        ("a.arrow", "arrow"),
        ("a.html", "html"),
        ("a.v2.htm", "html"),
        ("a.pdf", "pdf"),
        ("a.docx", "docx"),
        *((f"a.{ending}", "text") for ending in TEXTS.split()),
    ],
)
def test_formats_by_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, format: str) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, name)
    assert names({"path": name}) == [(name, format, 0)]


def test_compressed_parquet_file_is_rejected(tmp_path: Path) -> None:
    fill(tmp_path, "a.parquet.gz")
    with pytest.raises(DataError, match=r"is parquet in \.gz"):
        names({"path": str(tmp_path / "a.parquet.gz")})


def test_globs_in_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "data", "a 1.jsonl", "b.jsonl", "c/d.jsonl", "c/e/f.jsonl", "c/e/g.txt", ".hidden/h.jsonl", "c/.i.jsonl")

    def found(pattern: str, base: str) -> list[str]:
        paths = [f.path for f in expand(DataConfig.model_validate({"sources": [{"path": f"{base}/{pattern}"}]}))]
        for path in paths:
            assert index_file(path, path, "text").size > 0
        return [path.removeprefix(base).removesuffix("?region=x").lstrip("/") for path in paths]

    def bucket(uri: str) -> tuple[pafs.FileSystem, str]:
        place, _, options = uri.partition("?")
        assert options in ("", "region=x")
        inside = pafs.FileSystem.from_uri(place.replace("box://", "file:///"))[1].lstrip("/")
        return pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), inside

    expected = {
        "*.jsonl": ["a 1.jsonl", "b.jsonl"],
        "?.jsonl": ["b.jsonl"],
        "[ac]*.jsonl": ["a 1.jsonl"],
        "**/*.jsonl": ["a 1.jsonl", "b.jsonl", "c/d.jsonl", "c/e/f.jsonl"],
        "c/**": ["c/d.jsonl", "c/e/f.jsonl", "c/e/g.txt"],
        "c/*/[fg].*": ["c/e/f.jsonl", "c/e/g.txt"],
        "a%201.jsonl": ["a 1.jsonl"],
    }
    for pattern, files in expected.items():
        assert found(pattern, f"file://{tmp_path}/data") == [f"{tmp_path}/data/{file}".lstrip("/") for file in files]
    for module in ("sources", "lines", "table_formats"):
        monkeypatch.setattr(f"forge_ray.data.read.{module}.filesystem_of", bucket)
    for pattern, files in expected.items():
        assert found(pattern, "box://data") == [file.replace(" ", "%20") for file in files]
        assert found(pattern + "?region=x", "box://data") == [file.replace(" ", "%20") for file in files]
    with pytest.raises(NotFound, match="no file matches"):
        found("none/*", "box://data")


def test_folders_of_saved_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, DatasetDict

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    one, two = (Dataset.from_list([{"text": f"{split} {n}"} for n in range(100)]) for split in ("one", "two"))
    one.save_to_disk("alone", num_shards=2)
    DatasetDict({"train": one, "test": two}).save_to_disk("both")
    assert names({"path": "alone"}) == [(f"alone/data-0000{n}-of-00002.arrow", "arrow", 0) for n in (0, 1)]
    assert names({"path": f"file://{tmp_path}/alone"}) == names({"path": "alone"})
    with pytest.raises(DataError, match=r"'both' holds several splits \(train, test\)") as error:
        names({"path": "both"})
    assert error.value.hint == "choose one with `split: train`, or take all of them with `split: all`"
    assert [name for name, _, _ in names({"path": "both", "split": "test"})] == ["both/test/data-00000-of-00001.arrow"]
    with pytest.raises(DataError, match=r"has no split 'dev'\nhint: its splits are: train, test"):
        names({"path": "both", "split": "dev"})
    files = names({"path": "both", "split": "all"})
    assert [name for name, _, _ in files] == [f"both/{split}/data-00000-of-00001.arrow" for split in ("test", "train")]
    records = [row.record.content["text"] for row in read(tmp_path / files[0][0], 1, "arrow") if row.record]
    assert records == [f"two {n}" for n in range(100)]
    (tmp_path / "alone/data-00001-of-00002.arrow").unlink()
    with pytest.raises(NotFound, match=r"data-00001-of-00002\.arrow' is missing, which state\.json lists"):
        names({"path": "alone"})


def test_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "rows/a.jsonl", "rows/b c.jsonl", "rows/read.me")
    sums = tmp_path / "rows/SHA256SUMS"

    def write(*files: str) -> None:
        sums.write_text("".join(f"{hashlib.sha256(f'rows/{f}'.encode()).hexdigest()}  {f}\n" for f in files))

    def found() -> list[str]:
        source = {"path": "rows/*.jsonl", "checksums": "rows/SHA256SUMS"}
        return [f.sha256 for f in expand(DataConfig.model_validate({"sources": [source]}))]

    write("a.jsonl", "b c.jsonl", "read.me")
    assert found() == [hashlib.sha256(f"rows/{f}".encode()).hexdigest() for f in ("a.jsonl", "b c.jsonl")]
    write("a.jsonl")
    with pytest.raises(DataError, match=r"has no line for rows/b c\.jsonl \(1 files\)"):
        found()
    write("a.jsonl", "b c.jsonl", "gone.jsonl")
    with pytest.raises(DataError, match=r"lists what is not there: rows/gone\.jsonl \(1 files\)\nhint: restore"):
        found()
    sums.write_text("d41d8cd98f00b204e9800998ecf8427e  a.jsonl\n")
    with pytest.raises(DataError, match=r"line 1 of .* is not a sha256 and a file name"):
        found()
    sums.unlink()
    with pytest.raises(NotFound, match="no checksums file"):
        found()
