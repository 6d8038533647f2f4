"""What the first bytes of a file tell: its encoding and line ends, or that it is not what its name says.

Such a file is named once, with what to do about it: else every line of it would be a bad row without a remedy.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass

from forge_ray.config.encodings import UTF_8, WIDE

HEAD_BYTES = 256 << 10
LINES = ("jsonl", "json", "csv")
TEXTS = (*LINES, "text")
ENCODED = (*TEXTS, "html")  # which of its own accord declares its encoding
STREAMS = {
    "gzip": (".gz", b"\x1f\x8b"),
    "zstd": (".zst", b"\x28\xb5\x2f\xfd"),
    "bz2": (".bz2", b"BZh"),
    "xz": (".xz", b"\xfd7zXZ\0"),
}  # by compression: the ending of its name, its first bytes
POINTER = b"version https://git-lfs.github.com/spec/"
# first bytes, the formats that begin so, what the file is and what to do
SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    *((start, "", f"a stream of {kind} without the ending {ending}: add it") for kind, (ending, start) in STREAMS.items()),
    (b"PK\x03\x04", "docx xlsx", "a zip archive or an Excel workbook: unpack it, or give it the ending .xlsx"),
    (b"\xd0\xcf\x11\xe0", "docx", "an Office file with a password or from before 2007: save it as XLSX, CSV UTF-8 or DOCX"),
    (b"PAR1", "parquet", "a Parquet file: set `format: parquet`, or give it the ending .parquet"),
    (b"ARROW1", "arrow", "an Arrow file: set `format: arrow`, or give it the ending .arrow"),
    (b"%PDF-", "pdf", "a PDF: set `format: pdf`, or give it the ending .pdf"),
    (b"SQLite format 3\0", "", "an SQLite database: export its tables as CSV or JSONL"),
)
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # which begins as the mark of UTF-16 does
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, UTF_8),
)
ROW_ENDS = re.compile(rb"\n|\},")  # of a list of objects, which may be one line
PAGE = "the file is an HTML page, such as a login or an error: download it again"
NOT_UTF_8 = (
    "the file is not UTF-8, most likely Windows-1252: set `encoding: windows-1252` for its source if it is, else save it as"
    " UTF-8"
)


@dataclass(frozen=True)
class TextForm:
    """How the bytes of a text file are read; `reason`: why they are not."""

    format: str
    encoding: str = UTF_8
    cr_ends: bool = False
    reason: str = ""


def why_not(format: str, compression: str, head: bytes) -> str:
    """Why a file cannot hold rows of its format, by its first bytes as they are on disk; "" where they do not tell."""
    if head.startswith(POINTER):
        return "the file is a pointer of Git LFS, not what it points at: fetch that (git lfs pull)"
    if compression:
        ending, start = STREAMS[compression]
        if len(head) < len(start) or head.startswith(start):
            return ""
        return f"the file is not a {compression} stream, though its name ends in {ending}: remove the ending"
    if format != "text" or b"\0" in head:
        for start, own, what in SIGNATURES:
            if head.startswith(start) and format not in own.split():
                return f"the file is {what}"
    return PAGE if format in ("parquet", "arrow", "xlsx") and _is_page(head) else ""


def text_form(format: str, encoding: str, head: bytes, is_cut: bool) -> TextForm:
    """How a text file is read that begins, unpacked, with `head`: a byte order mark tells its encoding, else the source.
    `is_cut`: whether more bytes follow, so that `head` may end in the middle of a character."""
    marked = next((own for mark, own in MARKS if head.startswith(mark)), "")
    own = marked or encoding
    if reason := "" if marked else _contradiction(format, encoding, head):
        return TextForm(format, encoding, reason=reason)
    text = head
    if own != UTF_8:
        text = codecs.getincrementaldecoder(own)("replace").decode(head).encode("utf-8", "replace")
    if format == "jsonl" and _is_list(text):
        format = "json"
    if format in LINES and _is_page(text):
        return TextForm(format, own, reason=PAGE)
    if own == UTF_8 and format in ("csv", "text") and is_other_encoding(format, head, is_cut):
        return TextForm(format, own, reason=NOT_UTF_8)
    return TextForm(format, own, format in LINES and _has_cr_ends(format, text))


def _is_page(head: bytes) -> bool:
    return head.removeprefix(codecs.BOM_UTF8).lstrip()[:14].lower().startswith((b"<!doctype html", b"<html"))


def _contradiction(format: str, encoding: str, head: bytes) -> str:
    """Why a file without a byte order mark is not of the encoding that its source names."""
    order = _order_of_utf_16(head) if format in TEXTS else ""
    if order and encoding != f"utf-16-{order}":
        return f"the file is UTF-16 without a byte order mark: set `encoding: utf-16-{order}` for its source"
    if encoding in ("utf-16", "utf-32"):
        return (
            f"the file has no byte order mark, so the order of its bytes is not known: set `encoding: {encoding}-le`"
            f" or `{encoding}-be` for its source"
        )
    if encoding != UTF_8 and _is_utf_8(head, is_wide=encoding in WIDE):
        return f"the file is UTF-8, not {encoding}: give it a source without `encoding`"
    return ""


def _is_utf_8(head: bytes, is_wide: bool) -> bool:
    """Whether text of another encoding is UTF-8 all the same, which it is only by name: with letters beyond ASCII, or, where
    that encoding has at least two bytes a letter, with any."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return "\0" not in text and (is_wide or not text.isascii()) and bool(text)


def _is_list(head: bytes) -> bool:
    """Whether the file is one JSON list of objects: it begins as one, and its first line does not end it before others."""
    body = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not re.match(rb"\[\s*\{", body):
        return False
    first, _, rest = (part.strip() for part in body.partition(b"\n"))
    try:
        return isinstance(json.loads(first), list) and not rest
    except (ValueError, RecursionError):
        return first.endswith((b"[", b",", b"{")) or not rest.startswith((b"{", b"["))


def _order_of_utf_16(head: bytes) -> str:
    """`le` or `be` where every other byte is zero, as of Latin text in UTF-16; else ""."""
    sample = head[:1024]
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    if min(even, odd) or max(even, odd) * 5 <= len(sample):
        return ""
    return "le" if odd else "be"


def _has_cr_ends(format: str, head: bytes) -> bool:
    """Whether CR alone ends the first line. Cells of a table may hold line feeds then; in JSON a CR may be white space."""
    first, mark, rest = head.removeprefix(codecs.BOM_UTF8).partition(b"\r")
    if not mark or rest.startswith(b"\n") or not rest.strip():
        return False
    if format == "csv":
        return b"\n" not in first and first.count(b'"') % 2 == 0
    try:
        return b"\n" not in head and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def is_other_encoding(format: str, head: bytes, is_cut: bool) -> bool:
    """Whether no letter beyond ASCII is written in UTF-8: in a text, in the header of a table, or in two of its lines or of
    JSON's rows. One alone may be damaged."""
    lines = ROW_ENDS.split(head) if format == "json" else head.split(b"\n")
    bad = []
    for number, line in enumerate(lines, start=1):
        is_whole = number < len(lines) or not is_cut
        try:
            if not codecs.utf_8_decode(line.removeprefix(codecs.BOM_UTF8), "strict", is_whole)[0].isascii():
                return False
        except UnicodeDecodeError:
            bad.append(number)
    return len(bad) > (format != "text") or (format == "csv" and bad == [1])
