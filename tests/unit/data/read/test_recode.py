"""Text of every encoding that a source may name: the rows, and the line and byte at which each begins in its file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from forge_ray.config.base import parse
from forge_ray.config.data import DataConfig
from forge_ray.config.encodings import ASIAN, ENCODINGS, SINGLE_BYTE, encoding_named
from forge_ray.data.build.settings import settings_of
from forge_ray.data.read import lines
from forge_ray.data.read.ingest import index_file
from forge_ray.data.read.lines import Raw
from forge_ray.data.read.readers import read_raw
from forge_ray.data.read.recode import line_feeds
from forge_ray.data.record.schema import Reject, parse_line, parse_record
from forge_ray.errors import ConfigError

pytestmark = pytest.mark.unit
LETTERS = {
    "cp1252": "äßœ€",
    "cp1251": "жЩя",
    "shift_jis": "日本ソ",
    "gb18030": "中文𠀀ü",
    "utf-16-le": "ä😀\u0a0d",
    "utf-32-be": "中😀",
}


def rows_of(path: Path, format: str, encoding: str) -> list[Raw]:
    indexed = index_file(str(path), path.name, format, encoding=encoding)
    return [raw for chunk in indexed.chunks for raw in read_raw(chunk, 1 << 20)]


def value_of(raw: Raw) -> Any:
    try:
        record = parse_line(raw.raw) if raw.raw is not None else parse_record(raw.value)
        return raw.reason or record.messages[-1]["content"]
    except Reject as reason:
        return raw.reason or str(reason)


@pytest.mark.parametrize("encoding", LETTERS)
@pytest.mark.parametrize("format", ["jsonl", "csv", "json"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_each_row_has_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, format: str, newline: str
) -> None:
    monkeypatch.setattr(lines, "BLOCK", 7)  # letters and line ends are cut
    pick = random.Random(len(encoding))
    texts = ["".join(pick.choices(LETTERS[encoding] + "ab", k=pick.randint(1, 20))) for _ in range(40)]
    rows = [{"prompt": "q", "completion": text} for text in texts]
    parts = [json.dumps(row, ensure_ascii=False) for row in rows]
    head = "[" if format == "json" else ""
    if format == "csv":
        head, parts = f"prompt,completion{newline}", [f'q,"{text}"' for text in texts]
    join = f",{newline}" if format == "json" else newline
    whole = head + join.join(parts) + ("]" if format == "json" else newline)
    path = tmp_path / "rows"
    path.write_bytes(whole.encode(encoding))
    rows = rows_of(path, format, encoding)
    assert [value_of(raw) for raw in rows] == texts
    places = [whole.index(part, sum(map(len, parts[:number]))) for number, part in enumerate(parts)]
    assert [raw.offset for raw in rows] == [len(whole[:place].encode(encoding)) for place in places]
    first = 2 if format == "csv" else 1
    assert [raw.line for raw in rows] == list(range(first, first + len(texts)))


def test_every_encoding_gives_each_character_bytes_of_its_own() -> None:
    """What the places of rows rest on: text that is written again has as many bytes."""
    for encoding in sorted({*SINGLE_BYTE, *ASIAN}):
        assert encoding_named(encoding) == encoding
        assert all(chr(code).encode(encoding) == bytes([code]) for code in (*range(0x20, 0x7F), 10, 13))
        pairs = [bytes([a, b]) for a in range(128, 256) for b in range(32, 256)] if encoding in ASIAN else []
        for data in [*(bytes([code]) for code in range(256)), *pairs]:
            try:
                text = data.decode(encoding)
            except UnicodeDecodeError:
                continue
            assert len(text.encode(encoding)) == len(data), (encoding, data)


def test_bytes_that_are_not_of_the_encoding_cost_their_row(tmp_path: Path) -> None:
    lines = [b'{"text": "caf\xe9"}', b'{"text": "\x81"}', b'{"text": "\x80 1"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    raws = rows_of(tmp_path / "a.jsonl", "jsonl", "cp1252")
    assert [raw.reason or json.loads(raw.raw or b"")["text"] for raw in raws] == ["café", "not cp1252", "€ 1"]
    assert [raw.offset for raw in raws] == [0, 17, 31]
    (tmp_path / "a.csv").write_bytes("a,b\n1,2\n3,4\n".encode("utf-16-le").replace(b"3\0", b"\0\xd8") + b"x")
    rows = [raw.reason or raw.value for raw in rows_of(tmp_path / "a.csv", "csv", "utf-16-le")]
    assert rows == [{"a": "1", "b": "2"}, "not utf-16-le", "not utf-16-le"]
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \x81")
    assert [raw.reason for raw in rows_of(tmp_path / "a.txt", "text", "cp1252")] == ["not cp1252"]


@pytest.mark.parametrize(
    ("encoding", "data", "reason"),
    [
        ("cp1252", "prompt,Größe\n".encode(), "the file is UTF-8, not cp1252: give it a source without `encoding`"),
        ("utf-16-le", b"a,b\n1,2\n", "the file is UTF-8, not utf-16-le: give it a source without `encoding`"),
        (
            "utf-16",
            "a,b\n".encode("utf-16-le") * 9,
            "the file is UTF-16 without a byte order mark: set `encoding: utf-16-le",
        ),
        (
            "utf-16-le",
            "a,b\n".encode("utf-16-be"),
            "the file is UTF-16 without a byte order mark: set `encoding: utf-16-be",
        ),
        ("utf-32", "中,文\n".encode("utf-32-le"), "the file has no byte order mark, so the order of its bytes is not known"),
    ],
)
def test_a_file_of_another_encoding_than_its_source_says_is_named(
    tmp_path: Path, encoding: str, data: bytes, reason: str
) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    (raw,) = rows_of(tmp_path / "a.csv", "csv", encoding)
    assert raw.reason.startswith(reason)


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_wins_over_the_source(tmp_path: Path, mark: str) -> None:
    (tmp_path / "a.csv").write_bytes("prompt,completion\nq,Größe\n".encode(mark))
    assert [value_of(raw) for raw in rows_of(tmp_path / "a.csv", "csv", "cp1252")] == ["Größe"]


def test_a_page_and_a_text_are_read_in_the_encoding_of_their_source(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes("<meta charset=utf-8><p>Größe".encode("cp1252"))
    (tmp_path / "b.html").write_bytes("<meta charset=windows-1252><p>Größe".encode("utf-16"))
    (tmp_path / "a.txt").write_bytes("Größe".encode("cp1252"))
    for name, format in (("a.html", "html"), ("b.html", "html"), ("a.txt", "text")):
        assert [raw.value for raw in rows_of(tmp_path / name, format, "cp1252")] == [{"text": "Größe"}]


def test_cells_keep_their_line_feeds_where_cr_ends_the_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'a,b\r1,"one\ntwo\rthree"\r4,5\r')
    raws = rows_of(tmp_path / "a.csv", "csv", "utf-8")
    assert [raw.value for raw in raws] == [{"a": "1", "b": "one\ntwo\nthree"}, {"a": "4", "b": "5"}]
    assert [raw.offset for raw in raws] == [4, 22]
    assert b"".join(line_feeds([b"a\r", b"\nb\r", b"\r", b"c", b"\r"])) == b"a\r\nb\n\nc\n"


def test_the_encoding_is_a_setting_that_decides_the_rows() -> None:
    plain = {"sources": [{"path": "a.csv"}]}
    named = {"sources": [{"path": "a.csv", "encoding": "Windows-1252"}]}
    assert "encoding" not in settings_of(parse(DataConfig, plain))["sources"][0]
    assert settings_of(parse(DataConfig, named))["sources"][0]["encoding"] == "cp1252"
    assert parse(DataConfig, {"sources": [{"path": "a.csv", "encoding": "UTF8"}]}) == parse(DataConfig, plain)
    assert "utf-7" not in ENCODINGS
    for name in ("utf-7", "rot13", "hex", "iso2022_jp", "none", "\0", ""):
        with pytest.raises(ConfigError, match="is not an encoding of text that is read here"):
            parse(DataConfig, {"sources": [{"path": "a", "encoding": name}]})
