"""The process in which files of others' formats are read, with limits: `python -m forge_ray.data.read.foreign`.

The process that asks is `forge_ray.data.read.limited`; see `forge_ray.machine.limited` for the two together.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

from forge_ray.machine.limited import (
    DONE,
    LIMIT,
    READY,
    REASON,
    VALUE,
    Frame,
    own_pipes,
    pairs,
    set_memory,
    set_processor_time,
    used_memory,
    write,
)

BATCH, LOST, TEXT, ROWS, OUTAGE = b"B", b"N", b"T", b"S", b"X"  # kinds of answers; more in machine.limited
MEMORY = 104 << 20  # bytes above what the process has when the request comes, and so many more per stored byte
MEMORY_PER_BYTE = 16
CPU_S, CPU_S_PER_MIB, HTML_CPU_S_PER_MIB = 1.2, 20.0, 3.0  # of a page nothing is compressed
CPU_S_PER_MIB_OUT = 0.5  # ten times what a quiet core needs: a slow or busy machine must lose no row
ZIP_MEMORY_PER_BYTE, ZIP_MEMORY_PER_UNPACKED_BYTE = 256, 8  # of DOCX and XLSX
TABLE_MEMORY, TABLE_MEMORY_PER_BYTE = 512 << 20, 64  # of the log of a Delta table; its library has threads with stacks
ROWS_BYTES = 64 << 10  # of rows that are handed out at once


def cpu_limit(stored: int, per_mib: float = CPU_S_PER_MIB) -> float:
    """Seconds of processor time for so many bytes."""
    return CPU_S + per_mib * stored / (1 << 20)


class ReaderLimits:
    """Of one request; `allow` may be called again, when more is known of what is read."""

    def __init__(self) -> None:
        self.base = used_memory()
        self.before = resource.getrlimit(resource.RLIMIT_DATA)

    def allow(self, stored: int, memory: int | None = None, cpu_s_per_mib: float = CPU_S_PER_MIB) -> None:
        if self.base is not None:
            set_memory(self.base + MEMORY + (MEMORY_PER_BYTE * stored if memory is None else memory))
        set_processor_time(cpu_limit(stored, cpu_s_per_mib))

    def extend(self, num_bytes: int) -> None:
        """More time for what was handed out; how much that may be has a bound of its own."""
        left, _ = signal.getitimer(signal.ITIMER_PROF)
        set_processor_time(left + CPU_S_PER_MIB_OUT * num_bytes / (1 << 20))

    def lift(self) -> None:
        set_processor_time(0)
        resource.setrlimit(resource.RLIMIT_DATA, self.before)


def _document(request: dict[str, Any], data: bytes) -> Iterator[Frame]:
    from forge_ray.data.read.documents import Unreadable, document_text, import_library, unpacked_bytes

    import_library(request["format"])  # before the limits, which are for the file
    limits = ReaderLimits()
    try:
        memory = None
        if request["format"] == "docx":
            unpacked = ZIP_MEMORY_PER_UNPACKED_BYTE * unpacked_bytes(data)
            memory = min(unpacked, ZIP_MEMORY_PER_BYTE * len(data))
        limits.allow(len(data), memory, HTML_CPU_S_PER_MIB if request["format"] == "html" else CPU_S_PER_MIB)
        text = document_text(data, request["format"])
        limits.lift()
        yield TEXT, text.encode("utf-8", "surrogatepass")
    except Unreadable as error:
        limits.lift()
        yield REASON, str(error).encode("utf-8", "replace")
    finally:
        limits.lift()


def _failure(error: Exception) -> Frame:
    """That a file could not be read: of an outage, which may pass, or of the file itself."""
    from forge_ray.data.read.lines import is_outage

    if is_outage(error):
        return OUTAGE, json.dumps([getattr(error, "errno", None), str(error)]).encode()
    return REASON, ("!" + type(error).__name__).encode()


def _columnar(request: dict[str, Any]) -> Iterator[Frame]:
    import pyarrow as pa

    from forge_ray.data.read import columnar

    limits = ReaderLimits()
    path = request["path"]
    try:
        limits.allow(request.get("size", 0))
        match request["kind"]:
            case "parquet_rows":
                yield VALUE, json.dumps(columnar.parquet_rows(path)).encode()
                return
            case "arrow_cuts":
                yield VALUE, json.dumps(columnar.arrow_cuts(path, request["size"], request["chunk_bytes"])).encode()
                return
            case "schema_notes":
                yield VALUE, json.dumps(columnar.schema_notes(path, request["format"])).encode()
                return
            case "parquet":
                parts = columnar.parquet_slices(path, request["start"], request["limit"], limits.allow)
            case _:
                parts = columnar.arrow_slices(path, request["start"], request["end"], request["limit"], limits.allow)
        for part in parts:
            if isinstance(part, tuple):
                yield LOST, json.dumps(part).encode()
                continue
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, part.schema) as writer:
                writer.write_batch(part)
            body = sink.getvalue().to_pybytes()
            limits.extend(len(body))
            yield BATCH, body
    except columnar.Bomb as error:
        yield REASON, str(error).encode()
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, EOFError) as error:
        yield _failure(error)
    finally:
        limits.lift()


def _workbook(request: dict[str, Any]) -> Iterator[Frame]:
    import openpyxl  # noqa: F401 (before the limits, which are for the file)

    from forge_ray.data.read import columnar, workbook

    limits = ReaderLimits()
    path, stored = request["path"], request["size"]
    try:
        limits.allow(stored)
        unpacked = ZIP_MEMORY_PER_UNPACKED_BYTE * workbook.unpacked_bytes(path)
        limits.allow(stored, min(unpacked, ZIP_MEMORY_PER_BYTE * stored))
        if request["kind"] == "sheets":
            yield VALUE, json.dumps(workbook.sheets(path)).encode()
            return
        yield from _handed(workbook.sheet_rows(path, request["sheet"], request["limit"]), stored, request["limit"], limits)
    except columnar.Bomb as error:
        yield REASON, str(error).encode()
    except MemoryError:
        raise
    except Exception as error:  # a parser of another's format fails in many ways, and one file must not stop the rest
        yield _failure(error)
    finally:
        limits.lift()


def _table(request: dict[str, Any]) -> Iterator[Frame]:
    import deltalake  # noqa: F401 (before the limits, which are for the log)

    from forge_ray.data.read.delta import snapshot

    limits = ReaderLimits()
    try:
        limits.allow(request["size"], TABLE_MEMORY + TABLE_MEMORY_PER_BYTE * request["size"])
        yield VALUE, json.dumps(snapshot(request["path"])).encode()
    except MemoryError:
        raise
    except Exception as error:  # its library has errors of many kinds
        yield REASON, f"{type(error).__name__}: {str(error)[:300]}".encode("utf-8", "replace")
    finally:
        limits.lift()


def _handed(rows: Iterator[Any], stored: int, limit: int, limits: ReaderLimits) -> Iterator[Frame]:
    """Rows in frames, those before an error too."""
    from forge_ray.data.read.columnar import EXPANSION, Budget

    budget, waiting, size = Budget(max(limit, EXPANSION * stored)), [], 0
    try:
        for row in rows:
            num_bytes = len(json.dumps(row))
            budget.take(num_bytes)
            waiting.append(row)
            size += num_bytes
            if size > ROWS_BYTES:
                limits.extend(size)
                yield ROWS, json.dumps(waiting).encode()
                waiting, size = [], 0
    except Exception:
        yield ROWS, json.dumps(waiting).encode()
        raise
    yield ROWS, json.dumps(waiting).encode()


def _answers(request: dict[str, Any], data: bytes) -> Iterator[Frame]:
    try:
        if request["kind"] == "document":
            yield from _document(request, data)
        else:
            readers = {"sheets": _workbook, "sheet": _workbook, "delta": _table}
            yield from readers.get(request["kind"], _columnar)(request)
    except MemoryError:
        yield LIMIT, b""
        return
    yield DONE, b""


def main() -> None:
    requests, answers = own_pipes()
    import pyarrow as pa

    pa.set_memory_pool(pa.system_memory_pool())  # the others reserve more than they use
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    import forge_ray.data.read.columnar
    import forge_ray.data.read.documents  # noqa: F401

    with contextlib.suppress(BrokenPipeError):
        write(answers, [(READY, b"")])
        for request, data in pairs(requests):
            write(answers, _answers(request, data))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
