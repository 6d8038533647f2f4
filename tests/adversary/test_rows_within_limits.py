"""Files of some hundred bytes that stand for gigabytes cost one quarantine line each, within memory and time."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.data.read import foreign, limited
from forge_ray.errors import DataError

pytestmark = pytest.mark.unit

WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
LIMIT_BYTES = 120 << 20
CPU_S = 3.0
START_S = 3.0  # what Python and the libraries take to start, twice


def docx(path: Path, body: bytes) -> None:
    import docx as library

    empty = io.BytesIO()
    library.Document().save(empty)
    with zipfile.ZipFile(empty) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename == "word/document.xml":
                data = f'<w:document xmlns:w="{WORD[1:-1]}"><w:body>'.encode() + body + b"</w:body></w:document>"
            target.writestr(entry.filename, data)


def repeated(count: int) -> pa.Table:
    """One long value, named by many rows."""
    value = pa.array(["x" * 8_000_000])
    return pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), value)})


def parquet(table: pa.Table, **settings: object) -> Callable[[Path], None]:
    return lambda path: pq.write_table(table, path, compression="zstd", **settings)


def arrow(table: pa.Table) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(path, table.schema, options=options) as writer:
            writer.write_table(table)

    return write


SPAN = b'<w:tbl><w:tr><w:tc><w:tcPr><w:gridSpan w:val="2000000000"/></w:tcPr><w:p/></w:tc></w:tr></w:tbl>'
FILES: dict[str, Callable[[Path], None]] = {
    "dictionary.parquet": parquet(repeated(700), store_schema=False),
    "longer.parquet": parquet(repeated(4000), store_schema=False),
    "categories.parquet": parquet(repeated(4000)),
    "page.parquet": parquet(pa.table({"text": ["y" * (100 << 20)]}), use_dictionary=False),
    "nulls.parquet": parquet(pa.table({"text": pa.nulls(1_000_000, pa.string())})),
    "list.parquet": parquet(pa.table({"messages": pa.array([[0] * 20_000_000], pa.list_(pa.int8()))})),
    "dictionary.arrow": arrow(repeated(700)),
    "nulls.arrow": arrow(pa.table({"text": pa.nulls(50_000_000)})),
    "body.arrow": arrow(pa.table({"text": ["z" * (300 << 20)]})),
    "runs.arrow": arrow(
        pa.table({"text": pa.RunEndEncodedArray.from_arrays(pa.array([2_000_000], pa.int32()), pa.array(["q" * 100_000]))})
    ),
    "span.docx": lambda path: docx(path, SPAN),
    "paragraphs.docx": lambda path: docx(path, b"<w:p/>" * 1_000_000),
    "letters.docx": lambda path: docx(path, b"<w:p><w:r><w:t>a</w:t></w:r></w:p>" * 1_000_000),
}
READER = """
import json, resource, sys
from forge_ray.data.read.ingest import index_file
from forge_ray.data.read.readers import read_raw
import forge_ray.data.read.documents, forge_ray.data.read.columnar
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path, format = sys.argv[1:]
reasons, good = [], 0
for chunk in index_file(path, "x", format).chunks:
    for raw in read_raw(chunk, 16 << 20):
        reasons += [raw.reason] if raw.reason else []
        good += not raw.reason
from forge_ray.data.read import limited
limited._end_all()
kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps({"reasons": reasons, "good": good, "grown": (kib - base) << 10}))
"""


def measured(path: Path) -> tuple[dict[str, Any], float]:
    """What a process that reads the file says of it, and the seconds of processor time that it and its reader took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path), path.suffix[1:]], capture_output=True, text=True, timeout=120, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return json.loads(done.stdout), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("name", FILES)
def test_a_small_file_that_stands_for_gigabytes_is_one_quarantine_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FILES[name](path)
    result, cpu_s = measured(path)
    assert len(result["reasons"]) == 1
    assert result["good"] == 0
    assert result["grown"] < LIMIT_BYTES
    assert cpu_s < CPU_S + START_S


@pytest.mark.parametrize("form", ["rows", "nested"])
def test_150_000_cells_cost_no_more_than_their_bytes_may(form: str, tmp_path: Path) -> None:
    """1.2 MB of HTML: a table of one row for each cell, for which the library would take minutes, or cells inside cells."""
    path = tmp_path / "cells.html"
    path.write_bytes(b"<table>" + (b"<tr><td>" * 150_000 if form == "rows" else b"<td><div>" * 150_000))
    result, cpu_s = measured(path)
    reason = "needs more time or memory" if form == "rows" else "HTML with elements more than 256 deep"
    assert len(result["reasons"]) == 1
    assert reason in result["reasons"][0]
    size = path.stat().st_size
    assert result["grown"] < LIMIT_BYTES + foreign.MEMORY_PER_BYTE * size
    assert cpu_s < CPU_S + START_S + foreign.HTML_CPU_S_PER_MIB * size / (1 << 20)


def test_rows_before_the_limits_are_read_as_ever(tmp_path: Path) -> None:
    """A long value that every row repeats is read, a few rows at a time; so are nested values with dictionaries."""
    from forge_ray.data.read.ingest import index_file
    from forge_ray.data.read.readers import read_raw

    system = "Be brief. " * 20_000  # 200 kB
    rows = [
        {"system": system, "answer": hashlib.sha512(bytes([number % 256, number // 256])).hexdigest()}
        for number in range(2000)
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet")
    turns = pa.array([[{"role": "user", "content": "a"}, {"role": "assistant", "content": str(n)}] for n in range(50)])
    roles = pa.table({"messages": turns, "kind": pa.array(["x", "y"] * 25).dictionary_encode()})
    with pa.ipc.new_file(tmp_path / "roles.arrow", roles.schema) as writer:
        writer.write_table(roles)
    for name, expected in (("rows.parquet", rows), ("roles.arrow", roles.to_pylist())):
        chunks = index_file(str(tmp_path / name), name, name.split(".")[1]).chunks
        assert [raw.value for chunk in chunks for raw in read_raw(chunk, 16 << 20)] == expected


def test_small_documents_share_one_process() -> None:
    """What a file costs is a message to a process that is there, not a process."""
    from forge_ray.data.read import limited

    page = b"<p>hello <b>you</b></p>"
    assert limited.read_document(page, "html") == "hello you"
    process = limited._idle[-1].process.pid
    began = time.process_time()
    for _ in range(50):
        limited.read_document(page, "html")
    assert limited._idle[-1].process.pid == process
    assert time.process_time() - began < 50 * 0.005


def test_reader_that_cannot_start_costs_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the node that is at fault, and the build stops; the file is not quarantined."""
    monkeypatch.setattr(limited, "_idle", [])
    monkeypatch.setattr(limited.sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="ended at its start, with code 1") as caught:
        limited.read_document(b"<p>x</p>", "html")
    assert "forge_ray.data.read.foreign" in caught.value.hint
