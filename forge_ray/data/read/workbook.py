"""XLSX → rows of one sheet, whose first row is the header; runs in a reader's own process (`foreign`).

openpyxl reads the cells. Rows are taken from its parser of a sheet: its sheet would make an object for each cell of the
rectangle that the file claims to fill.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from itertools import islice
from typing import Any

from forge_ray.data.read.lines import TOO_LONG, open_file

BYTES_PER_ROW = 20  # of XML: no row takes fewer
NO_VALUE = "a formula has no stored value: open the workbook in a spreadsheet program, and save it there"
Row = tuple[int, dict[str, Any] | None, str]  # number in the sheet; the cells by column, or why not


def sheets(path: str) -> dict[str, Any]:
    """`names` of all sheets, those of them that are `visible` and hold a row, and `num_rows`, about, of each."""
    with open_file(path) as stream:
        book = _opened(stream)
        entries = {entry.filename: entry.file_size for entry in book._archive.infolist()}
        visible, num_rows = [], {}
        for sheet in book.worksheets:
            most = entries.get(sheet._worksheet_path.lstrip("/"), 0) // BYTES_PER_ROW
            filled = len(list(islice(_filled(book, sheet), 2)))
            claimed = sheet.max_row - 1 if sheet.max_row else most // 5
            num_rows[sheet.title] = filled and max(filled - 1, min(most, claimed))
            visible += [sheet.title] if filled and sheet.sheet_state == "visible" else []
        return {"names": list(num_rows), "visible": visible, "num_rows": num_rows}


def sheet_rows(path: str, name: str, limit: int) -> Iterator[Row]:
    """Every row behind the header that holds a value; a row of more than `limit` letters is named instead."""
    with open_file(path) as stream:
        book = _opened(stream)
        rows = _filled(book, book[name])
        number, header = next(rows, (1, {}))
        columns = {column: str(_value(cell)) for column, cell in header.items()}
        if len(set(columns.values())) < len(columns):
            yield number, None, "the header names a column twice"
            return
        for number, cells in rows:
            yield (number, *_row(columns, cells, limit))


def _row(columns: dict[int, str], cells: dict[int, dict[str, Any]], limit: int) -> tuple[dict[str, Any] | None, str]:
    from openpyxl.utils import get_column_letter

    row: dict[str, Any] = {}
    for column, cell in cells.items():
        if cell["data_type"] == "f":
            return None, NO_VALUE
        if cell["data_type"] == "e":
            return None, f"a cell holds the error {str(cell['value'])[:20]}"
        if column not in columns:
            return None, f"a cell of column {get_column_letter(column)} has no name in the header"
        row[columns[column]] = _value(cell)
    if sum(len(value) for value in row.values() if isinstance(value, str)) > limit:
        return None, TOO_LONG
    return row, ""


def _opened(stream: Any) -> Any:
    from openpyxl import load_workbook

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts that hold no cells
        return load_workbook(stream, read_only=True, data_only=True, keep_links=False)


def _filled(book: Any, sheet: Any) -> Iterator[tuple[int, dict[int, dict[str, Any]]]]:
    """Number and cells of each row that has any, in the order of their numbers."""
    from openpyxl.worksheet._reader import FORMULA_TAG, VALUE_TAG, WorkSheetParser

    class Cells(WorkSheetParser):  # type: ignore[misc]
        """A parser that tells a formula which nobody has calculated from an empty cell."""

        def parse_cell(self, element: Any) -> Any:
            cell = super().parse_cell(element)
            if cell["value"] is None and element.find(FORMULA_TAG) is not None and element.find(VALUE_TAG) is None:
                cell["data_type"] = "f"
            return cell

    last = 0
    formats = {"date_formats": book._date_formats, "timedelta_formats": book._timedelta_formats}
    with sheet._get_source() as source, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = Cells(source, sheet._shared_strings, data_only=True, epoch=book.epoch, **formats)
        for number, row in parser.parse():
            if number <= last:
                raise ValueError(f"row {number} is behind row {last}")
            last = number
            cells = {cell["column"]: cell for cell in row if cell["value"] is not None or cell["data_type"] == "f"}
            if cells:
                yield number, cells


def _value(cell: dict[str, Any]) -> Any:
    """The value as JSON has it: numbers and booleans as they are, dates and times as ISO text."""
    value = cell["value"]
    if isinstance(value, datetime):
        return value.date().isoformat() if value.time() == time() else value.isoformat()
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        seconds = round(value.total_seconds())
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return value.replace("_x000D_", "\r") if isinstance(value, str) else value


def unpacked_bytes(path: str) -> int:
    """What the entries of a workbook are said to hold."""
    with open_file(path) as stream, zipfile.ZipFile(stream) as package:
        return sum(entry.file_size for entry in package.infolist())
