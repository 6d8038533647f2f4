"""Files that are not what their names say are named once, with the remedy; what can be read of the others is read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.data.read.first_bytes import HEAD_BYTES, NOT_UTF_8
from forge_ray.data.read.ingest import EMPTY, NO_ROWS, IndexedFile, index_file
from forge_ray.data.read.readers import read_raw
from forge_ray.data.read.strict_json import PADDING, Reject, decode

pytestmark = pytest.mark.unit
ROWS = [{"prompt": f"Größe {number}?", "completion": "42"} for number in range(3)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)


def read(path: Path, format: str) -> tuple[IndexedFile, list[Any]]:
    """The index of a file, and each of its rows, or the reason why it is none."""
    indexed = index_file(str(path), path.name, format)
    rows = []
    for raw in (raw for chunk in indexed.chunks for raw in read_raw(chunk, 1 << 20)):
        try:
            rows.append(raw.reason or (raw.value if raw.raw is None else decode(raw.raw)))
        except Reject as reason:
            rows.append(str(reason))
    return indexed, rows


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


def workbook(folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "book", "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return (folder / "book").read_bytes()


@pytest.mark.parametrize(
    ("name", "format", "data", "reason"),
    [
        (
            "a.jsonl",
            "jsonl",
            JSONL.encode("utf-16-le"),
            "the file is UTF-16 without a byte order mark: set `encoding: utf-16-le`",
        ),
        ("a.csv.gz", "csv", gzip.compress(CSV.encode("utf-16-be")), "the file is UTF-16 without a byte order mark: set"),
        ("a.jsonl", "jsonl", gzip.compress(JSONL.encode()), "the file is a stream of gzip without the ending .gz"),
        ("a.parquet", "parquet", gzip.compress(parquet()), "the file is a stream of gzip without the ending .gz"),
        ("a.csv", "csv", bytes(pa.compress(CSV.encode(), "zstd", asbytes=True)), "the file is a stream of zstd without"),
        ("a.jsonl.gz", "jsonl", JSONL.encode(), "the file is not a gzip stream, though its name ends in .gz: remove"),
        ("a.jsonl.zst", "jsonl", JSONL.encode(), "the file is not a zstd stream, though its name ends in .zst: remove"),
        ("a.jsonl", "jsonl", bz2.compress(JSONL.encode()), "the file is a stream of bz2 without the ending .bz2"),
        ("a.jsonl", "jsonl", lzma.compress(JSONL.encode()), "the file is a stream of xz without the ending .xz"),
        ("a.csv", "csv", b"\xd0\xcf\x11\xe0" + bytes(600), "the file is an Office file with a password"),
        ("a.jsonl", "jsonl", parquet(), "the file is a Parquet file: set `format: parquet`"),
        ("a.txt", "text", b"%PDF-1.7\0", "the file is a PDF: set `format: pdf`"),
        ("a.csv", "csv", b"SQLite format 3\0", "the file is an SQLite database"),
        ("a.parquet", "parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "the file is a pointer of"),
        ("a.jsonl", "jsonl", b"\n<!DOCTYPE html>\n<html>\n", "the file is an HTML page"),
        ("a.csv", "csv", CSV.encode("cp1252"), "the file is not UTF-8, most likely Windows-1252"),
        ("a.csv", "csv", b"gr\xf6\xdfe,b\n1,2\n", "the file is not UTF-8, most likely Windows-1252"),
        (
            "a.txt",
            "text",
            b"One\ncaf\xe9\n",
            "the file is not UTF-8, most likely Windows-1252: set `encoding: windows-1252`",
        ),
        ("a.txt", "text", b"caf\xe9", "the file is not UTF-8, most likely Windows-1252"),
    ],
    ids=range(19),
)
def test_a_file_of_another_form_is_named_once_with_the_remedy(
    tmp_path: Path, name: str, format: str, data: bytes, reason: str
) -> None:
    indexed, rows = read(write(tmp_path, name, data), format)
    assert [row[: len(reason)] for row in rows] == [reason]
    assert (indexed.num_lines, indexed.size) == (1, len(data))
    assert any(mark in rows[0] for mark in (":", "remove"))


def test_a_workbook_by_another_name_is_named_once(tmp_path: Path) -> None:
    _, rows = read(write(tmp_path, "a.csv", workbook(tmp_path)), "csv")
    assert rows == ["the file is a zip archive or an Excel workbook: unpack it, or give it the ending .xlsx"]


@pytest.mark.parametrize(
    ("name", "format", "data"),
    [
        ("a.jsonl", "jsonl", JSONL.encode("utf-8-sig")),
        ("a.jsonl", "jsonl", JSONL.replace("\n", "\r\n").encode()),
        ("a.json", "json", json.dumps(ROWS, indent=1).replace("\n", "\r").encode()),
        ("a.csv", "csv", CSV.replace("\n", "\r\n").encode("utf-8-sig")),
        ("a.csv", "csv", ("sep=;\r\n" + CSV.replace(",", ";").replace("\n", "\r\n")).encode("utf-8-sig")),
        ("a.csv", "csv", ("sep=|\n" + CSV.replace(",", "|")).encode()),
        ("a.csv", "csv", ('"sep=,"\n' + CSV).encode()),
        ("a.jsonl", "jsonl", JSONL.encode("utf-16")),
        ("a.jsonl", "jsonl", b"\xfe\xff" + JSONL.replace("\n", "\r\n").encode("utf-16-be")),
        ("a.jsonl.gz", "jsonl", gzip.compress(JSONL.encode("utf-32"))),
        ("a.json", "json", json.dumps(ROWS, ensure_ascii=False, indent=1).encode("utf-16")),
        ("a.csv", "csv", CSV.replace(",", "\t").replace("\n", "\r\n").encode("utf-16")),  # Excel's "Unicode text"
        ("a.csv.zst", "csv", bytes(pa.compress(("sep=;\r" + CSV.replace(",", ";")).encode("utf-16"), "zstd", asbytes=True))),
        ("a.jsonl", "jsonl", JSONL.replace("\n", "\r").encode()),
        ("a.jsonl", "jsonl", JSONL.replace("\n", "\r").encode("utf-16")),
        ("a.json", "json", JSONL.replace("\n", "\r").encode()),
        ("a.csv", "csv", CSV.replace("\n", "\r").encode("utf-8-sig")),
        ("a.jsonl", "jsonl", json.dumps(ROWS, ensure_ascii=False).encode("utf-8-sig")),
        ("a.jsonl.gz", "jsonl", gzip.compress(json.dumps(ROWS, indent=1).encode())),
        ("a.jsonl.bz2", "jsonl", bz2.compress(JSONL[:30].encode()) + bz2.compress(JSONL[30:].encode())),
        ("a.csv.xz", "csv", lzma.compress(CSV[:30].encode()) + bytes(4) + lzma.compress(CSV[30:].encode()) + bytes(8)),
        ("a.json.bz2", "json", bz2.compress(json.dumps(ROWS).encode("utf-16"))),
        ("a.jsonl.gz", "jsonl", gzip.compress(JSONL.encode()) + bytes(1 << 12)),
        ("a.jsonl.gz", "jsonl", gzip.compress(JSONL[:30].encode()) + gzip.compress(JSONL[30:].encode()) + bytes(3 << 20)),
    ],
    ids=range(24),
)
def test_forms_that_are_clear_are_read(tmp_path: Path, name: str, format: str, data: bytes) -> None:
    indexed, rows = read(write(tmp_path, name, data), format)
    assert rows == ROWS
    assert indexed.notes == ()


@pytest.mark.parametrize("rest", [b"\0\0x", b"\0" * 600 + gzip.compress(b"{}\n"), b"\x1f\x8b\x08"])
def test_more_than_zeros_behind_a_gzip_stream_is_named(tmp_path: Path, rest: bytes) -> None:
    _, rows = read(write(tmp_path, "a.jsonl.gz", gzip.compress(JSONL.encode()) + rest), "jsonl")
    assert rows == [*ROWS, "the gzip stream is damaged or cut off here"]


@pytest.mark.parametrize("kind", ["bz2", "xz"])
def test_a_damaged_stream_gives_the_lines_before(tmp_path: Path, kind: str) -> None:
    """Of bz2, blocks of 100 kB are read whole or not at all."""
    many = "".join(json.dumps({"text": f"{number}" * 20}) + "\n" for number in range(12_000)).encode()
    whole = bz2.compress(many, 1) if kind == "bz2" else lzma.compress(many)
    for name, data in (("cut", whole[: len(whole) // 2]), ("changed", whole[: len(whole) // 2] + b"x" * 64 + whole[-900:])):
        _, rows = read(write(tmp_path, f"{name}.jsonl.{kind}", data), "jsonl")
        assert rows[-1] == f"the {kind} stream is damaged or cut off here"
        assert 1000 < len(rows) < 12_000
        assert rows[:1000] == [json.loads(line) for line in many.splitlines()[:1000]]
        assert name == "changed" or all(isinstance(row, dict) for row in rows[:-1])
    indexed, rows = read(write(tmp_path, f"a.jsonl.{kind}", whole), "jsonl")
    assert len(rows) == 12_000
    assert 0.5 < indexed.text_bytes / len(many) < 2


def test_a_stream_of_xz_cannot_ask_for_all_memory(tmp_path: Path) -> None:
    for size, expected in ((1 << 26, ROWS), (1 << 29, ["the xz stream is damaged or cut off here"])):
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": size, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3}]
        _, rows = read(write(tmp_path, "a.jsonl.xz", lzma.compress(JSONL.encode(), filters=filters)), "jsonl")
        assert rows == expected


def test_a_cut_gzip_stream_is_not_padding(tmp_path: Path) -> None:
    _, rows = read(write(tmp_path, "a.jsonl.gz", gzip.compress(JSONL.encode())[:-4]), "jsonl")
    assert rows == [*ROWS, "the gzip stream is damaged or cut off here"]


def test_zeros_behind_lines_are_named_once(tmp_path: Path) -> None:
    """A file system that lost its power leaves them where rows should be."""
    _, rows = read(write(tmp_path, "a.jsonl", JSONL.encode() + bytes(5000)), "jsonl")
    assert rows == [*ROWS, PADDING]
    _, rows = read(write(tmp_path, "a.csv", CSV.encode() + bytes(5000)), "csv")
    assert rows == [*ROWS, PADDING]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.txt", "a.pdf", "a.jsonl.gz"])
def test_an_empty_file_has_no_row_and_is_named(tmp_path: Path, name: str) -> None:
    format = {"txt": "text"}.get(name.split(".")[1], name.split(".")[1])
    indexed, rows = read(write(tmp_path, name, b""), format)
    assert (rows, indexed.notes, indexed.num_lines) == ([], (EMPTY,), 0)


def test_files_without_rows_are_named(tmp_path: Path) -> None:
    empty = pa.Table.from_pylist(ROWS).slice(0, 0)
    pq.write_table(empty, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as out, pa.ipc.new_file(out, empty.schema) as writer:
        writer.write_table(empty)
    files = {"a.csv": b"prompt,completion\n", "a.json": b"[]", "a.jsonl": b"\n \n", "b.jsonl.gz": gzip.compress(b"")}
    for name, data in files.items():
        write(tmp_path, name, data)
    for name in ("a.parquet", "a.arrow", *files):
        indexed, rows = read(tmp_path / name, name.split(".")[1])
        assert (name, rows, indexed.notes) == (name, [], (NO_ROWS,))


@pytest.mark.parametrize("letter", ["é", "€", "😀"])
@pytest.mark.parametrize("is_gzip", [False, True])
def test_a_first_block_may_end_in_the_middle_of_a_character(tmp_path: Path, letter: str, is_gzip: bool) -> None:
    text = "x" * (HEAD_BYTES - 1) + letter
    assert letter.encode() not in text.encode()[:HEAD_BYTES]
    data = gzip.compress(text.encode()) if is_gzip else text.encode()
    _, rows = read(write(tmp_path, f"a.txt{'.gz' * is_gzip}", data), "text")
    assert rows == [{"text": text}]
    damaged = gzip.compress(text.encode())[:-12] if is_gzip else text.encode() + b"\xff"
    _, rows = read(write(tmp_path, f"b.txt{'.gz' * is_gzip}", damaged), "text")
    assert rows == ["the gzip stream is damaged or cut off" if is_gzip else "not UTF-8"]


def test_a_stream_that_begins_with_a_part_of_a_character_is_read(tmp_path: Path) -> None:
    text = "Größe".encode()
    for kind, pack in (("bz2", bz2.compress), ("xz", lzma.compress), ("gz", gzip.compress)):
        _, rows = read(write(tmp_path, f"a.txt.{kind}", pack(text[:3]) + pack(text[3:])), "text")
        assert rows == [{"text": "Größe"}], kind


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", JSONL.encode("cp1252")),
        ("a.jsonl.gz", gzip.compress(JSONL.encode("cp1252"))),
        ("a.json", json.dumps(ROWS, ensure_ascii=False).encode("cp1252")),
        ("a.json", json.dumps(ROWS, ensure_ascii=False, indent=1).encode("cp1252")),
    ],
    ids=range(4),
)
def test_json_of_another_encoding_is_named_once_with_the_remedy(tmp_path: Path, name: str, data: bytes) -> None:
    """Its rows in ASCII are read all the same."""
    indexed, rows = read(write(tmp_path, name, data), name.split(".")[1])
    assert (rows, indexed.notes) == (["not UTF-8"] * 3, (NOT_UTF_8,))


def test_one_damaged_row_of_json_is_one_row(tmp_path: Path) -> None:
    lines = [b'{"text": "a"}', b'{"text": "caf\xe9"}', b'{"text": "b"}']
    expected = [{"text": "a"}, "not UTF-8", {"text": "b"}]
    for name, data in (("a.jsonl", b"\n".join(lines)), ("a.json", b"[" + b", ".join(lines) + b"]")):
        indexed, rows = read(write(tmp_path, name, data), name.partition(".")[2])
        assert (rows, indexed.notes) == (expected, ())


def test_one_damaged_line_of_a_csv_file_is_one_row(tmp_path: Path) -> None:
    data = CSV.encode() + b"caf\xe9,1\ncaf\xe9,2\n"
    _, rows = read(write(tmp_path, "a.csv", data), "csv")
    assert rows == [*ROWS, "not UTF-8", "not UTF-8"]
