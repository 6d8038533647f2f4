"""Rows of a CSV or TSV file, with the place of each; a bad row costs itself.

Python's `csv` in its strict mode decides what a row is: quoted fields may hold newlines, a stray quote is an error. It asks
for one line at a time, so what it took is known, and where it fails all lines but the first are read again.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator

from forge_ray.data.read.lines import TOO_LONG, Raw, lines
from forge_ray.data.read.strict_json import PADDING

DELIMITERS = ",;\t"
SEPARATOR = re.compile(r'"?sep=(.)"?[,;\t]*', re.IGNORECASE)


class _Stop(Exception):
    """The row reaches a line that cannot be part of it; the text is the reason."""


def read_csv(source: Iterable[bytes], limit: int) -> Iterator[Raw]:
    """Every row of a file as a dict of strings; the first is the header. `line` is that of the row's first line."""
    feed = _Feed(lines(source, 1, 0, limit, blank=True), limit)
    header = feed.row(",", is_header=True)
    if header is None:
        return
    if header.reason:
        yield Raw(header.line, header.offset, None, None, header.sha256, f"the header: {header.reason}")
        return
    delimiter = ""
    if named := SEPARATOR.fullmatch(feed.header_text):  # Excel's own line
        delimiter = named[1]
        header = feed.row(",", is_header=True)
        if header is None:
            return
        if header.reason:
            yield Raw(header.line, header.offset, None, None, header.sha256, f"the header: {header.reason}")
            return
    first = feed.header_text
    delimiter = delimiter or max(DELIMITERS, key=first.count)  # without any, the comma: a single column
    names = next(csv.reader([first], delimiter=delimiter))
    if len(set(names)) < len(names):
        yield Raw(header.line, header.offset, None, None, header.sha256, "the header names a column twice")
        return
    while (row := feed.row(delimiter)) is not None:
        if row.reason:
            yield row
        elif len(row.value) != len(names):
            reason = f"{len(row.value)} fields where the header has {len(names)}"
            yield Raw(row.line, row.offset, None, None, row.sha256, reason)
        else:
            yield Raw(row.line, row.offset, None, dict(zip(names, row.value, strict=True)), row.sha256)


class _Feed:
    """Lines to the parser, one at a time; those of a row that failed come again, but for the first."""

    def __init__(self, source: Iterator[Raw], limit: int) -> None:
        self.source, self.limit = source, limit
        self.again: deque[Raw] = deque()
        self.taken: list[Raw] = []
        self.header_text = ""

    def row(self, delimiter: str, is_header: bool = False) -> Raw | None:
        """The next row: its fields in `value`, or the reason why not; None at the end."""
        first = self._next()
        while first is not None and not first.reason and not (first.raw or b"").strip(b"\r"):
            first = self._next()
        if first is None or first.reason:
            return first
        self.taken = [first]
        if not (first.raw or b"").strip(b"\0\r"):
            return self._bad(PADDING)
        if is_header:  # before its delimiter is known; a header in one line
            return self._header(first)
        if csv.field_size_limit() < self.limit:
            csv.field_size_limit(self.limit)
        try:
            fields = next(csv.reader(self._lines(), delimiter=delimiter, strict=True))
        except StopIteration:
            return self._bad("malformed CSV: unexpected end of data")
        except csv.Error as error:
            return self._bad(f"malformed CSV: {str(error)[:80]}")
        except _Stop as reason:
            return self._bad(str(reason))
        except UnicodeDecodeError:
            return self._bad("not UTF-8")
        if len(self.taken) == 1:
            return Raw(first.line, first.offset, None, fields, first.sha256)
        raw = b"\n".join(line.raw or b"" for line in self.taken)
        return Raw(first.line, first.offset, None, fields, hashlib.sha256(raw).hexdigest())

    def _header(self, line: Raw) -> Raw:
        try:
            self.header_text = (line.raw or b"").decode("utf-8-sig").rstrip("\r")
            next(csv.reader([self.header_text], strict=True))
        except UnicodeDecodeError:
            return self._bad("not UTF-8")
        except (csv.Error, StopIteration) as error:
            return self._bad(f"malformed CSV: {str(error)[:80]}")
        return line

    def _next(self) -> Raw | None:
        return self.again.popleft() if self.again else next(self.source, None)

    def _lines(self) -> Iterator[str]:
        size = 0
        for number in range(1 << 62):
            if number:
                line = self._next()
                if line is None:
                    return
                self.taken.append(line)
            line = self.taken[-1]
            size += len(line.raw or b"") + 1
            if line.reason:
                raise _Stop(f"malformed CSV: a quote is open where the next line is unreadable: {line.reason}")
            if size > self.limit + 1:
                raise _Stop(TOO_LONG)
            assert line.raw is not None
            yield line.raw.decode() + "\n"

    def _bad(self, reason: str) -> Raw:
        first, *rest = self.taken
        self.again.extendleft(reversed(rest))
        return Raw(first.line, first.offset, None, None, first.sha256, reason)
