"""The text of a file, as a person would read it, or the reason why there is none."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest

from forge_ray.data.read.documents import Unreadable, document_text
from forge_ray.data.read.ingest import index_file
from forge_ray.data.read.readers import read_raw
from forge_ray.errors import DataError

pytestmark = pytest.mark.unit

PAGE = """<!DOCTYPE html><html><head><title>Refunds &amp; returns</title><style>p {color: red}</style></head>
<body><nav><a href="/">Home</a></nav><h1>Refunds</h1><script>var x = "hidden";</script>
<p>Within <b>30 days</b> of\n the purchase.</p><ul><li>Keep the receipt</li><li>Call us</li></ul>
<table><tr><th>Plan</th><th>Price</th></tr><tr><td>A</td><td>5 €</td></tr></table>
<pre>x = 1\n  y = 2</pre><footer>Imprint</footer></body></html>"""


def refused(data: bytes, format: str) -> str:
    with pytest.raises(Unreadable) as error:
        document_text(data, format)
    return str(error.value)


def test_text() -> None:
    assert document_text("\ufeffa\nü 🙂".encode(), "text") == "a\nü 🙂"
    assert refused("ü".encode("latin-1"), "text") == "not UTF-8"
    assert refused("text".encode("utf-16"), "text") == "not UTF-8"
    assert refused(b"\x7fELF\x00\x00", "text") == "not a text: it holds NUL bytes"


def test_html_is_what_a_reader_sees() -> None:
    pytest.importorskip("inscriptis")
    text = document_text(PAGE.encode(), "html")
    assert text.startswith("Refunds & returns\n\nRefunds\n")
    for part in ("Within 30 days of the purchase.", "* Keep the receipt\n", "Plan  Price\nA     5 €\n", "x = 1\n  y = 2"):
        assert part in text
    for part in ("hidden", "color", "Home", "Imprint"):
        assert part not in text


@pytest.mark.parametrize("charset", ["utf-8", "windows-1252", "shift_jis"])
def test_html_of_any_declared_charset(charset: str) -> None:
    pytest.importorskip("inscriptis")
    word = "日本" if charset == "shift_jis" else "Müller"
    head = f'<head><meta http-equiv="Content-Type" content="text/html; charset={charset}"></head>'
    page = f"<html>{head}<body>{word}</body></html>"
    assert document_text(page.encode(charset), "html") == word
    assert refused("<p>Müller".encode("latin-1"), "html") == "not UTF-8, nor of the charset that the page declares"
    assert document_text(b" \n", "html") == ""
    assert refused(b"<div>" * 5000 + b"deep", "html") == "HTML with elements more than 256 deep"
    assert document_text(b"<div>" * 200 + b"deep", "html") == "deep"


def pdf(*pages: str, password: str = "") -> bytes:
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    font: Any = DictionaryObject(
        {NameObject(k): NameObject(v) for k, v in (("/Type", "/Font"), ("/Subtype", "/Type1"), ("/BaseFont", "/Helvetica"))}
    )
    for text in pages:
        page = writer.add_blank_page(300, 300)
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
    if password:
        writer.encrypt("" if password == "owner" else password, "owner")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_pdf() -> None:
    pytest.importorskip("pypdf")
    assert document_text(pdf("First page", "Second page"), "pdf") == "First page\n\nSecond page"
    assert document_text(pdf("Not to be printed", password="owner"), "pdf") == "Not to be printed"
    assert refused(pdf("Secret", password="user"), "pdf") == "encrypted PDF"
    assert refused(pdf(""), "pdf") == "PDF without text"
    assert refused(b"", "pdf").startswith("unreadable PDF: ")
    assert refused(b"no PDF at all" * 100, "pdf").startswith("unreadable PDF: ")
    assert refused(pdf("First page")[:200], "pdf").startswith(("unreadable PDF: ", "PDF without text"))


def docx_bytes(text: str = "") -> bytes:
    import docx

    document = docx.Document()
    if text:
        document.add_heading("Refunds", 1)
        document.add_paragraph(text)
        table = document.add_table(2, 3)
        for number, word in enumerate(("Plan", "Price", "Note", "A", "5 €", "")):
            table.cell(number // 3, number % 3).text = word
        table.cell(1, 1).merge(table.cell(1, 2))
        document.add_paragraph("Behind the table")
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def test_docx(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("docx")
    data = docx_bytes("Within 30 days")
    assert document_text(data, "docx") == "Refunds\nWithin 30 days\nPlan\tPrice\tNote\nA\t5 €\nBehind the table"
    assert refused(docx_bytes(), "docx") == "DOCX without text"
    assert refused(data[:-100], "docx") == "unreadable DOCX: not a zip file"
    assert refused(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "docx") == "encrypted DOCX, or a Word file from before 2007"
    monkeypatch.setattr("forge_ray.data.read.documents.MAX_FILE_BYTES", 1 << 10)
    assert refused(data, "docx").startswith("DOCX of more than")


def test_documents_are_rows(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    path = tmp_path / "a.pdf"
    for data, value, reason in (
        (pdf("A page"), {"text": "A page"}, ""),
        (b"no PDF", None, "unreadable PDF: PdfStreamError"),
        (pdf("long " * 500), None, "longer than max_line_bytes"),
    ):
        path.write_bytes(data)
        (chunk,) = index_file(str(path), path.name, "pdf").chunks
        (row,) = read_raw(chunk, 2000)
        assert (row.line, row.offset, row.value, row.reason) == (1, 0, value, reason)


def test_missing_document_library_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "a.pdf"
    path.write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"is pdf, which needs the package 'pypdf'\nhint: pip install 'forge-ray\[docs\]'"):
        index_file(str(path), "a.pdf", "pdf")
