"""Workbooks: one sheet's rows under its header, numbers as numbers, dates as text; what a hostile one may cost."""

from __future__ import annotations

import re
import time
import zipfile
from collections.abc import Callable
from datetime import date, datetime, timedelta
from datetime import time as clock
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from forge_ray.data.read import documents
from forge_ray.data.read.ingest import NO_ROWS, index_file
from forge_ray.data.read.limited import OVER
from forge_ray.data.read.readers import read_raw
from forge_ray.data.read.workbook import NO_VALUE
from forge_ray.errors import DataError

pytestmark = pytest.mark.unit
HEADER = ["prompt", "completion"]


def book(path: Path, *sheets: list[list[Any]], states: tuple[str, ...] = ()) -> Path:
    whole = openpyxl.Workbook()
    whole.remove(whole.active)
    for number, rows in enumerate(sheets):
        sheet = whole.create_sheet(f"Sheet {number + 1}")
        for row in rows:
            sheet.append(row)
        if number < len(states):
            sheet.sheet_state = states[number]
    whole.save(path)
    return path


def rows_of(path: Path, sheet: str = "", limit: int = 1 << 20) -> list[tuple[int, Any]]:
    indexed = index_file(str(path), path.name, "xlsx", sheet=sheet)
    return [(raw.line, raw.reason or raw.value) for chunk in indexed.chunks for raw in read_raw(chunk, limit)]


def edited(path: Path, part: str, change: Callable[[str], str]) -> Path:
    """The workbook with one of its XML parts changed."""
    with zipfile.ZipFile(path) as before:
        parts = {name: before.read(name) for name in before.namelist()}
    parts[part] = change(parts[part].decode()).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as after:
        for name, data in parts.items():
            after.writestr(name, data)
    return path


FIRST = "xl/worksheets/sheet1.xml"


def test_cells_are_numbers_booleans_and_text(tmp_path: Path) -> None:
    header = ["prompt", "n", "x", "yes", "day", "moment", "hour", "span", 2024, None]
    row = [
        "Größe\n_x000D_", 3, 2.5, True, date(2026, 1, 5), datetime(2026, 1, 5, 9, 30), clock(9, 30), timedelta(hours=36),
        "a",
    ]  # fmt: skip
    path = book(tmp_path / "a.xlsx", [[], header, row, [None], [], ["b"]])
    assert rows_of(path) == [
        (3, {
            "prompt": "Größe\n\r", "n": 3, "x": 2.5, "yes": True, "day": "2026-01-05", "moment": "2026-01-05T09:30:00",
            "hour": "09:30:00", "span": "36:00:00", "2024": "a",
        }),
        (6, {"prompt": "b"}),
    ]  # fmt: skip
    assert index_file(str(path), "a", "xlsx").num_lines == 5  # by the size that the sheet claims


def test_formulas_have_their_stored_values(tmp_path: Path) -> None:
    path = book(tmp_path / "a.xlsx", [HEADER, ["one", "=1+1"], ["two", "=1+2"], ["three", '=""']])
    edited(
        path,
        FIRST,
        lambda xml: xml.replace("<f>1+1</f><v></v>", "<f>1+1</f><v>2</v>").replace("<f>1+1</f><v />", "<f>1+1</f><v>2</v>"),
    )
    edited(path, FIRST, lambda xml: re.sub(r"<f>1\+2</f><v ?/?>(</v>)?", "<f>1+2</f>", xml))
    assert rows_of(path) == [(2, {"prompt": "one", "completion": 2}), (3, NO_VALUE), (4, {"prompt": "three"})]


def test_errors_and_cells_without_a_column_are_named(tmp_path: Path) -> None:
    path = book(tmp_path / "a.xlsx", [HEADER, ["a", "#N/A"], ["b", "c", None, "note"], ["x" * 2000, "y"], ["d", "e"]])
    assert rows_of(path, limit=1024) == [
        (2, "a cell holds the error #N/A"),
        (3, "a cell of column D has no name in the header"),
        (4, "longer than max_line_bytes"),
        (5, {"prompt": "d", "completion": "e"}),
    ]
    twice = book(tmp_path / "b.xlsx", [["a", "a"], ["1", "2"]])
    assert rows_of(twice) == [(1, "the header names a column twice")]


def test_the_sheet_is_chosen_where_there_are_several(tmp_path: Path) -> None:
    one, two = [HEADER, ["a", "b"]], [HEADER, ["c", "d"]]
    path = book(tmp_path / "a.xlsx", one, two, [])
    with pytest.raises(DataError, match=r"holds several sheets with rows \('Sheet 1', 'Sheet 2', 'Sheet 3'\)") as error:
        rows_of(path)
    assert error.value.hint.startswith("choose one with `sheet: Sheet 1`")
    assert rows_of(path, "Sheet 2") == [(2, {"prompt": "c", "completion": "d"})]
    with pytest.raises(DataError, match="has no sheet 'Other'") as error:
        rows_of(path, "Other")
    assert error.value.hint == "its sheets are: 'Sheet 1', 'Sheet 2', 'Sheet 3'"
    hidden = book(tmp_path / "b.xlsx", one, two, [], states=("hidden", "visible"))
    assert rows_of(hidden) == rows_of(path, "Sheet 2")
    assert rows_of(hidden, "Sheet 1") == [(2, {"prompt": "a", "completion": "b"})]
    keys = {index_file(str(path), "a", "xlsx", sheet=name).chunks[0].key for name in ("Sheet 1", "Sheet 2")}
    assert len(keys) == 2


def test_a_sheet_without_rows_is_named(tmp_path: Path) -> None:
    for rows in ([], [HEADER]):
        indexed = index_file(str(book(tmp_path / "a.xlsx", rows)), "a", "xlsx")
        assert (indexed.notes, indexed.num_lines) == ((NO_ROWS,), 1)
        assert rows_of(tmp_path / "a.xlsx") == []


def test_a_file_that_is_no_workbook_is_one_row(tmp_path: Path) -> None:
    data = book(tmp_path / "whole.xlsx", [HEADER, ["a", "b"]]).read_bytes()
    path = tmp_path / "a.xlsx"
    for bad in (
        data[:-60],
        data[: len(data) // 2],
        b"PK\x03\x04" + bytes(300),
        b"a,b\n1,2\n",
        data.replace(b"workbook", b"workbooz"),
    ):
        path.write_bytes(bad)
        ((_, reason),) = rows_of(path)
        assert reason.startswith("unreadable XLSX: ")
    for bad, reason in ((b"\xd0\xcf\x11\xe0" + bytes(600), "an Office file with a password"), (b"<html>", "an HTML page")):
        path.write_bytes(bad)
        ((_, problem),) = rows_of(path)
        assert problem.startswith(f"the file is {reason}")


def test_the_package_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = book(tmp_path / "a.xlsx", [HEADER])
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="is xlsx, which needs the package 'openpyxl'") as error:
        index_file(str(path), "a.xlsx", "xlsx")
    assert error.value.hint == "pip install 'forge-ray[docs]' on every node"


def sheet(data: str) -> Callable[[str], str]:
    return lambda xml: re.sub("<sheetData.*</sheetData>", f"<sheetData>{data}</sheetData>", xml, flags=re.S)


CELL = '<c r="A{n}" t="inlineStr"><is><t>{text}</t></is></c>'
TOP = '<row r="1">' + CELL.format(n=1, text="text") + "</row>"
GOOD = '<row r="2">' + CELL.format(n=2, text="kept") + "</row>"
KEPT = (2, {"text": "kept"})
FAR = '<row r="2000000000" spans="1:2000000000"><c r="XFD2000000000"><v>1</v></c></row>'
HOSTILE = {
    "two billion rows": (FAR, [KEPT, (2_000_000_000, "a cell of column XFD has no name in the header")]),
    "a million empty rows": ("<row/>" * 1_000_000, [(1, f"unreadable XLSX: {OVER}")]),
    "a row twice": ('<row r="2"><c><v>1</v></c></row>', [KEPT, (3, "unreadable XLSX: ValueError")]),
    "no such column": ('<row r="3"><c r="ZZZZZ3"><v>1</v></c></row>', [KEPT, (3, "unreadable XLSX: ValueError")]),
    "no such text": ('<row r="3"><c r="A3" t="s"><v>99999</v></c></row>', [KEPT, (3, "unreadable XLSX: IndexError")]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.large] if "million" in name else []) for name in HOSTILE]
)
def test_a_hostile_sheet_costs_one_row(tmp_path: Path, name: str) -> None:
    data, rows = HOSTILE[name]
    path = edited(book(tmp_path / "a.xlsx", [HEADER]), FIRST, sheet(TOP + GOOD + data))
    started = time.monotonic()
    assert rows_of(path) == rows
    assert time.monotonic() - started < 30


def test_entities_are_not_expanded(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    bomb = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(9))
    for declared, used in ((f'<!ENTITY e0 "aaaaaaaaaa">{bomb}', "&e9;"), (f'<!ENTITY x SYSTEM "{tmp_path}/secret">', "&x;")):
        rows = TOP + GOOD + '<row r="3">' + CELL.format(n=3, text=used) + "</row>"
        path = edited(book(tmp_path / "a.xlsx", [HEADER]), FIRST, sheet(rows))
        edited(
            path,
            FIRST,
            lambda xml, declared=declared: (
                f"<!DOCTYPE worksheet [{declared}]>" + xml.partition("?>")[2]
                if xml.startswith("<?xml")
                else f"<!DOCTYPE worksheet [{declared}]>" + xml
            ),
        )
        ((line, reason),) = [row for row in rows_of(path) if isinstance(row[1], str)]
        assert reason.startswith("unreadable XLSX: ")
        assert line in (1, 3)


STRINGS = "xl/sharedStrings.xml"
KIND = "application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"


def with_strings(path: Path, strings: list[bytes], data: str) -> Path:
    """The workbook with a table of strings, as Excel writes one, in which `data` names the cells' texts."""
    edited(path, FIRST, sheet(data))
    with zipfile.ZipFile(path) as before:
        parts = {name: before.read(name) for name in before.namelist()}
    override = f'<Override PartName="/{STRINGS}" ContentType="{KIND}"/></Types>'.encode()
    parts["[Content_Types].xml"] = parts["[Content_Types].xml"].replace(b"</Types>", override)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as after:
        for name, part in parts.items():
            after.writestr(name, part)
        with after.open(STRINGS, "w") as out:
            for string in [b'<sst xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">', *strings, b"</sst>"]:
                out.write(string)
    return path


SHARED = '<row r="1"><c r="A1" t="s"><v>0</v></c></row><row r="2"><c r="A2" t="s"><v>1</v></c></row>'


def test_texts_of_the_table_of_strings_are_read(tmp_path: Path) -> None:
    strings = [b"<si><t>text</t></si>", b"<si><r><t>Two </t></r><r><rPr><b/></rPr><t>fonts</t></r></si>"]
    path = with_strings(book(tmp_path / "a.xlsx", [HEADER]), strings, SHARED)
    assert rows_of(path) == [(2, {"text": "Two fonts"})]


@pytest.mark.large
def test_a_bomb_costs_one_row_and_bounded_time(tmp_path: Path) -> None:
    strings = [b"<si><t>text</t></si>", b"<si><t>", *[b"a" * (1 << 20)] * 256, b"</t></si>"]
    path = with_strings(book(tmp_path / "a.xlsx", [HEADER]), strings, SHARED)
    assert path.stat().st_size < 1 << 20
    started = time.monotonic()
    ((_, reason),) = rows_of(path)
    assert reason == f"unreadable XLSX: {OVER}"
    assert time.monotonic() - started < 60
