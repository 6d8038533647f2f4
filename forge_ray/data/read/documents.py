"""One file, one text: plain text and code, HTML, PDF, DOCX. The libraries are those of `forge-ray[docs]`."""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from forge_ray.errors import DataError

DOCUMENTS = ("text", "html", "pdf", "docx")
LIBRARIES = {"html": "inscriptis", "pdf": "pypdf", "docx": "docx", "xlsx": "openpyxl"}
MAX_FILE_BYTES = 256 << 20  # of a PDF or DOCX, most of which is images; a DOCX also unpacked
CHARSET = re.compile(rb"""<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_.:-]{1,40})""", re.I)
# Menus and code that a page carries beside its text
UNREAD = ("script", "style", "noscript", "template", "nav", "footer", "svg", "head")


class Unreadable(Exception):
    """A document without a text; the message is the reason for the quarantine."""


def require_library(format: str, path: str) -> None:
    """`DataError` that says what to install, before a thousand rows are rejected for it."""
    if name := LIBRARIES.get(format):
        require_package(name, f"{path!r} is {format}", "docs")


def require_package(name: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise DataError(
            f"data.sources: {what}, which needs the package {name!r}",
            hint=f"pip install 'forge-ray[{extra}]' on every node",
        )


def import_library(format: str) -> None:
    """Imports what reads the format, which takes longer than to read a small file."""
    if name := LIBRARIES.get(format):
        importlib.import_module(name)
        if format == "html":
            importlib.import_module("lxml.html")


def unpacked_bytes(data: bytes) -> int:
    """What a zip file says that its entries hold; 0 for what is not one."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as package:
            return sum(entry.file_size for entry in package.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return 0


def document_text(data: bytes, format: str) -> str:
    """The readable text of a whole file; raises `Unreadable`."""
    readers: dict[str, Callable[[bytes], str]] = {"text": _text, "html": _html, "pdf": _pdf, "docx": _docx}
    if format == "text":
        return _text(data)
    try:
        return readers[format](data)
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # parsers of others' formats fail in many ways, and one file must not stop the rest
        raise Unreadable(f"unreadable {format.upper()}: {type(error).__name__}") from error


def _text(data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("not UTF-8") from None
    if "\x00" in text:
        raise Unreadable("not a text: it holds NUL bytes")
    return text


def _html(data: bytes) -> str:
    import lxml.html
    from inscriptis import Inscriptis
    from inscriptis.css_profiles import CSS_PROFILES
    from inscriptis.model.config import ParserConfig

    page = _decoded_html(data)
    if not page.strip():
        return ""
    # a declaration of the charset is of the bytes, and lxml refuses one in a string
    parser = lxml.html.HTMLParser(encoding="utf-8")
    root = lxml.html.fromstring(page.encode("utf-8", "replace"), parser=parser)
    if any(entry.type == lxml.etree.ErrorTypes.ERR_RESOURCE_LIMIT for entry in parser.error_log):  # the rest is not there
        raise Unreadable("HTML with elements more than 256 deep")
    title = root.findtext(".//title") or ""
    for element in list(root.iter(*UNREAD)):
        if element.getparent() is not None:
            element.drop_tree()
    body = Inscriptis(root, ParserConfig(css=CSS_PROFILES["strict"])).get_text()
    text = "\n".join(line.rstrip() for line in body.strip("\n").split("\n"))
    title = " ".join(title.split())
    return text if not title or text.lstrip().startswith(title) else f"{title}\n\n{text}"


def _decoded_html(data: bytes) -> str:
    """UTF-8 unless it is not; then what the page declares. Nothing is guessed."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        declared = CHARSET.search(data[:2048])
    try:
        if declared:
            return data.decode(declared.group(1).decode())
    except (LookupError, UnicodeDecodeError):
        pass
    raise Unreadable("not UTF-8, nor of the charset that the page declares")


def _pdf(data: bytes) -> str:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of each small breach of the standard
    reader = pypdf.PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):  # many PDFs are closed to printing only: no password opens them
        raise Unreadable("encrypted PDF")
    text = "\n\n".join(page.extract_text().strip() for page in reader.pages).strip()
    if not text:
        raise Unreadable("PDF without text")  # scanned pages, which want OCR first
    return _joined_surrogates(text)


def _joined_surrogates(text: str) -> str:
    """Fonts' tables name letters in UTF-16, so an emoji arrives in halves."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _docx(data: bytes) -> str:
    import docx

    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise Unreadable("encrypted DOCX, or a Word file from before 2007")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as package:
            unpacked = sum(entry.file_size for entry in package.infolist())
    except zipfile.BadZipFile:
        raise Unreadable("unreadable DOCX: not a zip file") from None
    if unpacked > MAX_FILE_BYTES:
        raise Unreadable(f"DOCX of more than {MAX_FILE_BYTES >> 20} MiB")
    text = "\n".join(_docx_blocks(docx.Document(io.BytesIO(data)))).strip()
    if not text:
        raise Unreadable("DOCX without text")
    return text


def _docx_blocks(parent: Any) -> Iterator[str]:
    """Paragraphs and tables in the order of the page; a table's row is a line, its cells apart by tabs."""
    for block in parent.iter_inner_content():
        if hasattr(block, "rows"):
            for row in block.rows:
                cells: list[Any] = []
                for cell in row.cells:  # a merged cell comes once per column that it covers
                    if not cells or cell._tc is not cells[-1]._tc:
                        cells.append(cell)
                yield "\t".join(" ".join(" ".join(_docx_blocks(cell)).split()) for cell in cells)
        else:
            yield block.text
