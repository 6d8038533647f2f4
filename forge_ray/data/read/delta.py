"""The files of a Delta table's current version; runs in a reader's own process (`foreign`), as a log may be hostile too."""

from __future__ import annotations

import datetime
import decimal
from typing import Any
from urllib.parse import unquote

READABLE = {"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck", "typeWidening", "deletionVectors", "columnMapping"}
PARTITION = "partition."


def snapshot(folder: str) -> dict[str, Any]:
    """`version`, and `files`: pairs of a file's path inside the folder and its values of the columns that the table is
    partitioned by, which the file does not hold; or `problem`, why the files alone are not the rows."""
    import pyarrow as pa
    from deltalake import DeltaTable

    table = DeltaTable(folder)
    features = set(table.protocol().reader_features or [])
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        return {"problem": "maps its columns to other names in its files (delta.columnMapping.mode)"}
    if unknown := sorted(features - READABLE):
        return {"problem": f"needs {', '.join(unknown)} to be read"}
    if "deletionVectors" in features and _num_vectors(table):
        return {"problem": "marks rows of its files as deleted (deletion vectors)"}
    added = pa.table(table.get_add_actions(flatten=True))
    columns = [name for name in added.schema.names if name == "path" or name.startswith(PARTITION)]
    files = []
    for row in added.select(columns).to_pylist():
        path = unquote(row.pop("path"))
        if path.startswith("/") or "://" in path or ".." in path.split("/"):
            return {"problem": f"names the file {path[:100]!r}, which is not in its folder"}
        files.append(
            (path, {name.removeprefix(PARTITION): _plain(value) for name, value in row.items() if value is not None})
        )
    return {"version": table.version(), "files": sorted(files, key=lambda file: file[0])}


def _num_vectors(table: Any) -> int:
    """Files with rows that are marked as deleted; 1 where the marks cannot be read."""
    from deltalake.exceptions import DeltaError

    try:
        return sum(batch.num_rows for batch in table.deletion_vectors())
    except DeltaError:
        return 1


def _plain(value: Any) -> Any:
    if isinstance(value, (datetime.date, datetime.datetime)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
