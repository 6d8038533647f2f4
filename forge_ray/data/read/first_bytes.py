"""Files that are not what their names say: found by their first bytes, named once, with what to do about it.

Without this every line of such a file would be a bad row with a reason that names no remedy.
"""

from __future__ import annotations

import json

HEAD_BYTES = 256 << 10
LINES = ("jsonl", "json", "csv")
TEXTS = (*LINES, "text")
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
POINTER = b"version https://git-lfs.github.com/spec/"
# first bytes, the format that begins so, what the file is and what to do
SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (GZIP, "", "a gzip stream without the ending .gz: add it to the name"),
    (ZSTD, "", "a zstd stream without the ending .zst: add it to the name"),
    (b"BZh", "", "a bzip2 stream: unpack it"),
    (b"\xfd7zXZ\0", "", "an xz stream: unpack it"),
    (b"PK\x03\x04", "docx", "a zip archive or an Excel workbook: unpack it, or save the sheet as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "docx", "an Office file from before 2007: save it as CSV UTF-8 or DOCX"),
    (b"PAR1", "parquet", "a Parquet file: set `format: parquet`, or give it the ending .parquet"),
    (b"ARROW1", "arrow", "an Arrow file: set `format: arrow`, or give it the ending .arrow"),
    (b"%PDF-", "pdf", "a PDF: set `format: pdf`, or give it the ending .pdf"),
    (b"SQLite format 3\0", "", "an SQLite database: export its tables as CSV or JSONL"),
)
UTF_16 = "the file is UTF-16, not UTF-8: convert it (iconv -f UTF-16 -t UTF-8)"
OLD_MAC = "the lines of the file end in CR alone: convert them (tr '\\r' '\\n')"
NOT_UTF_8 = (
    "the file is not UTF-8, most likely Windows-1252: save it as CSV UTF-8, or convert it (iconv -f WINDOWS-1252 -t UTF-8)"
)


def why_not(format: str, compression: str, head: bytes) -> str:
    """Why a file cannot hold rows of its format, by its first bytes as they are on disk; "" where they do not tell."""
    if head.startswith(POINTER):
        return "the file is a pointer of Git LFS, not what it points at: fetch that (git lfs pull)"
    if compression:
        name, ending, start = ("gzip", ".gz", GZIP) if compression == "gzip" else ("zstd", ".zst", ZSTD)
        is_other = len(head) >= len(start) and not head.startswith(start)
        return f"the file is not a {name} stream, though its name ends in {ending}: remove the ending" if is_other else ""
    if format != "text" or b"\0" in head:
        for start, own, what in SIGNATURES:
            if head.startswith(start) and format != own:
                return f"the file is {what}"
    return why_not_text(format, head)


def why_not_text(format: str, head: bytes) -> str:
    """The same of an unpacked file: its encoding and the ends of its lines."""
    if format in TEXTS and _is_utf_16(head):
        return UTF_16
    if format in (*LINES, "parquet", "arrow") and head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "the file is an HTML page, such as a login or an error: download it again"
    if format in LINES and _is_old_mac(format, head):
        return OLD_MAC
    return NOT_UTF_8 if format == "csv" and _is_other_encoding(head) else ""


def _is_utf_16(head: bytes) -> bool:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    sample = head[:1024]
    zeros = sorted((sample[0::2].count(0), sample[1::2].count(0)))
    return zeros[0] == 0 and zeros[1] * 5 > len(sample)  # no mark: every other byte of Latin text is zero


def _is_old_mac(format: str, head: bytes) -> bool:
    first, mark, rest = head.partition(b"\r")
    if b"\n" in head or not mark or not rest.strip():
        return False
    if format == "csv":
        return True
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _is_other_encoding(head: bytes) -> bool:
    """Whether no letter beyond ASCII is written in UTF-8: in the header, or in two lines. One alone may be damaged."""
    lines = head.split(b"\n")
    lines = lines[:-1] if len(lines) > 1 and len(head) >= HEAD_BYTES else lines  # the last one may be cut
    bad = []
    for number, line in enumerate(lines):
        try:
            if not line.removeprefix(b"\xef\xbb\xbf").decode().isascii():
                return False
        except UnicodeDecodeError:
            bad.append(number)
    return bad[:1] == [0] or len(bad) > 1
